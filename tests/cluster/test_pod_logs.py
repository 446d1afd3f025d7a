"""Container logs across restarts: order of lines, and lines held back until missing ones arrive."""

from __future__ import annotations

import pytest

from components.launcher import logs
from components.launcher.logs import PodLog
from tests.cluster.conftest import Clock
from tests.cluster.test_following import DONE, RUNNING, Record, follow, unschedulable
from tests.cluster.test_launcher import conditions, ended, pod


def test_each_log_line_is_returned_once_across_restarts() -> None:
    record = Record((RUNNING, []))
    log, alive = PodLog(record, "pytorch"), pod(container={"state": {"running": {}}})
    # Go omits the trailing zeros of a time
    stamps = [
        "2026-01-01T00:00:00.999999999Z a",
        "2026-01-01T00:00:01Z b",
        "2026-01-01T00:00:01.1Z c",
        "2026-01-01T00:00:01.12Z d",
    ]
    record.logs["w-0"] = stamps[:3]
    assert texts(log.new_lines(alive)) == ["a", "b", "c"] and log.new_lines(alive) == []
    record.logs = {"w-0": ["2026-01-01T00:00:02Z again"], "w-0 previous": stamps}
    again = pod(container={"state": {"running": {}}, "restartCount": 1})
    assert texts(log.new_lines(again)) == ["d", "again"] and log.new_lines(again) == []


def test_the_time_zone_of_a_node_does_not_change_the_order_of_lines() -> None:
    record = Record((RUNNING, []))
    record.logs["w-0"] = [
        "2026-01-01T07:59:59.999999998+08:00 a",
        "2026-01-01T07:59:59.999999999+08:00 b",
        "2025-12-31T19:00:00-05:00 c",
    ]
    lines = PodLog(record, "pytorch").new_lines(pod(container={"state": {"running": {}}}))
    assert texts(lines) == ["a", "b", "c"]
    assert [lines[0].time[:19], lines[2].time[:19]] == [
        "2025-12-31T23:59:59",
        "2026-01-01T00:00:00",
    ]


def restarted(times: int, state: str = "running") -> dict:
    return pod(container={"state": {state: {}}, "restartCount": times})


def test_the_end_of_a_previous_log_is_requested_until_it_is_available(clock: Clock) -> None:
    record = Record((RUNNING, []))
    log = PodLog(record, "pytorch")
    record.logs["w-0"] = ["2026-01-01T00:00:01Z a"]
    assert texts(log.new_lines(restarted(0))) == ["a"]
    record.logs["w-0"] = ["2026-01-01T00:00:03Z c"]  # the request for the previous log fails
    assert log.new_lines(restarted(1)) == []
    record.logs["w-0 previous"] = ["2026-01-01T00:00:02Z b"]
    assert texts(log.new_lines(restarted(1))) == ["b", "c"]
    # without the previous log, the lines of the new container are held back, but only for a limited time
    record.logs = {"w-0": ["2026-01-01T00:00:04Z d"]}
    assert [log.new_lines(restarted(2)) for _ in range(10)] == [[]] * 10
    clock.sleep(logs.HOLD_SECONDS)
    assert texts(log.new_lines(restarted(2))) == ["d"]
    # the time starts again with the next restart
    record.logs = {"w-0": ["2026-01-01T00:00:05Z e"]}
    assert log.new_lines(restarted(3)) == []


@pytest.mark.parametrize("state", ["terminated", "waiting", "deleted", "final"])
def test_the_last_lines_of_a_container_are_not_held_back(state: str) -> None:
    record = Record((RUNNING, []))
    log = PodLog(record, "pytorch")
    record.logs["w-0"] = ["2026-01-01T00:00:01Z a"]
    log.new_lines(restarted(0))
    record.logs["w-0"] = ["2026-01-01T00:00:03Z c"]
    assert log.new_lines(restarted(1)) == []
    last = restarted(1, state if state in ("terminated", "waiting") else "running")
    if state == "deleted":
        last["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:04Z"
    assert texts(log.new_lines(last, final=state == "final")) == ["c"]


@pytest.mark.parametrize("end", ["succeeded", "failed", "gone", "given up", "out of memory"])
def test_lines_held_back_at_the_end_of_the_job_are_returned(end: str) -> None:
    """Lines of a running container are held back while its previous log cannot be read."""
    again, failed = restarted(1), pod("w", container=ended(137, "OOMKilled", key="lastState"))
    last = {
        "succeeded": [(DONE, [again])],
        "failed": [(conditions("Failed=True"), [again])],
        "gone": [(RUNNING, [again]), (None, [])],
        "given up": [(RUNNING, [again, unschedulable("w")])],
        "out of memory": [(RUNNING, [again, failed])],
    }[end]
    record = Record((RUNNING, [restarted(0)]), *last)
    record.logs["w-0"] = ["2026-01-01T00:00:01Z [rank0]:step 1"]
    ask = record.pods

    def pods() -> tuple[list[dict], str]:
        found = ask()
        if found[0][0] is again:
            record.logs["w-0"] = ["2026-01-01T00:00:03Z [rank0]:vitdet: no such image"]
        return found

    record.pods = pods
    lines, error = follow(record)
    assert lines.count("vitdet: no such image") == 1 and bool(error) == (end != "succeeded")
    if end == "out of memory":
        assert "first to fail: rank 0 (pod w-0): vitdet: no such image" in error


def texts(lines: list[logs.Line]) -> list[str]:
    return [line.text for line in lines]
