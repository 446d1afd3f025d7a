"""Step `data`: verifies the data set, after fetching it to the workspace if requested."""

from kfp.dsl import Artifact, Dataset, Input, Output

from components.decorator import component


@component
def data(
    settings: Input[Artifact],
    workspace: str,
    fetch: str,
    resolved: Output[Artifact],
    manifest: Output[Dataset],
) -> list[dict[str, str]]:
    """Fetch the data if `fetch` is set; verify it; write configs with the splits and classes.

    The demo's data set is generated if it does not exist.

    Returns {"training": name, "data": fingerprint} for each training run. The fingerprint is part
    of the cache key of the training run.
    """
    from vitdet import stages

    found = stages.prepare_data(settings.path, workspace, resolved.path, manifest.path, fetch)
    manifest.metadata["fingerprint"] = found.fingerprint
    print(*found.notes, f"data {found.fingerprint}", sep="\n")
    return [{"training": name, "data": found.fingerprint} for name in found.names]
