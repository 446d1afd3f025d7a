"""Fields of a job that the API server dropped.

An API server silently drops fields that are not in the installed CustomResourceDefinition. For
example, Kubeflow Trainer before 2.2 has neither `runtimePatches` nor `activeDeadlineSeconds`
(manifests/base/crds). Therefore, the job returned by `create` is compared with the job sent.
"""

from __future__ import annotations

from components.launcher.templates import Kind

NO_DEADLINE = "the job has no deadline, so a forgotten job does not end by itself"
# Fields that do not change how a job trains -> the consequence of dropping them
SAFETY = {
    "spec.activeDeadlineSeconds": NO_DEADLINE,
    "spec.runPolicy.activeDeadlineSeconds": NO_DEADLINE,
    "spec.runPolicy.ttlSecondsAfterFinished": "the job is not deleted automatically after its end",
}
# Fields of a TrainJob -> the version of Kubeflow Trainer that introduced them
SINCE = {"activeDeadlineSeconds": "2.2", "runtimePatches": "2.2"}
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


def pod_settings(spec: dict) -> list[str]:
    """Return the names of the pod settings in the runtimePatches of a TrainJob."""
    names: set[str] = set()
    for patch in spec.get("runtimePatches") or []:
        runtime = (patch.get("trainingRuntimeSpec") or {}).get("template") or {}
        for job in (runtime.get("spec") or {}).get("replicatedJobs") or []:
            pod = ((job.get("template") or {}).get("spec") or {}).get("template") or {}
            names |= (pod.get("spec") or {}).keys()
    return sorted(names)


def check_dropped(kind: Kind, sent: dict, received: dict) -> tuple[list[str], str]:
    """Return (warnings, error) about the fields of a new job that the API server dropped.

    error: why the job would not train as requested; "" if it would.
    """
    warnings, lost = [], []
    settings = pod_settings(sent["spec"])
    missing = f"the cluster's {kind.name} has no "
    for path in dropped_fields(sent["spec"], received.get("spec"), "spec"):
        since = SINCE.get(path.split(".")[1].partition("[")[0]) if kind.name == "TrainJob" else ""
        remedy = f"install {kind.operator}"
        if since:
            remedy = f"upgrade Kubeflow Trainer to {since} or later"
        if path in SAFETY:
            warnings.append(f"{missing}{path}: {SAFETY[path]}; {remedy}")
        elif path != "spec.runtimePatches":
            lost.append(f"{path} ({remedy})")
        elif settings:
            lost.append(f"{path}, which sets {', '.join(settings)} of the pods ({remedy})")
        else:
            warnings.append(f"{missing}{path}: the pods lack the run's labels; {remedy}")
    error = f"{missing}{'; no '.join(lost)}; the job would train differently" if lost else ""
    return warnings, error
