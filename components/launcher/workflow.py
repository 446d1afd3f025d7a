"""The Argo Workflow of a pipeline run.

The Workflow owns the training jobs of its run: these jobs outlive the steps' pods, which may be
evicted, and are deleted together with the Workflow. The functions interpret objects as returned by
the Kubernetes API.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

GROUP, VERSION, PLURAL = "argoproj.io", "v1alpha1", "workflows"
NODE = "workflows.argoproj.io/node-name"  # annotation of a step's pod
FINISHED = ("Succeeded", "Failed", "Error")  # values of status.phase
OWNERS = ("Workflow", "Pod")  # kinds of owner that a launcher sets; "Pod" up to version 0.1


def workflow_owner(pod: dict) -> dict | None:
    """Return an ownerReference to the Workflow of this pod; None if no Workflow owns the pod.

    `controller` is not set, as Kueue would then treat the Workflow as the job's controller;
    `blockOwnerDeletion` is not set, as it needs an additional permission.
    """
    for owner in pod["metadata"].get("ownerReferences") or []:
        if owner["kind"] == "Workflow":
            return {key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}
    return None


def retry_index(pod: dict) -> int | None:
    """Return the index of a step's attempt; None if unknown. A retry of the run resets the index.

    Argo names the attempts of a node NODE(0), NODE(1), ... (workflow/controller/operator.go,
    executeTemplate of v3.7). Kubeflow Pipelines sets KFP_RETRY_INDEX since 2.16.1.
    """
    found = re.search(r"\((\d+)\)$", (pod["metadata"].get("annotations") or {}).get(NODE, ""))
    return int(found[1]) if found else None


def end_of_run(workflow: dict | None, uid: str, now: datetime | None = None) -> str:
    """Return why this run has ended or is ending; "" if it continues.

    Kubeflow's Terminate sets spec.activeDeadlineSeconds to 0 (backend/src/common/util/
    execution_spec.go of 2.17); `argo terminate` and `argo stop` set spec.shutdown. If the uid
    differs, the run's Workflow was deleted and another Workflow has its name.
    """
    if workflow is None or workflow["metadata"]["uid"] != uid:
        return "its run has been deleted"
    spec, status = workflow.get("spec") or {}, workflow.get("status") or {}
    if workflow["metadata"].get("deletionTimestamp"):
        return "its run is being deleted"
    if spec.get("shutdown"):
        return "its run is being shut down"
    if status.get("phase") in FINISHED:
        return f"its run has ended ({status['phase']})"
    seconds = spec.get("activeDeadlineSeconds")
    if seconds is not None:
        started = datetime.fromisoformat(
            status.get("startedAt") or workflow["metadata"]["creationTimestamp"]
        )
        if started + timedelta(seconds=seconds) <= (now or datetime.now(UTC)):
            return "its run has been terminated" if seconds == 0 else "its run is past its deadline"
    return ""


def is_disrupted(pod: dict) -> bool:
    """Return whether this pod is being deleted or has the condition DisruptionTarget."""
    return "deletionTimestamp" in pod["metadata"] or has_disruption_target(pod)


def has_disruption_target(pod: dict) -> bool:
    """Return whether Kubernetes (1.26 or later) marked this pod as evicted, preempted or lost."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "DisruptionTarget" and c.get("status") == "True" for c in conditions)


def without_run(job: dict) -> list[dict]:
    """Return a job's ownerReferences without the references to its run."""
    owners = job["metadata"].get("ownerReferences") or []
    return [owner for owner in owners if owner["kind"] not in OWNERS]
