"""Why Kueue does not admit a job, from the conditions of its Workload; jobs without a queue.

Kueue creates a Workload (kueue.x-k8s.io/v1beta2, since Kueue 0.15) for a job with a queue label;
the Workload has a label with the job's uid (pkg/controller/constants). Its condition QuotaReserved
contains the reason why the job waits, e.g. `WaitingForQuota` with the missing quota, or
`Misconfigured` for a missing LocalQueue. Before 0.19, the same messages have the reason
`Pending` or `Inadmissible` (apis/kueue/v1beta2/workload_types.go).

A suspended job without a Workload waits forever. Since Kueue 0.19 (kubernetes-sigs/kueue, #12606 of
2026-06-29), the default configuration does not enable the integration of PyTorchJobs.
"""

from __future__ import annotations

from copy import deepcopy

from components.launcher.templates import Kind

GROUP, VERSION, PLURAL = "kueue.x-k8s.io", "v1beta2", "workloads"
QUEUE = f"{GROUP}/queue-name"  # label of a job that Kueue manages; its value is the LocalQueue
NO_QUEUE = "vitdet-none"  # name of a LocalQueue that does not exist
JOB_UID = f"{GROUP}/job-uid"  # label of a Workload
# Part of a message of Kueue's scheduler (pkg/scheduler/flavorassigner) -> what to change
REMEDIES = {
    "unavailable in ClusterQueue": "add the resource to coveredResources of the ClusterQueue",
    "doesn't exist": "create it (manifests/components/kueue-queues)",
    "terminating or missing": "create it (manifests/components/kueue-queues)",
    "is stopped": "the queue's stopPolicy must be None",
    "namespace doesn't match": "the ClusterQueue's namespaceSelector must match the namespace",
    "maximum capacity": "the job is larger than the quota: raise it, or request fewer nodes",
}


def queue_name(job: dict) -> str:
    """Return the LocalQueue of a job; "" if the job has no queue label."""
    return (job["metadata"].get("labels") or {}).get(QUEUE, "")


def without_queue(job: dict) -> dict:
    """Return a copy of the job that is suspended and that Kueue never admits.

    Without the label, Kueue's webhook would set the namespace's LocalQueue `default`, if there is
    one (pkg/controller/jobframework/defaults.go, ApplyDefaultLocalQueue).
    """
    copy = deepcopy(job)
    copy["metadata"]["labels"][QUEUE] = NO_QUEUE
    (copy["spec"].get("runPolicy") or copy["spec"])["suspend"] = True
    return copy


def is_suspended(job: dict) -> bool:
    """Return whether `suspend` is set in the job's spec."""
    spec = job["spec"]
    return bool((spec.get("runPolicy") or spec).get("suspend"))


def waiting_reason(workload: dict) -> str:
    """Return why this Workload is not admitted, on one line; "" if it is admitted."""
    spec, status = workload.get("spec") or {}, workload.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    if is_true(conditions.get("Admitted")) and not is_true(conditions.get("Evicted")):
        return ""
    if spec.get("active") is False:
        return "its Workload is deactivated (spec.active: false)"
    reserved = conditions.get("QuotaReserved")
    parts = [f"queue {spec.get('queueName')}"]
    if is_true(conditions.get("Evicted")):
        parts.append(f"evicted: {describe(conditions['Evicted'])}")
    if is_true(reserved):
        parts.append("quota is reserved")
        parts += [
            f"admission check {c['name']} is {c.get('state')}: {one_line(c.get('message'))}"
            for c in status.get("admissionChecks") or []
            if c.get("state") != "Ready"
        ]
    elif reserved:
        parts.append(f"no quota yet: {describe(reserved)}")
    else:
        parts.append("not evaluated yet")
    return "; ".join(parts)


def is_true(condition: dict | None) -> bool:
    """Return whether this condition exists and its status is True."""
    return condition is not None and condition.get("status") == "True"


def describe(condition: dict) -> str:
    """Return a condition's reason and message, with the remedy from REMEDIES if there is one."""
    message = one_line(condition.get("message"))
    remedy = next((text for part, text in REMEDIES.items() if part in message), "")
    return f"{condition.get('reason')}: {message}" + (f" ({remedy})" if remedy else "")


def one_line(text: str | None) -> str:
    """Return a message without line breaks; "no message" if it is empty."""
    return " ".join((text or "").split()) or "no message"


def no_workload(kind: Kind, queue: str) -> str:
    """Explain why Kueue has no Workload for a job with this queue's label."""
    integration = f"{kind.group}/{kind.name.lower()}"
    default = ", which it is not by default since Kueue 0.19" if kind.name == "PyTorchJob" else ""
    return (
        f"Kueue has no Workload for it, so it is not queued despite the label {QUEUE}: {queue}. If "
        f"Kueue is installed, {integration} must be in integrations.frameworks in its ConfigMap "
        f"kueue-manager-config{default}; if it is, see the job's events for the reason"
    )
