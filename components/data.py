"""Step `data`: the data set on the workspace, verified."""

from kfp.dsl import Artifact, Dataset, Input, Output

from components.decorator import component


@component
def data(
    settings: Input[Artifact],
    workspace: str,
    resolved: Output[Artifact],
    manifest: Output[Dataset],
) -> list[dict[str, str]]:
    """Verify the data and complete the configs with its splits and classes; the demo's data set is drawn here.

    Returns the trainings, {"training": name, "data"} of each; data: the fingerprint, by which they are cached.
    """
    from vitdet import stages

    found = stages.prepare_data(settings.path, workspace, resolved.path, manifest.path)
    manifest.metadata["fingerprint"] = found.fingerprint
    print(*found.notes, f"data {found.fingerprint}", sep="\n")
    return [{"training": name, "data": found.fingerprint} for name in found.names]
