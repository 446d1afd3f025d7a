"""MLflow: tracking, registry and comparison of training runs; mlflow is imported only here."""
