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
    """Packs the detector for MLflow, asks it about an image, and registers it; gives the version in one line."""
    from vitdet import workspace as steps

    registered = steps.register(checkpoint.path, figures.path, resolved.path, name, workspace)
    print(registered)
    return registered
