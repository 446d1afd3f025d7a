"""Step `weights`: what the trainings start from."""

from kfp.dsl import Artifact, Input

from components.decorator import component


@component
def weights(resolved: Input[Artifact], workspace: str) -> str:
    """Fetches the published files that the configs name; gives a digest of them for the trainings' cache."""
    from vitdet.workspace import fetch_weights

    return fetch_weights(resolved.path, workspace)
