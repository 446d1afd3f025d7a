"""Steps `evaluate` and `evaluate_champion`: metrics on the validation images."""

from kfp.dsl import HTML, Artifact, Input, Metrics, Model, Output

from components.decorator import component


@component
def evaluate(
    checkpoint: Input[Model],
    name: str,
    resolved: Input[Artifact],
    data: str,
    workspace: str,
    figures: Output[Metrics],
    report: Output[HTML],
) -> str:
    """Evaluate a checkpoint; log the metrics, with AP in percent, to KFP and MLflow.

    report: a page with precision-recall curves, AP by class, errors, and the best and worst images.
    Its metadata contains the URL of the MLflow run.

    Returns "unknown" if the registry has a champion but not its evaluation on this data with
    these settings, else "known".
    """
    from components import run_id
    from vitdet import stages

    found = stages.evaluate_recipe(
        checkpoint.path, resolved.path, name, data, workspace, run_id(), figures.path, report.path
    )
    # the AP of each class is not logged to KFP, only to MLflow
    for key in [metric for metric in found.metrics if "/" not in metric]:
        figures.log_metric(key, found.metrics[key])
    report.metadata["mlflow_run"] = found.page
    print(f"{name}: {found.text()}")
    return "known" if found.known else "unknown"


@component
def evaluate_champion(
    checkpoint: Input[Model],
    figures: Input[Metrics],
    name: str,
    resolved: Input[Artifact],
    workspace: str,
) -> None:
    """Evaluate the champion with the same data and settings as `checkpoint`; store the metrics."""
    from components import run_id
    from vitdet import stages

    print(
        stages.evaluate_champion(
            checkpoint.path, figures.path, resolved.path, name, workspace, run_id()
        )
    )
