"""Training: bitwise equal after any interruption; invalid setups are rejected before the start."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS, Recorder, environment, minimal
from vitdet import distributed
from vitdet.checkpoint import load_model_file
from vitdet.config import load_config
from vitdet.training import Stopped, train
from vitdet.training.stop import stop_signals
from vitdet.training.watchdog import Watchdog

MEASURED = {"images_per_second", "data_wait_seconds", "memory_gb"}


def same_bits(path: Path, trained: Path) -> None:
    """Both are finished trainings with equal weights, AP and place in the stream."""
    ours, theirs = load_model_file(path / "model.pt"), load_model_file(trained / "model.pt")
    assert ours["model"].keys() == theirs["model"].keys()
    different = [
        name
        for name, tensor in ours["model"].items()
        if not torch.equal(tensor, theirs["model"][name])
    ]
    assert not different
    assert all(
        ours[key] == theirs[key]
        for key in ("config", "class_names", "metrics", "step", "fingerprints")
    )
    states = [sorted((folder / "checkpoints").glob("*.pt"))[-1] for folder in (path, trained)]
    ours, theirs = (torch.load(state, weights_only=True) for state in states)
    for part in ("model", "average"):
        assert all(torch.equal(tensor, theirs[part][name]) for name, tensor in ours[part].items())
    for number, slot in ours["optimizer"]["state"].items():
        assert all(
            torch.equal(value, theirs["optimizer"]["state"][number][key])
            for key, value in slot.items()
        )


def figures(points: dict) -> dict[int, dict[str, float]]:
    """The points that depend on the training alone."""
    return {
        int(step): {key: value for key, value in values.items() if key not in MEASURED}
        for step, values in points.items()
    }


def go(tiny: Path, output: Path, recorder: Recorder | None = None, **changes: object) -> Recorder:
    recorder = recorder or Recorder()
    train(load_config("tiny", minimal(tiny, **changes)), output, start_tracking=lambda *_: recorder)
    return recorder


def interrupt(what: Callable[[], None], at: int, key: str = "loss") -> Recorder:
    """A tracker that interrupts the training when it hears of this key at this step."""
    return Recorder(lambda values, step: what() if step == at and key in values else None)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def cut() -> None:
    raise KeyboardInterrupt  # like SIGKILL: nothing is saved any more


@pytest.mark.slow
def test_sigterm_at_any_step_loses_nothing(tiny: Path, trained: Path, tmp_path: Path) -> None:
    at = sorted(random.sample(range(1, STEPS), 2))
    recorders = []
    for step in at:
        recorders.append(interrupt(terminate, step))
        with pytest.raises(Stopped, match=f"stopped at step {step} of {STEPS}"):
            go(tiny, tmp_path, recorders[-1])
        assert recorders[-1].status == "KILLED" and not (tmp_path / "model.pt").exists()
    recorders.append(go(tiny, tmp_path))
    same_bits(tmp_path, trained)
    found: dict[int, dict[str, float]] = {}
    for recorder in recorders:
        for step, values in recorder.points.items():
            # each once, none lost: an evaluation that was due belongs to the next run
            assert not values.keys() & found.get(step, {}).keys() - MEASURED, at
            found.setdefault(step, {}).update(values)
    assert list(found) == list(range(1, STEPS + 1)), at
    assert figures(found) == figures(json.loads((trained / "points.json").read_text()))


def test_a_cut_at_any_step_loses_nothing_but_time(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    at = random.randrange(1, STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, interrupt(cut, at))
    recorder = go(tiny, tmp_path)
    saved = max(step for step in (0, 3, 4, 6) if step < at)  # save_every=3, and eval_every=4
    assert min(recorder.points) == saved + 1, at
    same_bits(tmp_path, trained)


def test_sigterm_before_the_first_step_and_during_an_evaluation(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    def early(*_: object) -> Recorder:
        terminate()
        return Recorder()

    with pytest.raises(Stopped, match="stopped at step 0 "):
        train(load_config("tiny", minimal(tiny)), tmp_path, start_tracking=early)
    assert [one.name for one in (tmp_path / "checkpoints").glob("*.pt")] == ["step_00000000.pt"]
    with pytest.raises(Stopped, match="stopped at step 4 "):
        go(tiny, tmp_path, interrupt(terminate, 4, "box_ap"))
    go(tiny, tmp_path, interrupt(terminate, STEPS, "box_ap"))  # it is done anyway
    same_bits(tmp_path, trained)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_cut_before_the_model_is_written(tiny: Path, trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    (output / "model.pt").unlink()
    assert go(tiny, output).points == {}
    same_bits(output, trained)


@pytest.mark.slow
def test_means_of_several_steps_survive_a_stop(tiny: Path, tmp_path: Path) -> None:
    settings = {"train__log_every": 7, "train__save_every": 2, "train__eval_every": 4}
    whole = go(tiny, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path / "cut", interrupt(cut, 4, "box_ap"), **settings)
    rest = go(tiny, tmp_path / "cut", **settings)
    assert figures(rest.points)[7] == figures(whole.points)[7]


def test_states_outside_of_the_output_survive_its_removal(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    """DVC removes a stage's outs before it runs the stage."""

    def run(recorder: Recorder, **changes: object) -> None:
        train(
            load_config("tiny", minimal(tiny, **changes)),
            tmp_path / "out",
            checkpoints=tmp_path / "states",
            start_tracking=lambda *_: recorder,
        )

    with pytest.raises(Stopped):
        run(interrupt(terminate, 5))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Stopped, match="stopped at step 1 "):  # other settings have their own states
        run(interrupt(terminate, 1), optim__lr=1e-4)
    shutil.rmtree(tmp_path / "out")
    rest = Recorder()
    run(rest)
    assert min(rest.points) == 6
    ours, theirs = (
        load_model_file(tmp_path / "out" / "model.pt"),
        load_model_file(trained / "model.pt"),
    )
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_an_output_with_another_config_is_refused(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"finished run with another config \(optim.lr: 0.1, not 0.001; train.keep"
    ):
        go(tiny, trained, optim__lr=0.1, train__keep=1)
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, interrupt(cut, 1))  # also when it has only begun
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(
        ValueError, match=r"holds a run with another config \(optim.lr: 0.1, not 0.001\)"
    ):
        go(tiny, tmp_path, optim__lr=0.1)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_data_set_that_changed_is_refused(own_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(own_tiny, tmp_path / "run", interrupt(cut, 1))
    path = own_tiny / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the data set has changed since this run began"):
        go(own_tiny, tmp_path / "run")


def test_classes_must_fit(own_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has 6 classes, but model.roi_heads.num_classes is 80; set it to 6"
    ):
        go(own_tiny, tmp_path / "run", model__roi_heads__num_classes=80)
    path = own_tiny / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace('"star"', '"sun"'))
    with pytest.raises(ValueError, match=r"train and val have different classes \(star, sun\)"):
        go(own_tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda one: [one, one])
    with pytest.raises(
        ValueError, match="train.batch_size must be a multiple of the 2 processes, got 3"
    ):
        go(tiny, tmp_path / "run", train__batch_size=3)
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_stops_and_keeps_a_sound_state(tiny: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(
        ValueError, match="not finite: the training has diverged; try a smaller optim.lr"
    ) as caught:
        go(
            tiny,
            tmp_path,
            recorder,
            optim__lr=1e18,
            optim__clip=0,
            train__log_every=100,
            train__save_every=1,
        )
    assert "\n" not in str(caught.value) and recorder.status == "FAILED" and recorder.points == {}
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values()), path


@pytest.mark.slow
def test_one_training_at_a_time_writes_to_a_folder(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vitdet.checkpoint import Checkpoints\n"
        "with Checkpoints(Path(sys.argv[1]), 1).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "checkpoints")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="another training is writing here"):
        go(tiny, tmp_path)
    other.kill()
    other.communicate()
    go(tiny, tmp_path, optim__steps=1, data__workers=1)


def test_a_process_whose_torchrun_died_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_signals() as stop:
        watchdog = Watchdog(stop)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        watchdog._watch_parent(0.0)
        assert not stop.received  # alone, it may outlive the shell that started it
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun does")
        watchdog._watch_parent(0.0)
        assert stop.received == signal.SIGTERM
