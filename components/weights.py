"""Step `weights`: what the trainings start from."""

from kfp.dsl import Artifact, Input

from components.decorator import component


@component
def weights(settings: Input[Artifact], workspace: str) -> str:
    """Fetch the published files that the configs name; returns a digest of them, by which the trainings are cached."""
    from vitdet import stages

    return stages.fetch_weights(settings.path, workspace)
