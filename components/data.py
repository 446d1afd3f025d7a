"""Step `data`: the data set on the workspace, verified."""

from kfp.dsl import Artifact, Dataset, Input, Output

from components.decorator import component


@component
def data(resolved: Input[Artifact], workspace: str, manifest: Output[Dataset]) -> str:
    """Draws the demo's data set or verifies another; gives the digest that the trainings' cache depends on."""
    from vitdet.workspace import prepare_data

    digest = prepare_data(resolved.path, workspace, manifest.path)
    manifest.metadata["digest"] = digest
    print(f"data {digest}")
    return digest
