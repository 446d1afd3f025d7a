"""Settings that a resumed training run may change, and its states folder."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.conftest import STEPS, minimal
from tests.helpers.runs import cut_at, go, read_state, refused, same_bits, same_weights, stop_at
from tests.weights.test_old_checkpoints import STORED, dataset_digest
from vitdet.checkpoint import STATE_1, STATE_2, STATE_3, load_model_file
from vitdet.config import load_config
from vitdet.config.digest import legacy_digest
from vitdet.evaluation import evaluate
from vitdet.training import trainer

CONSTANT = {"optim__milestones": "[]", "train__keep": 9}


@pytest.fixture(scope="module")
def stopped_at_7(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The read-only folder of a run that was stopped at step 7."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_at(7, tiny, folder)
    return folder


@pytest.fixture
def stopped(stopped_at_7: Path, tmp_path: Path) -> Path:
    """A copy of `stopped_at_7` in tmp_path/run."""
    return Path(shutil.copytree(stopped_at_7, tmp_path / "run"))


@pytest.fixture(scope="module")
def constant(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The read-only folder of a complete run with constant learning rate and all its states."""
    folder = tmp_path_factory.mktemp("constant")
    go(tiny, folder, **CONSTANT)
    return folder


def test_operational_settings_may_change_and_are_logged(
    tiny: Path, trained: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    changes = {
        "data__workers": 1,
        "train__log_every": 2,
        "train__eval_every": 5,
        "train__save_every": 100,
        "train__keep": 3,
        "evaluate__score_threshold": 0.1,
        "evaluate__nms_iou": 0.6,
        "evaluate__max_detections": 3,
        "evaluate__batch_size": 1,
        "tracking__experiment": "other",
    }
    with caplog.at_level(logging.INFO, "vitdet"):
        recorder = go(moved, stopped, **changes)
    lines = [message for message in caplog.messages if "changed settings" in message]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert f"data.root: {moved}, not {tiny}" in lines[0]
    for key in changes:
        assert key.replace("__", ".") in lines[0]
    assert min(recorder.points) == 8
    same_weights(stopped, trained)
    assert load_config(stopped / "config.yaml") == load_config("tiny", minimal(moved, **changes))
    assert load_model_file(stopped / "model.pt")["config"]["evaluate"]["max_detections"] == 3


# early: the first milestone (85%) moves from step 7 to step 10; ended: the run is complete
@pytest.mark.parametrize(("stop", "changes"), [(4, {}), (8, CONSTANT)], ids=["early", "ended"])
def test_a_run_extended_to_more_steps_equals_a_run_started_with_them(
    tiny: Path, constant: Path, tmp_path: Path, stop: int, changes: dict
) -> None:
    more = {**changes, "optim__steps": 12}
    if stop < STEPS:
        stop_at(stop, tiny, tmp_path / "run", **changes)
    else:
        shutil.copytree(constant, tmp_path / "run")
    recorder = go(tiny, tmp_path / "run", **more)
    assert min(recorder.points) in (stop, stop + 1) and max(recorder.points) == 12
    go(tiny, tmp_path / "whole", **more)
    same_bits(tmp_path / "run", tmp_path / "whole")


def test_more_steps_that_would_change_earlier_rates_are_refused(tiny: Path, tmp_path: Path) -> None:
    cosine = {"optim__schedule": "cosine", "train__save_every": 1}
    stop_at(3, tiny, tmp_path / "cosine", **cosine)
    before = "optim.steps cannot change from 8 to 12 after step 3: the learning rate"
    rates = r"of step 1 would have been 0.000491\S*, not 0.000481\S*; choose another --output"
    with refused(f"cosine/checkpoints: {before} {rates}"):
        go(tiny, tmp_path / "cosine", optim__steps=12, **cosine)
    dropped = {"optim__milestones": [0.5]}
    stop_at(7, tiny, tmp_path / "step", **dropped)
    with refused("step 4 would have been 0.001, not 0.0001; choose"):
        go(tiny, tmp_path / "step", optim__steps=12, **dropped)
    go(tiny, tmp_path / "step", **dropped)
    before = (
        r"contains a finished run with a different config \(optim.steps: 12, not 8\); the learning"
    )
    rates = "rate of step 4 would have been 0.001, not 0.0001; choose another --output or remove "
    with refused(f"step: the folder {before} {rates}"):
        go(tiny, tmp_path / "step", optim__steps=12, **dropped)


def test_fewer_steps_than_completed_are_refused(tiny: Path, tmp_path: Path) -> None:
    stop_at(5, tiny, tmp_path, optim__milestones="[]")
    with refused("contains a run of 5 steps, more than optim.steps = 4; choose"):
        go(tiny, tmp_path, optim__milestones="[]", optim__steps=4)
    assert max(go(tiny, tmp_path, optim__milestones="[]", optim__steps=6).points) == 6


def test_extending_a_finished_run_needs_its_last_state(tiny: Path, tmp_path: Path) -> None:
    go(tiny, tmp_path, optim__milestones="[]", optim__steps=1)
    before = (tmp_path / "model.pt").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with refused("contains a finished run .step 1., but .*contains no training state to"):
        go(tiny, tmp_path, optim__milestones="[]", optim__steps=2)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_scaled_rate_applies_to_the_whole_run(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = {"optim__scale_lr": "true", "optim__lr_batch_size": 4, "optim__steps": 3}
    with caplog.at_level(logging.INFO, "vitdet"):
        stop_at(2, tiny, tmp_path / "run", **half)
    note = "optim.lr=0.001 is for a batch size of 4, but train.batch_size is 2: optim.scale_lr scales it to 0.0005"
    assert caplog.messages.count(note) == 1
    with refused("different config .optim.lr_batch_size: 8, not 4"):
        go(tiny, tmp_path / "run", **half | {"optim__lr_batch_size": 8})
    rest = go(tiny, tmp_path / "run", **half)
    whole = go(tiny, tmp_path / "whole", optim__lr=0.0005, optim__steps=3)
    assert rest.points[3]["lr"] == whole.points[3]["lr"]
    same_weights(tmp_path / "run", tmp_path / "whole")


class Pair(NamedTuple):
    """The folders of a run with a separate states folder."""

    output: Path
    states: Path

    def names(self) -> list[Path]:
        return list(self.states.iterdir())


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "out", tmp_path / "states")


def test_a_folder_of_states_is_found_with_other_operational_settings(
    tiny: Path, pair: Pair
) -> None:
    cut_at(4, tiny, pair.output, states=pair.states)
    found = go(tiny, pair.output, states=pair.states, data__workers=1, train__keep=1)
    assert min(found.points) == 4  # resumed from the state after step 3
    assert len(pair.names()) == 1


def test_a_folder_of_states_is_found_with_more_steps(tiny: Path, pair: Pair) -> None:
    given = {**CONSTANT, "train__save_every": 1, "states": pair.states}
    go(tiny, pair.output, **given)
    assert min(go(tiny, pair.output, **given, optim__steps=12).points) in (8, 9)
    assert len(pair.names()) == 1
    shutil.rmtree(pair.output)
    # with a different schedule, the states cannot be used: training starts at step 1
    changes = {"optim__steps": 12, "optim__schedule": "cosine"}
    cut_at(1, tiny, pair.output, states=pair.states, **changes)
    assert len(pair.names()) == 2


def test_a_folder_named_by_commit_dad8b8b_is_found(
    tiny: Path, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is a digest of all settings, the data's identity and the initial weights."""
    stored = json.loads((STORED / "state_tiny.json").read_text())
    name, _ = stored["file"].split("/")
    assert name == folder_name(stored["content"]["dataset_digest"])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "data/tiny")
    root = Path("data/tiny")
    cut_at(4, root, pair.output, states=pair.states)
    config = load_config("tiny", minimal(root))
    assert legacy_digest(config) == SETTINGS
    old = pair.states / folder_name(dataset_digest(config.data))
    pair.names()[0].rename(old)
    assert min(cut_at(5, root, pair.output, states=pair.states).points) == 4
    operational = {"train__keep": 5, "data__workers": 1}
    assert min(go(root, pair.output, states=pair.states, **operational).points) == 5
    assert pair.names() == [old]
    shutil.rmtree(pair.output)
    cut_at(1, root, pair.output, states=pair.states, train__seed=1)  # uses another folder
    assert len(pair.names()) == 2


SETTINGS = "94542b7606c5"


def folder_name(identity: str) -> str:
    return hashlib.sha256(f"{SETTINGS} {identity} ".encode()).hexdigest()[:12]


def test_a_failed_evaluation_keeps_the_weights_and_their_average(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = []

    class Kept(trainer.Loop):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            loops.append(self)

    def failing(detector: torch.nn.Module, *_: object) -> None:
        raise ValueError("no figures")

    monkeypatch.setattr(trainer, "Loop", Kept)
    monkeypatch.setattr(trainer, "evaluate_detector", failing)
    with refused("no figures"):
        go(tiny, tmp_path)
    (loop,) = loops
    state = read_state(tmp_path, 4)
    name = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(state["model"][name], state["average"][name])
    assert torch.equal(loop.detector.state_dict()[name], state["model"][name])
    assert torch.equal(loop.average.state_dict()[name], state["average"][name])


def test_the_random_draws_of_a_step_depend_on_seed_step_and_rank(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    monkeypatch.setattr(trainer.torch, "manual_seed", seeds.append)
    go(tiny, tmp_path, optim__steps=2, train__seed=3)
    assert seeds[-2:] == [12467808127879573787, 11425928242767342472]


def test_states_of_earlier_versions_are_loaded_and_an_unknown_version_is_refused(
    tiny: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vitdet")
    path = sorted((stopped / "checkpoints").iterdir())[-1]
    content = read_state(stopped)
    assert content["format"] == "vitdet training state, version 4"
    torch.save({**content, "format": "vitdet training state, version 5"}, path)
    with refused("got 'vitdet training state, version 5'"):
        go(tiny, stopped)
    assert content.pop("best") == {"value": None, "step": 0, "stale": 0}
    assert content["scaler"] == {}  # empty except in fp16
    for version in (STATE_3, STATE_2, STATE_1):
        if version != STATE_3:
            content.pop("scaler", None)
        output = tmp_path / version[-1]
        (output / "checkpoints").mkdir(parents=True)
        torch.save({**content, "format": version}, output / "checkpoints" / path.name)
        assert min(go(tiny, output).points) == 8
    assert not [message for message in caplog.messages if "changed settings" in message]


@pytest.mark.parametrize("stop", [4, 8], ids=["fewer steps", "at the end"])
def test_metrics_of_other_evaluate_settings_are_recomputed(
    tiny: Path, constant: Path, tmp_path: Path, stop: int
) -> None:
    states = tmp_path / "run" / "checkpoints"
    states.mkdir(parents=True)
    path = states / f"step_{stop:08d}.pt"
    shutil.copy(constant / "checkpoints" / path.name, path)
    evaluation = json.loads((constant / "checkpoints" / f"{path.stem}.json").read_text())
    state = torch.load(path, weights_only=True) | evaluation  # one file, like in earlier versions
    assert state["evaluated"] == stop
    state["metrics"]["box_ap"] = 33.0
    torch.save(state, path)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    go(tiny, again, **CONSTANT, optim__steps=stop, evaluate__batch_size=1)  # has no effect on AP
    assert load_model_file(again / "model.pt")["metrics"]["box_ap"] == 33.0
    go(tiny, tmp_path / "run", **CONSTANT, optim__steps=stop, evaluate__max_detections=1)
    done = load_model_file(tmp_path / "run" / "model.pt")
    assert done["config"]["evaluate"]["max_detections"] == 1
    assert done["metrics"] == evaluate(tmp_path / "run" / "model.pt")
