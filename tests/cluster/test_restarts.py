"""Job failures by cause: errors are counted, disruptions are not, out-of-memory ends the job."""

from __future__ import annotations

from itertools import product

import pytest

from components.launcher.restarts import Restarts, is_disruption
from components.launcher.status import failure_reason
from tests.cluster.test_following import RUNNING, Record, follow, unschedulable
from tests.cluster.test_launcher import OWNER, conditions, ended, filled, pod

NODE_LOST = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}


def crashed(name: str, times: int, code: int = 1, reason: str = "Error") -> dict:
    """Return a pod whose container was restarted in place."""
    return pod(name, container={**ended(code, reason, key="lastState"), "restartCount": times})


def lost(name: str, uid: str = "") -> dict:
    """Return a pod that was lost with its node, with the condition of Kubernetes 1.26."""
    found = pod(name, "Failed", container=ended(143), conditions=[NODE_LOST])
    found["metadata"]["uid"] = uid or name
    return found


def named(name: str, uid: str) -> dict:
    found = pod(name)
    found["metadata"]["uid"] = uid
    return found


def not_ready(container: bool) -> dict:
    """Return a pod with the condition Ready=False, whose container is ready or not."""
    found = pod("w", container={"state": {"running": {}}, "ready": container})
    found["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    return found


def counted(*looks: list[dict], step: float = 5.0) -> Restarts:
    """Return the counts after these polls, `step` seconds apart."""
    restarts = Restarts()
    for number, pods in enumerate(looks):
        for state in pods:
            restarts.observe(state, "pytorch", number * step)
        restarts.complete_poll(pods, 2, number * step)
    return restarts


HEALTHY = [pod("m"), pod("w")]
SUCCEEDED = (conditions("Succeeded=True"), [])


ALONE = [crashed("m", 1), pod("w")]
WAITING = [
    [crashed("m", 1), lost("w")],
    *([crashed("m", times), unschedulable("w")] for times in range(1, 9)),
]
COUNTS = {
    "an error that ends all pods": ([ALONE, [crashed("m", 1), crashed("w", 1)]], 5, 1, 0),
    "restarts between two polls": (
        [[crashed("m", times), crashed("w", times)] for times in (1, 2, 5)],
        *(5, 5, 0),
    ),
    "two errors that are far apart": ([ALONE, [crashed("m", 1), crashed("w", 1)]], 700, 2, 0),
    "a lost node, reported late": ([ALONE, [crashed("m", 1), lost("w")]], 240, 0, 1),
    "a container that failed before its node was declared lost": (
        [[pod("m"), pod("w", "Failed", container=ended(143))], [lost("w")]],
        *(5, 0, 1),
    ),
    "a node that does not respond": ([[crashed("m", 1), not_ready(True)]], 5, 0, 1),
    "a container that is not ready": ([[crashed("m", 1), not_ready(False)]], 5, 1, 0),
    "a pod that was replaced": ([[crashed("m", 1), named("w", "second")]], 5, 0, 1),
    "a pod that was deleted": ([[pod("m")]], 5, 0, 1),
    "peers that fail while a lost pod is missing": (WAITING, 700, 0, None),
    "a new pod that is lost again": (
        [*WAITING, [crashed("m", 8), named("w", "new")], [crashed("m", 9)]],
        *(700, 0, None),
    ),
}


@pytest.mark.parametrize(("looks", "step", "errors", "disruptions"), COUNTS.values(), ids=COUNTS)
def test_failures_are_counted_by_cause(
    looks: list, step: float, errors: int, disruptions: int | None
) -> None:
    found = counted(HEALTHY, *looks, step=step)
    assert found.errors == errors and disruptions in (None, found.disruptions)


def backing_off(name: str, times: int) -> dict:
    """Return a pod whose container has failed this many times and waits for its restart."""
    found = crashed(name, times - 1)
    found["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
    return found


@pytest.mark.parametrize("reverse", [False, True])
def test_failures_of_the_peers_of_a_waiting_pod_are_not_a_second_error(reverse: bool) -> None:
    """A poll may list the two pods in either order."""

    def count(*looks: list[dict]) -> Restarts:
        return counted(HEALTHY, *(look[::-1] if reverse else look for look in looks))

    waiting = backing_off("m", 1)
    first = [waiting, crashed("w", 1)]
    peers = [[waiting, backing_off("w", 2)], [waiting, crashed("w", 2)], [waiting, crashed("w", 3)]]
    found = count(first, *peers, [crashed("m", 1), crashed("w", 3)])
    assert (found.errors, found.disruptions) == (1, 0)
    # w fails again after m was restarted: a second error
    found = count(first, [crashed("m", 1), crashed("w", 1)], [pod("m"), crashed("w", 2)])
    assert found.errors == 2
    # m fails again after its restart, while w waits for its own
    found = count(first, [crashed("m", 1), crashed("w", 1)], [backing_off("m", 2), crashed("w", 2)])
    assert found.errors == 2


# seconds that the kubelet waits before each restart
BACK_OFFS = (10, 20, 40, 80, 160, 300, 300, 300, 300)


def looping(name: str, start: float, run: float, terminated: float, now: float) -> dict:
    """Return a pod in a crash loop at the time `now`; it fails `run` seconds after each start.

    terminated: seconds for which the kubelet reports this state before the back-off.
    """
    failed_at = start + run
    for failures, delay in enumerate(BACK_OFFS, 1):
        if now < failed_at:
            return crashed(name, failures - 1) if failures > 1 else pod(name)
        if now < failed_at + terminated:
            return pod(name, container={**ended(1), "restartCount": failures - 1})
        if now < failed_at + delay:
            return backing_off(name, failures)
        failed_at += delay + run
    raise AssertionError("the crash loop lasts longer than it should")


@pytest.mark.parametrize("pods", [1, 2, 8])
def test_each_round_of_a_crash_loop_counts(pods: int) -> None:
    """It counts although the other pods are in back-off whenever a pod fails."""
    for run, terminated, apart in product((2.0, 20.0), (0.0, 1.0), (0.0, 0.7, 1.6)):
        restarts, now = Restarts(), 0.0
        seventh = 7 * run + sum(BACK_OFFS[:6])
        while restarts.decided_errors(now) < 7:
            found = [looping(f"w{n}", n * apart, run, terminated, now) for n in range(pods)]
            for state in found:
                restarts.observe(state, "pytorch", now)
            restarts.complete_poll(found, pods, now)
            assert restarts.errors < 7 or now >= seventh  # the pods of one round count once
            now += 5.0
        assert now < 2 * seventh


def test_many_evictions_are_not_an_error() -> None:
    looks = [HEALTHY]
    for number in range(50):
        failed = crashed("m", number + 1)
        looks += [[failed, lost("w", f"w{number}")], [failed, named("w", f"w{number + 1}")]]
    found = counted(*looks, step=120)
    assert found.errors == 0 and found.disruptions >= 10


@pytest.mark.parametrize(
    ("status", "disruption"),
    [
        ({"reason": "Evicted", "message": "The node was low on resource: memory."}, True),
        ({"reason": "Evicted", "message": 'EmptyDir "tmp" exceeds the limit "20Gi".'}, False),
        ({"reason": "NodeLost"}, True),
        ({"reason": "Terminated", "message": "in response to node shutdown"}, True),
        ({"reason": "Preempting"}, True),
        ({"reason": "OutOfnvidia.com/gpu"}, True),
        ({"reason": "UnexpectedAdmissionError"}, True),
        ({"reason": "DeadlineExceeded"}, False),
        ({"conditions": [NODE_LOST]}, True),
        ({"conditions": [{**NODE_LOST, "status": "False"}]}, False),
    ],
)
def test_external_ends_of_a_pod_are_disruptions(status: dict, disruption: bool) -> None:
    failed = pod(phase="Failed", container=ended(137), **status)
    assert is_disruption(failure_reason(failed), failed) == disruption


@pytest.mark.parametrize(
    ("ended_at", "disruption"), [("2026-01-01T00:00:05Z", True), ("2026-01-01T00:00:01Z", False)]
)
def test_a_pod_that_ends_after_its_deletion_is_a_disruption(
    ended_at: str, disruption: bool
) -> None:
    failed = pod(phase="Failed", container=ended(1, when=ended_at))
    failed["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:33Z"
    failed["metadata"]["deletionGracePeriodSeconds"] = 30
    assert is_disruption(failure_reason(failed), failed) == disruption


def limited(restarts: str = "2") -> dict:
    job = filled(owner=OWNER)
    job["metadata"]["annotations"] = {"vitdet/restarts": restarts}
    return job


def test_a_job_ends_after_the_errors_that_its_file_allows() -> None:
    looks = [(RUNNING, [crashed("m", times), crashed("w", times)]) for times in range(1, 6)]
    record = Record((RUNNING, HEALTHY), *looks)
    record.logs["m previous"] = ["2026-01-01T00:00:00Z ValueError: bad image"]
    lines, error = follow(record, limited())
    assert "has failed (errors: 3, allowed restarts: 2)\ncause: pod m on node n1" in error
    assert error.endswith("ValueError: bad image; the job is suspended")
    assert record.asked == ["create", "halt"] and record.annotations["vitdet/errors"] == "3"
    assert [line for line in lines if "errors" in line] == [
        "launcher: errors: 1 of at most 2",
        "launcher: errors: 2 of at most 2; the next error ends the job",
    ]


def test_errors_between_two_polls_are_counted() -> None:
    record = Record((RUNNING, HEALTHY), (RUNNING, [crashed("m", 3), crashed("w", 3)]))
    record.flicker = [crashed(name, times) for times in (1, 2, 3) for name in ("m", "w")]
    assert "has failed (errors: 3, " in follow(record, limited())[1]


def test_the_next_launcher_continues_the_count() -> None:
    metadata = {**limited()["metadata"], "annotations": {"vitdet/errors": "2"}}
    there = {"metadata": metadata, **RUNNING}
    looks = [(RUNNING, [crashed("m", times), crashed("w", times)]) for times in (4, 5)]
    record = Record(*looks, there=there)
    assert "has failed (errors: 3, " in follow(record, limited())[1]


def test_an_error_is_stored_only_when_no_lost_node_can_explain_it() -> None:
    """If it were stored earlier, the next launcher would count it even if a node was lost."""
    undecided = (RUNNING, [crashed("m", 1), pod("w")])
    record = Record((RUNNING, HEALTHY), undecided, undecided, SUCCEEDED)
    assert follow(record, limited())[1] == "" and "vitdet/errors" not in record.annotations
    decided = (RUNNING, [crashed("m", 1), crashed("w", 1)])
    record = Record((RUNNING, HEALTHY), undecided, decided, SUCCEEDED)
    assert follow(record, limited())[1] == "" and record.annotations["vitdet/errors"] == "1"


def test_an_error_ends_the_job_only_when_no_lost_node_can_explain_it() -> None:
    deciding = (RUNNING, [crashed("m", 1), pod("w")])
    gone = (RUNNING, [crashed("m", 1), lost("w")])
    back = (RUNNING, [crashed("m", 1), named("w", "new")])
    record = Record((RUNNING, HEALTHY), deciding, deciding, gone, back, SUCCEEDED)
    assert follow(record, limited("0"))[1] == ""
    # Without a lost node, a second error of the same pod confirms the first, which ends the job.
    twice = (RUNNING, [crashed("m", 2), pod("w")])
    record = Record((RUNNING, HEALTHY), deciding, deciding, twice)
    lines, error = follow(record, limited("0"))
    assert "has failed (errors: 1, " in error and record.annotations["vitdet/errors"] == "1"
    assert not any("at most" in line for line in lines)


def test_errors_of_an_elastic_job_are_counted_while_it_waits_for_nodes() -> None:
    job = limited("2")
    job["spec"]["elasticPolicy"] = {"minReplicas": 1}
    looks = [(RUNNING, [crashed("m", times), unschedulable("w")]) for times in range(7)]
    assert "has failed (errors: 3, " in follow(Record(*looks), job)[1]


def test_failures_are_not_counted_while_another_pod_is_on_a_lost_node() -> None:
    deleted = pod("w")
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    for gone in (not_ready(True), deleted):
        looks = [[crashed("m", times), gone] for times in (0, *range(9))]
        assert counted(HEALTHY, *looks, step=700).errors == 0


def test_each_loss_of_a_flapping_node_is_a_disruption() -> None:
    looks = [HEALTHY]
    for number in range(1, 6):
        looks += [[crashed("m", number), peer] for peer in (not_ready(True), pod("w"))]
    found = counted(*looks, step=700)
    assert (found.errors, found.disruptions >= 5) == (0, True)


def test_pods_of_a_deleted_job_with_the_same_name_are_ignored() -> None:
    old = crashed("w", 1, 137, "OOMKilled")
    old["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    job = {"metadata": {**filled()["metadata"], "creationTimestamp": "2026-01-01T00:00:09Z"}}
    done = {**SUCCEEDED[0], **job}
    assert follow(Record(({**RUNNING, **job}, [old]), (done, [])))[1] == ""


@pytest.mark.parametrize(
    ("failed", "log", "advice"),
    [
        (crashed("w", 1, 137, "OOMKilled"), "step 5", "raise the memory limit of the pods"),
        (
            crashed("w", 1),
            "[rank3]:torch.OutOfMemoryError: CUDA out of memory.",
            "too many images for the GPU memory",
        ),
    ],
)
def test_running_out_of_memory_ends_the_job_and_suggests_settings(
    failed: dict, log: str, advice: str
) -> None:
    record = Record((RUNNING, HEALTHY), (RUNNING, [pod("m"), failed]))
    record.logs["w previous"] = [f"2026-01-01T00:00:00Z {log}"]
    _, error = follow(record, limited("100"))
    assert f"ran out of memory: {advice}" in error
    assert record.asked == ["create", "halt"]


def test_a_job_that_has_run_waits_for_a_lost_node_until_its_deadline() -> None:
    waiting = (RUNNING, [pod("m"), unschedulable("w")])
    record = Record((RUNNING, HEALTHY), *[waiting] * 50, (RUNNING, HEALTHY), SUCCEEDED)
    lines, error = follow(record)
    assert error == "" and record.annotations["vitdet/started"] == "true"
    (told,) = [line for line in lines if "Unschedulable" in line]
    assert "PyTorchJob vitdet-tiny-1 lost a pod; waiting for a replacement: pod w" in told
    # before all pods have run together, the limit is one hour (in these tests: 0.1 s)
    _, error = follow(Record((RUNNING, [pod("m"), unschedulable("w")])))
    assert "has not been able to start" in error
