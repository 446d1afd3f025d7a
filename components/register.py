"""Step `register`: a version of the registered model; the champion, if it is still better than all others."""

from kfp.dsl import Artifact, Input, Metrics, Model

from components.decorator import component


@component
def register(
    checkpoint: Input[Model],
    figures: Input[Metrics],
    name: str,
    resolved: Input[Artifact],
    workspace: str,
) -> str:
    """Package the detector for MLflow, test it on an image and register it; returns the version in one line."""
    from components import run_id
    from vitdet import stages

    registered = stages.register_recipe(
        checkpoint.path, figures.path, resolved.path, name, workspace, run_id()
    )
    print(registered)
    return registered
