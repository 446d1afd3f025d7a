"""Experiment tracking and the model registry in MLflow; only this package imports mlflow."""
