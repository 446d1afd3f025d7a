"""Training: bitwise equal after any interruption; invalid setups are rejected before the start."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS, Recorder, environment, minimal
from tests.helpers.runs import (
    MEASURED,
    cut_at,
    figures,
    go,
    interrupt,
    refused,
    same_bits,
    same_weights,
    state_names,
    stop_at,
    terminate,
)
from vitdet import distributed
from vitdet.config import load_config
from vitdet.training import Stopped, train
from vitdet.training.stop import stop_signals
from vitdet.training.watchdog import Watchdog


@pytest.mark.slow
def test_sigterm_at_any_step_loses_no_step(tiny: Path, trained: Path, tmp_path: Path) -> None:
    at = sorted(random.sample(range(1, STEPS), 2))
    recorders = []
    for step in at:
        recorders.append(stop_at(step, tiny, tmp_path))
        assert recorders[-1].status == "KILLED" and not (tmp_path / "model.pt").exists()
    recorders.append(go(tiny, tmp_path))
    same_bits(tmp_path, trained)
    found: dict[int, dict[str, float]] = {}
    for recorder in recorders:
        for step, values in recorder.points.items():
            # each point once, none lost: a pending evaluation belongs to the next run
            assert not values.keys() & found.get(step, {}).keys() - MEASURED, at
            found.setdefault(step, {}).update(values)
    assert list(found) == list(range(1, STEPS + 1)), at
    assert figures(found) == figures(json.loads((trained / "points.json").read_text()))


def test_a_kill_at_any_step_repeats_steps_with_equal_results(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    at = random.randrange(1, STEPS + 1)
    cut_at(at, tiny, tmp_path)
    saved = max(step for step in (0, 3, 4, 6) if step < at)  # save_every=3, eval_every=4
    assert min(go(tiny, tmp_path).points) == saved + 1, at
    same_bits(tmp_path, trained)


def test_sigterm_before_the_first_step_or_after_an_evaluation_loses_nothing(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    def early(*_: object) -> Recorder:
        terminate()
        return Recorder()

    with pytest.raises(Stopped, match="stopped at step 0 "):
        train(load_config("tiny", minimal(tiny)), tmp_path, start_tracking=early)
    assert state_names(tmp_path) == ["step_00000000.pt"]
    stop_at(4, tiny, tmp_path, "box_ap")
    rest = go(tiny, tmp_path, interrupt(terminate, STEPS, "box_ap"))  # completes despite SIGTERM
    assert min(rest.points) == 5  # a completed evaluation is not repeated
    same_bits(tmp_path, trained)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_model_missing_after_a_kill_is_written(tiny: Path, trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    (output / "model.pt").unlink()
    assert go(tiny, output).points == {}
    same_bits(output, trained)


@pytest.mark.slow
def test_means_of_several_steps_survive_a_stop(tiny: Path, tmp_path: Path) -> None:
    settings = {"train__log_every": 7, "train__save_every": 2, "train__eval_every": 4}
    whole = go(tiny, tmp_path / "whole", **settings)
    cut_at(4, tiny, tmp_path / "cut", "box_ap", **settings)
    rest = go(tiny, tmp_path / "cut", **settings)
    assert figures(rest.points)[7] == figures(whole.points)[7]


def test_states_outside_the_output_survive_its_removal(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    """DVC removes a stage's outputs before it runs the stage."""
    output, states = tmp_path / "out", tmp_path / "states"
    stop_at(5, tiny, output, states=states)
    shutil.rmtree(output)
    stop_at(1, tiny, output, states=states, optim__lr=1e-4)  # other settings use other states
    shutil.rmtree(output)
    assert min(go(tiny, output, states=states).points) == 6
    same_weights(output, trained)
    assert len(list(states.iterdir())) == 2


def test_an_output_with_another_config_is_refused(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    with refused(r"finished run with a different config \(optim.lr: 0.1, not 0.001; train.keep"):
        go(tiny, trained, optim__lr=0.1, train__keep=1)
    cut_at(1, tiny, tmp_path)  # even if the other run has just started
    before = (tmp_path / "config.yaml").read_text()
    with refused(r"contains a run with a different config \(optim.lr: 0.1, not 0.001\)"):
        go(tiny, tmp_path, optim__lr=0.1)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_data_set_that_changed_is_refused(own_tiny: Path, tmp_path: Path) -> None:
    cut_at(1, own_tiny, tmp_path / "run")
    path = own_tiny / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    with refused("the data set has changed since this run started"):
        go(own_tiny, tmp_path / "run")


def test_the_number_of_classes_must_match_the_data(own_tiny: Path, tmp_path: Path) -> None:
    with refused("has 6 classes, but model.roi_heads.num_classes is 80; set it to 6"):
        go(own_tiny, tmp_path / "run", model__roi_heads__num_classes=80)
    path = own_tiny / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace('"star"', '"sun"'))
    with refused(r"train and val have different classes \(not in both: star, sun\)"):
        go(own_tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_indivisible_batch_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, value])
    with refused(r"train.batch_size must be a multiple of 2 \(the number of processes\), got 3"):
        go(tiny, tmp_path / "run", train__batch_size=3)
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_and_keeps_a_finite_state(tiny: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    changes = {"optim__lr": 1e18, "optim__clip": 0, "train__log_every": 100, "train__save_every": 1}
    with refused(r"training has diverged \(not finite: .*\); try a smaller optim.lr"):
        go(tiny, tmp_path, recorder, **changes)
    assert recorder.status == "FAILED" and recorder.points == {}
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values()), path


@pytest.mark.slow
def test_only_one_run_at_a_time_writes_to_a_folder(tiny: Path, tmp_path: Path) -> None:
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
    with refused("another training run is writing to this folder"):
        go(tiny, tmp_path)
    other.kill()
    other.communicate()
    go(tiny, tmp_path, optim__steps=1, data__workers=1)


def test_a_process_whose_torchrun_died_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_signals() as stop:
        watchdog = Watchdog(stop)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        watchdog._watch_parent(0.0)
        assert not stop.received  # without torchrun, the process may outlive its shell
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun does")
        watchdog._watch_parent(0.0)
        assert stop.received == signal.SIGTERM
