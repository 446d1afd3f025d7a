"""Step `weights`: fetches the initial weights."""

from kfp.dsl import Artifact, Input

from components.decorator import component


@component
def weights(settings: Input[Artifact], workspace: str) -> str:
    """Fetch the published weights that the configs name; return a digest for the cache key."""
    from vitdet import stages

    return stages.fetch_weights(settings.path, workspace)
