"""Fields of a job that the API server dropped.

An API server silently drops fields that are not in the installed CustomResourceDefinition. For
example, Kubeflow Trainer 2.1 has `podTemplateOverrides` instead of `runtimePatches`, and no
`activeDeadlineSeconds` (manifests/base/crds). Therefore, the job returned by `create` is compared
with the job sent.
"""

from __future__ import annotations

from components.launcher.queue import queue_name
from components.launcher.templates import Kind

NO_DEADLINE = "the job has no deadline, so a forgotten job does not end by itself"
# Fields that do not change how a job trains -> the consequence of dropping them
SAFETY = {
    "spec.activeDeadlineSeconds": NO_DEADLINE,
    "spec.runPolicy.activeDeadlineSeconds": NO_DEADLINE,
    "spec.runPolicy.ttlSecondsAfterFinished": "the job is not deleted automatically after its end",
}
# Fields of a TrainJob that depend on the version of Kubeflow Trainer -> what to do without them
REMEDIES = {
    "activeDeadlineSeconds": "upgrade Kubeflow Trainer to 2.2 or later",
    "runtimePatches": "upgrade Kubeflow Trainer to 2.2 or later",
    "podTemplateOverrides": "Kubeflow Trainer 2.2 replaced this field by runtimePatches",
}
# The launcher writes the same pod settings to both fields; each version of Trainer has one of them
PATCHES = {"spec.podTemplateOverrides", "spec.runtimePatches"}
KEYS = ("manager", "name", "mountPath", "key")  # keys that identify an entry of a list


def dropped_fields(sent: object, received: object, path: str) -> list[str]:
    """Return the paths of the fields of `sent` that `received` lacks.

    Values are not compared, as the API server normalizes them; webhooks may add fields and list
    entries. Empty values, 0 and False are equivalent to absent values.
    """
    if isinstance(sent, dict):
        if not isinstance(received, dict):
            return [path]
        lost = []
        for key, value in sent.items():
            if value in (None, "", 0, False, [], {}):
                continue
            inside = f"{path}.{key}"
            lost += dropped_fields(value, received[key], inside) if key in received else [inside]
        return lost
    if isinstance(sent, list) and any(isinstance(entry, dict) for entry in sent):
        found = received if isinstance(received, list) else []
        return [
            field
            for i, value in enumerate(sent)
            for field in dropped_fields(value, counterpart(value, i, found), f"{path}[{i}]")
        ]
    return []


def counterpart(entry: object, index: int, entries: list) -> object:
    """Return the entry of `entries` with the same key (see KEYS) or index; None if absent."""
    if isinstance(entry, dict) and (key := next((key for key in KEYS if key in entry), None)):
        dicts = (other for other in entries if isinstance(other, dict))
        return next((other for other in dicts if other.get(key) == entry[key]), None)
    return entries[index] if index < len(entries) else None


def check_dropped(kind: Kind, sent: dict, received: dict) -> tuple[list[str], str]:
    """Return (warnings, error) about the fields of a new job that the API server dropped.

    error: why the job would not train as requested; "" if it would.
    """
    warnings, lost = [], []
    missing = f"the cluster's {kind.name} has no "
    dropped = dropped_fields(sent["spec"], received.get("spec"), "spec")
    pod_settings_lost = PATCHES <= set(dropped)
    if "spec.runtimePatches" in dropped and queue_name(sent):
        # Kueue sets node selectors in its own patch (pkg/controller/jobs/trainjob)
        warnings.append(
            f"{missing}spec.runtimePatches: Kueue 0.17 or later cannot start the job; "
            f"{REMEDIES['runtimePatches']}"
        )
    for path in dropped:
        field = path.split(".")[1].partition("[")[0]
        remedy = f"install {kind.operator}"
        if kind.name == "TrainJob":
            remedy = REMEDIES.get(field, remedy)
        if path in SAFETY:
            warnings.append(f"{missing}{path}: {SAFETY[path]}; {remedy}")
        elif path not in PATCHES:
            lost.append(f"{path} ({remedy})")
        elif len(sent["spec"][field]) > 1:  # also entries of the template
            lost.append(f"{path} ({remedy})")
    if pod_settings_lost:
        text, remedy = " or ".join(sorted(PATCHES)), "upgrade Kubeflow Trainer to 2.1 or later"
        if settings := sorted(sent["spec"]["podTemplateOverrides"][-1].get("spec", {})):
            lost.append(f"{text}, which set {', '.join(settings)} of the pods ({remedy})")
        else:
            warnings.append(f"{missing}{text}: the pods lack the run's labels; {remedy}")
    error = f"{missing}{'; no '.join(lost)}; the job would train differently" if lost else ""
    return warnings, error
