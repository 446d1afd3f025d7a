"""Stop signals: at any time, the state is saved and training can be resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS, Recorder, minimal, options
from tests.helpers.ranks import UNTRACKED, start_ranks, wait_for_log
from tests.helpers.runs import go, interrupt, same_bits, state_names, terminate
from vitdet import distributed
from vitdet.evaluation import detections
from vitdet.tracking import runs
from vitdet.training import Stopped, initial, trainer
from vitdet.training.stop import stop_signals, warn_of_short_grace

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_each_signal_saves_a_state_and_has_its_exit_code(
    tiny: Path,
    tmp_path: Path,
    vitdet: Run,
    monkeypatch: pytest.MonkeyPatch,
    ctrl_c: None,
    request: pytest.FixtureRequest,
    signum: int,
    code: int,
) -> None:
    recorder = interrupt(lambda: os.kill(os.getpid(), signum), 2)
    monkeypatch.setattr(runs, "start_tracker", lambda *_: recorder)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, hang_up))
    done, _, errors = vitdet("train", "tiny", *options(minimal(tiny)), "--output", "run")
    assert done == code
    assert f"vitdet: stopped at step 2 of {STEPS}; run the same command to resume" in errors
    assert state_names(tmp_path / "run")[-1] == "step_00000002.pt" and recorder.status == "KILLED"


def test_a_second_ctrl_c_ends_at_once(ctrl_c: None) -> None:
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_process_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nohup, SIGHUP is ignored, but signals that torchrun forwards are handled."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun does")
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step", [4, STEPS])
def test_an_evaluation_stops_between_batches_and_is_repeated(
    tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    convert, batches = detections.batch_to_results, []

    def signalled(*given: object) -> list[list[dict]]:
        batches.append(given)
        if len(batches) == (1 if step == 4 else 3):  # 2 batches of 2 images
            terminate()
        return convert(*given)

    monkeypatch.setattr(detections, "batch_to_results", signalled)
    recorder = Recorder()
    with pytest.raises(Stopped, match=f"stopped at step {step} of {STEPS}"):
        go(tiny, tmp_path, recorder)
    assert len(batches) == (1 if step == 4 else 3) and "box_ap" not in recorder.points[step]
    assert state_names(tmp_path)[-1] == f"step_{step:08d}.pt"
    rest = go(tiny, tmp_path)
    assert min(rest.points) == step and "box_ap" in rest.points[step]
    same_bits(tmp_path, trained)


@pytest.mark.parametrize("place", ["read_split", "build_detector"])
def test_a_signal_before_the_first_step_stops_at_step_0(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def signalled(*given: object, **named: object) -> object:
        terminate()
        return whole(*given, **named)

    module = trainer if place == "read_split" else initial
    whole = getattr(module, place)
    monkeypatch.setattr(module, place, signalled)
    recorder = Recorder()
    with pytest.raises(Stopped, match="stopped at step 0 "):
        go(tiny, tmp_path, recorder)
    assert not recorder.points
    # before a detector exists, nothing is saved
    assert state_names(tmp_path) == ([] if place == "read_split" else ["step_00000000.pt"])
    monkeypatch.undo()
    assert min(go(tiny, tmp_path, optim__steps=1).points) == 1


def test_a_signal_while_a_state_is_saved_leaves_complete_states(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.save

    def slow(content: dict, file: object) -> None:
        if content.get("step") == 3:
            terminate()
            time.sleep(0.3)
        write(content, file)

    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(Stopped) as caught:
        go(tiny, tmp_path)
    last = state_names(tmp_path)[-1]
    assert last in ("step_00000003.pt", "step_00000004.pt")
    assert f"step {int(last[5:13])} of" in str(caught.value)
    assert not list((tmp_path / "checkpoints").glob(".step*"))


def test_a_torch_version_without_the_shutdown_timeout_causes_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distributed, "has_shutdown_timeout", lambda: False)
    warn_of_short_grace()  # no warning: without torchrun, nothing kills the process
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun does")
    for rank in (1, 0):
        assert not caplog.text
        monkeypatch.setenv("RANK", str(rank))
        warn_of_short_grace()
    assert "30 s after SIGTERM, regardless of TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in caplog.text


SLOW = f"""
{UNTRACKED}
from vitdet.training import trainer
learn = trainer.Loop.train_step
def slow(*given):
    time.sleep(3)
    return learn(*given)
trainer.Loop.train_step = slow
"""


@pytest.mark.slow
def test_two_ranks_with_slow_steps_stop_at_the_same_step(tiny: Path, tmp_path: Path) -> None:
    settings = {"optim__steps": 100, "train__eval_every": 100, "train__save_every": 100}
    process = start_ranks(SLOW, tiny, tmp_path, **settings)
    try:
        wait_for_log(tmp_path, "step 2/100", process)
        begin = time.time()
        process.terminate()
        assert process.wait(120) != 0
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    last = int(state_names(tmp_path / "run")[-1][5:13])
    assert last in (3, 4) and not (tmp_path / "run" / "model.pt").exists()
    assert log.count(f"vitdet: stopped at step {last} of 100; run the same command") == 2
    saved = (tmp_path / "run" / "checkpoints" / f"step_{last:08d}.pt").stat().st_mtime
    print(f"saved {saved - begin:.1f} s after SIGTERM, steps of 3 s")


ONE = f"""
{UNTRACKED}
import signal
from vitdet.evaluation import detections
convert = detections.batch_to_results
def signalled(*given):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return convert(*given)
detections.batch_to_results = signalled
"""


@pytest.mark.slow
def test_all_ranks_stop_an_evaluation_if_one_rank_receives_the_signal(
    tiny: Path, tmp_path: Path
) -> None:
    """Only the rank on a drained node receives the signal."""
    process = start_ranks(ONE, tiny, tmp_path, evaluate__batch_size=1)
    try:
        assert process.wait(120) != 0
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    assert log.count(f"vitdet: stopped at step 4 of {STEPS}; run the same command") == 2, log
    assert state_names(tmp_path / "run")[-1] == "step_00000004.pt" and "box AP" not in log
