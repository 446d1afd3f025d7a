"""The last log lines of every rank, including deleted pods, and the rank that failed first."""

from __future__ import annotations

from components.launcher.logs import MAX_PODS, TAIL, Line, RankLogs
from tests.cluster.test_following import RUNNING, Record, follow
from tests.cluster.test_launcher import conditions, ended, pod

SUMMARY = """============================================================
vitdet FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:09
  host      : w-0
  rank      : 3 (local_rank: 1)
  exitcode  : -9 (pid: 4711)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4711""".splitlines()


def stamped(second: float, *texts: str) -> list[Line]:
    return [Line(f"2026-01-01T00:00:{second:012.9f}", text) for text in texts]


def test_lines_are_split_by_rank_and_those_of_rank_0_are_shown() -> None:
    ranks = RankLogs()
    lines = stamped(1, "[rank0]:step 1", "[rank1]:quiet", "torchrun")
    assert ranks.add("m", lines, True) == ["step 1", "torchrun"]
    assert ranks.add("w", stamped(2, "[rank2]:other", "torchrun of w"), False) == []
    tails = {"rank 0": "step 1", "rank 1": "quiet", "rank 2": "other"}
    tails |= {"pod m": "torchrun", "pod w": "torchrun of w"}
    assert ranks.tails() == {name: [line] for name, line in tails.items()}


def test_the_last_lines_of_each_rank_are_kept_in_a_file() -> None:
    ranks = RankLogs()
    for number in range(TAIL + 50):
        ranks.add("m", stamped(1, f"[rank10]:line {number}", f"[rank9]:line {number}"), True)
    files = ranks.files()
    assert list(files) == ["rank-00009.log", "rank-00010.log"]
    lines = files["rank-00010.log"].splitlines()
    assert lines == [f"line {number}" for number in range(50, TAIL + 50)]
    assert list(ranks.tails()) == ["rank 9", "rank 10"]


def test_the_first_rank_to_fail_has_the_oldest_error() -> None:
    ranks = RankLogs()
    head = ["Traceback (most recent call last):", '  File "x.py"']
    lost, bad = [*head, "RuntimeError: no peer"], [*head, "ValueError: bad image 7.jpg"]
    ranks.add("m", stamped(9.2, *(f"[rank0]:{line}" for line in lost)), True)
    ranks.add("w", stamped(9.1, *(f"[rank3]:{line}" for line in bad)), False)
    ranks.add("w", stamped(9.3, "[rank2]:vitdet: the process group is gone"), False)
    found = ranks.first_failure()
    assert str(found) == "first to fail: rank 3 (pod w): ValueError: bad image 7.jpg"
    assert ranks.first_failure(since="2026-01-01T00:00:10") is None


def test_a_rank_ended_by_a_signal_precedes_the_ranks_that_lost_it() -> None:
    ranks = RankLogs()
    ranks.add("m", stamped(9.0, "[rank0]:vitdet: Connection closed by peer"), True)
    ranks.add("w-0", stamped(9.5, *SUMMARY), False)
    assert str(ranks.first_failure()) == "first to fail: rank 3 (pod w-0): ended by signal 9"


def test_a_rank_that_does_not_respond_is_named_by_another_rank() -> None:
    ranks = RankLogs()
    ranks.add("w", stamped(1, "[rank1]:step 1"), False)
    ranks.add("m", stamped(9, "[rank0]:vitdet: no progress: rank 1 (w, pid 7: step 5)"), True)
    text = "first to fail: rank 1 (pod w): vitdet: no progress"
    assert str(ranks.first_failure()).startswith(text)


def test_ranks_that_torchrun_ended_are_not_the_first_to_fail() -> None:
    ranks = RankLogs()
    ranks.add("w", stamped(9, *(line.replace(": -9", ": -15") for line in SUMMARY)), False)
    assert ranks.first_failure() is None


def test_lines_without_a_rank_prefix_are_kept_per_pod() -> None:
    ranks = RankLogs()
    assert ranks.add("m", stamped(1, "vitdet: no such file"), True) == ["vitdet: no such file"]
    assert str(ranks.first_failure()) == "first to fail: pod m: vitdet: no such file"


def test_replaced_pods_do_not_use_more_memory() -> None:
    ranks = RankLogs()
    for number in range(3 * MAX_PODS):
        ranks.add(f"w-{number}", stamped(1, "torchrun", "[rank1]:step"), False)
    assert len(ranks.files()) == MAX_PODS + 1
    assert f"pod-w-{3 * MAX_PODS - 1}.log" in ranks.files()


def test_a_failed_job_shows_every_rank_including_deleted_pods() -> None:
    worker = pod("w", container=ended(1, key="lastState"))
    worker["metadata"]["labels"] = {"training.kubeflow.org/replica-type": "worker"}
    failed = pod("m", "Failed", container=ended(1, when="2026-01-01T00:00:20Z"))
    looks = ((RUNNING, [pod("m"), worker]), (RUNNING, [pod("m")]))
    record = Record(*looks, (conditions("Failed=True"), [failed]))
    time = "2026-01-01T00:00:09"
    record.logs["w"] = [f"{time}.1Z [rank1]:vitdet: bad image 7.jpg", f"{time}.2Z [rank1]:bye"]
    record.logs["m"] = [f"{time}.3Z [rank0]:vitdet: lost rank 1", f"{time}.4Z Root Cause"]
    lines, error = follow(record)
    assert "\nfirst to fail: rank 1 (pod w): vitdet: bad image 7.jpg\ncause: pod " in error
    head = "launcher: last lines of"
    assert lines[lines.index(f"{head} rank 0:") :] == [
        *(f"{head} rank 0:", "  vitdet: lost rank 1"),
        *(f"{head} rank 1:", "  vitdet: bad image 7.jpg", "  bye"),
        *(f"{head} pod m:", "  Root Cause"),
    ]
