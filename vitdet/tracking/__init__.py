"""MLflow: tracking of a training, the model registry, comparison of trainings; mlflow is imported only here."""
