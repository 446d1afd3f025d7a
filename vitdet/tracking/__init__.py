"""MLflow: tracking, registry and comparison of training runs; only this package imports mlflow."""
