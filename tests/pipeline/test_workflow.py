"""Whether a stopped step deletes its training job, depending on the state of the run's Workflow."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from components.launcher.step import Step
from components.launcher.workflow import NODE, end_of_run, retry_index, without_run, workflow_owner
from tests.cluster.test_launcher import OWNER

NOW = datetime(2026, 1, 2, tzinfo=UTC)
WORKFLOW = {
    "metadata": {"name": "run", "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"},
    "spec": {},
    "status": {"phase": "Running", "startedAt": "2026-01-01T00:00:00Z"},
}


def changed(**sections: dict) -> dict:
    return {key: {**WORKFLOW[key], **sections.get(key, {})} for key in WORKFLOW}


@pytest.mark.parametrize(
    ("workflow", "reason"),
    [
        (WORKFLOW, ""),
        (changed(spec={"activeDeadlineSeconds": 90000}), ""),
        (
            {"metadata": WORKFLOW["metadata"]},
            "",
        ),  # a Workflow that the controller has not processed
        (None, "its run has been deleted"),
        (changed(metadata={"uid": "2"}), "its run has been deleted"),
        (changed(metadata={"deletionTimestamp": "2026-01-01T01:00:00Z"}), "is being deleted"),
        (changed(spec={"shutdown": "Terminate"}), "is being shut down"),
        (changed(spec={"shutdown": "Stop"}), "is being shut down"),
        (changed(spec={"activeDeadlineSeconds": 0}), "has been terminated"),
        (changed(spec={"activeDeadlineSeconds": 80000}), "is past its deadline"),
        (changed(status={"phase": "Failed"}), "has ended (Failed)"),
        (changed(status={"phase": "Succeeded"}), "has ended (Succeeded)"),
    ],
)
def test_the_workflow_tells_why_a_run_ends(workflow: dict | None, reason: str) -> None:
    found = end_of_run(workflow, "1", NOW)
    assert found == reason == "" or (reason and found.endswith(reason))


CONTROLLER = {**OWNER, "controller": True, "blockOwnerDeletion": True}
REPLICA_SET = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "3"}


def step_pod(node: str = "vitdet-x.root.train-job(0)", **metadata: object) -> dict:
    """Return a step's pod as created by Argo (workflow/controller/workflowpod.go)."""
    owners = {"ownerReferences": [CONTROLLER], "annotations": {NODE: node}}
    return {"metadata": {"name": "step", **owners, **metadata}, "status": {}}


def test_the_workflow_owns_the_job_without_being_its_controller() -> None:
    assert workflow_owner(step_pod()) == OWNER
    assert workflow_owner({"metadata": {"ownerReferences": [REPLICA_SET]}}) is None
    assert workflow_owner({"metadata": {}}) is None
    owners = [REPLICA_SET, OWNER, {**OWNER, "kind": "Pod"}]
    assert without_run({"metadata": {"ownerReferences": owners}}) == [REPLICA_SET]


@pytest.mark.parametrize(
    ("node", "index"), [("a.b(0)", 0), ("a.b(12)", 12), ("a.b", None), ("a(1).b", None)]
)
def test_the_attempt_is_the_number_in_argos_node_name(node: str, index: int | None) -> None:
    assert retry_index(step_pod(node)) == index


class Cluster:
    """Replaces JobClient: returns a response or raises an error for each of a step's two requests."""

    def __init__(self, pod: object, workflow: object) -> None:
        self.answers = {"pod": pod, "workflow": workflow}

    def pod(self, name: str, once: bool = False) -> dict | None:
        return self.answer("pod") if once else step_pod()

    def workflow(self, name: str, once: bool = False) -> dict | None:
        assert name == "run"
        return self.answer("workflow")

    def answer(self, key: str) -> dict | None:
        found = self.answers[key]
        if isinstance(found, Exception):
            raise found
        return found


SILENT = RuntimeError("the API server does not respond")
DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}


@pytest.mark.parametrize(
    ("pod", "workflow", "deletes"),
    [
        (step_pod(), WORKFLOW, False),  # node shutdown: SIGTERM without a deletion
        (step_pod(deletionTimestamp="2026-01-01T00:00:00Z"), WORKFLOW, False),
        (step_pod(), changed(spec={"activeDeadlineSeconds": 0}), True),
        (step_pod(), SILENT, True),
        (SILENT, SILENT, True),
        (step_pod(deletionTimestamp="2026-01-01T00:00:00Z"), SILENT, False),
        ({**step_pod(), "status": DISRUPTED}, SILENT, False),
        (None, SILENT, False),
    ],
)
def test_a_stopped_step_deletes_its_job_depending_on_its_run_and_pod(
    monkeypatch: pytest.MonkeyPatch, pod: object, workflow: object, deletes: bool
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "step")
    step = Step(Cluster(pod, workflow))
    assert bool(step.end_reason()) == deletes
    assert step.owner == OWNER and step.first_attempt


def test_no_job_is_deleted_if_its_run_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "exit")
    with pytest.raises(RuntimeError, match="does not respond"):
        Step(Cluster(step_pod(), SILENT)).run_ended()
    assert not Step(Cluster(step_pod(), WORKFLOW)).run_ended()
    assert Step(Cluster(step_pod(), None)).run_ended()


def test_outside_a_pipeline_the_job_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    step = Step(Cluster(SILENT, SILENT))
    assert step.owner is None and not step.first_attempt
    assert step.end_reason() == "it does not belong to a pipeline run"
