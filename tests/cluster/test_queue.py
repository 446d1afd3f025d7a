"""A job that Kueue suspends: the reason is logged, and a label without effect is reported.

The conditions are those of kubernetes-sigs/kueue at ff69552e: apis/kueue/v1beta2/workload_types.go; their messages
are in pkg/controller/core/workload_controller.go (getQueueBlocker) and pkg/scheduler/flavorassigner/flavorassigner.go.
"""

from __future__ import annotations

from copy import deepcopy

import pytest

from components.launcher.queue import is_suspended, waiting_reason, without_queue
from components.launcher.templates import KINDS, fill_template
from tests.cluster.test_following import DONE, RUNNING, Record, follow
from tests.cluster.test_launcher import TEMPLATES, conditions, filled, pod, request

SUSPENDED = conditions("Created=True", "Suspended=True")


def workload(*given: tuple[str, str, str, str], **more: object) -> dict:
    """Return a Workload; given: (type, status, reason, message) of its conditions."""
    keys = ("type", "status", "reason", "message")
    found = [dict(zip(keys, condition, strict=True)) for condition in given]
    spec = {"queueName": "vitdet", **more.pop("spec", {})}
    return {"spec": spec, "status": {"conditions": found, **more}}


UNCOVERED = (
    "QuotaReserved",
    "False",
    "NoMatchingFlavor",
    "couldn't assign flavors to pod set master: resource rdma/rdma_shared_device_a unavailable in\nClusterQueue",
)
CHECK = {"name": "prov", "state": "Pending", "message": "no nodes yet"}
ADMITTED = (("QuotaReserved", "True", "QuotaReserved", ""), ("Admitted", "True", "Admitted", ""))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (workload(), "queue vitdet; not evaluated yet"),
        (
            workload(UNCOVERED),
            f"queue vitdet; no quota yet: NoMatchingFlavor: {' '.join(UNCOVERED[3].split())} (add the "
            "resource to coveredResources of the ClusterQueue)",
        ),
        (
            workload(("QuotaReserved", "False", "Inadmissible", "LocalQueue vitdet doesn't exist")),
            "queue vitdet; no quota yet: Inadmissible: LocalQueue vitdet doesn't exist (create it "
            "(manifests/components/kueue-queues))",
        ),
        (
            workload(
                ("Evicted", "True", "Preempted", "Preempted to accommodate a workload"),
                ("QuotaReserved", "False", "Pending", "insufficient unused quota"),
                ("Admitted", "False", "NoReservation", ""),
            ),
            "queue vitdet; evicted: Preempted: Preempted to accommodate a workload; no quota yet: Pending: "
            "insufficient unused quota",
        ),
        (
            workload(ADMITTED[0], admissionChecks=[CHECK, {"name": "other", "state": "Ready"}]),
            "queue vitdet; quota is reserved; admission check prov is Pending: no nodes yet",
        ),
        (workload(spec={"active": False}), "its Workload is deactivated (spec.active: false)"),
        (workload(*ADMITTED), ""),
        (workload(*ADMITTED, ("Evicted", "False", "QuotaReserved", "")), ""),
    ],
)
def test_the_reason_for_waiting_is_described_in_one_line(found: dict, text: str) -> None:
    assert waiting_reason(found) == text


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_ended_job_is_suspended_and_kueue_neither_admits_it_nor_sets_a_queue(kind: str) -> None:
    job = fill_template(TEMPLATES[kind], KINDS[kind], request())
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "default"
    before, left = deepcopy(job), without_queue(job)
    assert is_suspended(left) and not is_suspended(job)
    # without a label, Kueue would set the LocalQueue `default`
    assert left["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name") == "vitdet-none"
    assert left["metadata"]["labels"].items() <= before["metadata"]["labels"].items()
    assert job == before


def queued(suspended: bool) -> dict:
    job = filled()
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "vitdet"
    job["spec"]["runPolicy"]["suspend"] = suspended
    return job


class Queued(Record):
    """A client of a job with the queue's label; each poll returns the next Workloads; the last ones repeat."""

    def __init__(self, suspended: bool, *looks: tuple, workloads: list[list[dict] | None]) -> None:
        super().__init__(*looks)
        self.job, self.workloads_ = queued(suspended), workloads
        self.reads = 0

    def get(self) -> dict:
        return {**self.job, **self.looks[0][0]}

    def workloads(self, uid: str) -> list[dict] | None:
        self.reads += 1
        return self.workloads_.pop(0) if len(self.workloads_) > 1 else self.workloads_[0]


def test_each_reason_is_logged_once_and_nothing_follows_the_admission() -> None:
    held, job = (SUSPENDED, []), queued(True)
    waiting = [workload()], [workload(UNCOVERED)], [workload(UNCOVERED)], [workload(*ADMITTED)]
    record = Queued(True, *[held] * 4, *[(RUNNING, [pod()])] * 3, (DONE, []), workloads=[*waiting])
    lines, error = follow(record, job)
    told = [line for line in lines if "is waiting in Kueue: queue vitdet; " in line]
    assert not error and len(told) == 2 and "not evaluated yet" in told[0]
    assert "coveredResources" in told[1] and record.reads == 4


def test_a_job_that_kueue_ignores_is_an_error_with_the_reason() -> None:
    record = Queued(True, (SUSPENDED, []), workloads=[[]])
    lines, error = follow(record, queued(True))
    assert "has been suspended for 0 s: Kueue has no Workload for it" in error
    assert "kubeflow.org/pytorchjob must be in integrations.frameworks in its ConfigMap" in error
    assert "not by default since Kueue 0.19" in error and error.endswith("the job is suspended")
    assert record.asked == ["create", "replace"]


def test_a_label_without_effect_is_a_warning_if_the_job_runs() -> None:
    record = Queued(False, *[(RUNNING, [pod()])] * 40, (DONE, []), workloads=[[]])
    lines, error = follow(record, queued(False))
    assert not error and sum("is not queued" in line for line in lines) == 1


def test_unreadable_workloads_are_not_an_error() -> None:
    record = Queued(True, *[(SUSPENDED, [])] * 60, (DONE, []), workloads=[None])
    assert follow(record, queued(True))[1] == ""
