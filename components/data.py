"""Step `data`: verifies the data set in the workspace."""

from kfp.dsl import Artifact, Dataset, Input, Output

from components.decorator import component


@component
def data(
    settings: Input[Artifact],
    workspace: str,
    resolved: Output[Artifact],
    manifest: Output[Dataset],
) -> list[dict[str, str]]:
    """Verify the data and add its splits and classes to the configs; generate the demo's data set.

    Returns {"training": name, "data": fingerprint} for each training. The fingerprint is part of
    the cache key of a training.
    """
    from vitdet import stages

    found = stages.prepare_data(settings.path, workspace, resolved.path, manifest.path)
    manifest.metadata["fingerprint"] = found.fingerprint
    print(*found.notes, f"data {found.fingerprint}", sep="\n")
    return [{"training": name, "data": found.fingerprint} for name in found.names]
