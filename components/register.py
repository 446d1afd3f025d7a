"""Step `register`: registers a model version, and makes it the champion if it passes the gate."""

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
    """Package the detector, test it on an image and register it; return a summary."""
    from components import run_id
    from vitdet import stages

    registered = stages.register_recipe(
        checkpoint.path, figures.path, resolved.path, name, workspace, run_id()
    )
    print(registered)
    return registered
