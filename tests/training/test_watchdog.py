"""Ranks that hang or never join, and processes that torchrun leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import STEPS
from tests.helpers.ranks import UNTRACKED, processes_of, start_ranks
from tests.helpers.runs import go
from vitdet import distributed
from vitdet.checkpoint import load_model_file
from vitdet.training import trainer, watchdog
from vitdet.training.stop import Stop
from vitdet.training.watchdog import LIMIT, LONG, Beat, Stage, Watchdog, stalled

LATE = LIMIT + 1


def beat(step: int, stage: Stage, age: float, limit: float = LIMIT, **more: object) -> Beat:
    return Beat(step, stage, age, limit, **more)


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        # the other ranks wait in the backward pass for a slow rank
        ([beat(7, Stage.EXCHANGING, LATE), beat(7, Stage.COMPUTING, LATE)], [1]),
        ([beat(7, Stage.EXCHANGING, LATE), beat(6, Stage.SAVING, LATE)], [1]),
        ([beat(7, Stage.EXCHANGING, LATE), beat(7, Stage.LOADING, LIMIT - 1)], []),
        # rank 0 compares the detections of LVIS while the others wait
        ([beat(7, Stage.COMPARING, LATE, LONG), beat(7, Stage.WAITING, LATE, LONG)], []),
        ([beat(7, Stage.COMPARING, LONG + 1, LONG), beat(7, Stage.WAITING, LONG + 1, LONG)], [0]),
        # one rank has more images
        ([beat(7, Stage.EVALUATING, 1), beat(7, Stage.WAITING, LATE, LONG)], []),
        # all ranks at one place: a deadlock when even the last rank exceeds the limit
        ([beat(7, Stage.EXCHANGING, LATE), beat(7, Stage.EXCHANGING, LATE)], [0, 1]),
        ([beat(7, Stage.EXCHANGING, LATE), beat(7, Stage.EXCHANGING, 1)], []),
        # a stopped rank or a lost node, at any place
        ([beat(7, Stage.EXCHANGING, 1), beat(7, Stage.SAVING, 1, LONG, silent=LATE)], [1]),
        ([beat(7, Stage.EXCHANGING, 1), beat(8, Stage.WAITING, 1, LONG, silent=LATE)], [1]),
        # the rank has ended successfully
        ([beat(8, Stage.FINISHING, 1), beat(7, Stage.WAITING, 1, silent=LATE, done=True)], []),
        ([beat(8, Stage.WAITING, 1, silent=LATE, done=True)], []),
    ],
)
def test_the_rank_that_the_others_wait_for_is_found(beats: list[Beat], expected: list[int]) -> None:
    assert stalled(dict(enumerate(beats))) == expected


def test_slow_steps_and_batches_raise_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watched = Watchdog(Stop())

    def at(step: int, stage: Stage, seconds: float, limit: float = 0.0) -> float:
        watched.at(step, stage, limit)
        clock[0] += seconds
        assert watched.beat().age == seconds
        return watched.beat().limit

    assert at(1, Stage.LOADING, 1, LONG) == at(1, Stage.COMPUTING, 899, LONG) == LONG
    assert at(1, Stage.SAVING, 50, LONG) == LONG
    assert at(2, Stage.LOADING, 5) == at(2, Stage.EXCHANGING, 195) == 3 * 900
    assert at(3, Stage.LOADING, 1) == at(3, Stage.COMPUTING, 1) == 3 * 200
    assert at(4, Stage.LOADING, 1) == LIMIT
    assert at(4, Stage.EVALUATING, 60, LONG) == LONG
    assert at(4, Stage.EVALUATING, 100) == LIMIT
    assert at(4, Stage.EVALUATING, 1) == 300


def test_a_slow_step_raises_the_limit_of_the_next_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    begin = float(int(time.monotonic()))  # begin + 1000 - begin is then exactly 1000
    record, load = Watchdog.at, trainer.TrainingStep.run

    def at(self: Watchdog, step: int, stage: Stage, limit: float = 0.0) -> None:
        record(self, step, stage, limit)
        if (step, stage) == (3, Stage.COMPUTING):
            limits.append(self.beat().limit)

    def slow(self: trainer.TrainingStep, step: int, *given: Callable) -> object:
        done = load(self, step, *given)
        if step == 1:
            monkeypatch.setattr(watchdog.time, "monotonic", lambda: begin + 1000)
        return done

    monkeypatch.setattr(Watchdog, "at", at)
    monkeypatch.setattr(trainer.TrainingStep, "run", slow)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: begin)
    go(tiny, tmp_path, optim__steps=3, train__eval_every=3, train__save_every=3, data__workers=0)
    assert limits == [3000]


def test_a_rank_in_a_collective_is_reported_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watchdog(Stop())
    watched.at(3, Stage.EVALUATING)
    with distributed._waiting("barrier"):
        inside = watched.beat()
    assert (inside.stage, inside.limit) == (Stage.WAITING, LONG) and "in a barrier" in str(inside)
    assert watched.beat().stage == Stage.EVALUATING


ASLEEP = f"""
{UNTRACKED}
from vitdet.training import step, watchdog
watchdog.LIMIT, watchdog.INTERVAL = 6.0, 1.0
run = step.TrainingStep.run
def run_once_asleep(self, number, load, at):
    def asleep():
        at(step.Stage.LOADING)
        if (number, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (4, "1", "0"):
            time.sleep(1000)
        return load()
    return run(self, number, asleep, at)
step.TrainingStep.run = run_once_asleep
"""


@pytest.mark.slow
def test_a_hanging_rank_is_reported_with_all_stacks_and_restarted(
    tiny: Path, tmp_path: Path
) -> None:
    process = start_ranks(ASLEEP, tiny, tmp_path, "--max-restarts=1")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert len(re.findall(r"^vitdet: no progress: rank 1 \(.*step 5, loading for", log, re.M)) == 1
    assert re.search(r"^rank 0: .*step 5, exchanging for", log, re.M)
    assert re.search(r"\[rank1\]:   File .*line \d+ in asleep", log)
    assert re.search(r'\[rank0\]:   File .*step.py", line \d+ in forward_backward', log)
    assert f"resuming from step 4 of {STEPS}" in log
    assert load_model_file(tmp_path / "run" / "model.pt")["step"] == STEPS


ABSENT = """
from datetime import timedelta
from vitdet import distributed
distributed.JOIN_TIMEOUT = timedelta(seconds=5)
if os.environ["RANK"] == "1":
    time.sleep(1000)
"""


@pytest.mark.slow
def test_a_rank_that_does_not_join_is_named(tiny: Path, tmp_path: Path) -> None:
    process = start_ranks(ABSENT, tiny, tmp_path)
    assert process.wait(120) == 1
    log = (tmp_path / "log").read_text()
    assert "vitdet: rank 1 of 2 did not join within 5 seconds; see its log\n" in log
    assert 'patched.py", line' not in log  # no traceback in the log


@pytest.mark.slow
def test_no_rank_outlives_a_torchrun_that_was_killed(tiny: Path, tmp_path: Path) -> None:
    """The kill may come while the ranks import torch, join, build the model, or train."""
    for seconds in (0, 0.1, 1, 4):
        process = start_ranks("", tiny, tmp_path, optim__steps=10_000, data__workers=1)
        begin = time.monotonic()
        while len(processes_of(tmp_path)) < 3:  # torchrun and two ranks
            assert process.poll() is None and time.monotonic() < begin + 60
            time.sleep(0.01)
        time.sleep(seconds)
        left = set(processes_of(tmp_path)) - {process.pid}
        process.kill()
        process.wait()
        end = time.monotonic() + 120
        while left and time.monotonic() < end:
            left &= set(processes_of(tmp_path))
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"{seconds} s after their start:\n{(tmp_path / 'log').read_text()}"


def test_the_collectives_in_flight_are_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.flight_record() == ""
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda: "cpu:gloo")
    assert distributed.flight_record() == ""
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    record = distributed.flight_record()
    assert "version" in json.loads(record) or record.startswith("not available")


def test_a_hanging_rank_is_reported_within_five_minutes() -> None:
    assert watchdog.LIMIT + 2 * watchdog.INTERVAL + watchdog.ANSWER < 300
    join, collective = distributed.JOIN_TIMEOUT, distributed.COLLECTIVE_TIMEOUT
    assert join.total_seconds() <= 300 < collective.total_seconds()
