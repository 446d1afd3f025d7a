"""Step `weights`: fetches the initial weights."""

from kfp.dsl import Artifact, Input

from components.decorator import component


@component
def weights(settings: Input[Artifact], workspace: str) -> str:
    """Fetch the published weights named in the configs; return a digest of all initial weights."""
    from vitdet import stages

    return stages.fetch_weights(settings.path, workspace)
