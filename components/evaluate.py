"""Step `evaluate`: a trained detector's figures on the validation images."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.decorator import component


@component
def evaluate(
    checkpoint: Input[Model],
    name: str,
    resolved: Input[Artifact],
    manifest: Input[Dataset],
    workspace: str,
    figures: Output[Metrics],
) -> None:
    """Box and mask AP in percent and the rest of the figures, here and in MLflow."""
    from vitdet import workspace as steps

    found = steps.evaluate(
        checkpoint.path, resolved.path, name, manifest.path, workspace, figures.path
    )
    for key, value in found.items():
        figures.log_metric(key, value)
    print(f"{name}: box AP {found.get('box_ap')}, mask AP {found.get('mask_ap')}")
