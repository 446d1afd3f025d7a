"""Settings that a resumed training may change, and the folder of its states."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS, Recorder, minimal
from tests.training.test_trainer import cut, go, interrupt, same_bits, terminate
from tests.weights.test_old_checkpoints import STORED, dataset_digest
from vitdet.checkpoint import STATE_1, STATE_2, STATE_3, load_model_file
from vitdet.config import load_config
from vitdet.digest import legacy_digest
from vitdet.evaluation import evaluate
from vitdet.training import Stopped, train, trainer


def same_weights(path: Path, other: Path) -> None:
    ours, theirs = (load_model_file(folder / "model.pt")["model"] for folder in (path, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


CONSTANT = {"optim__milestones": "[]", "train__keep": 9}


@pytest.fixture(scope="module")
def stopped_at_7(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was stopped at step 7; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        go(tiny, folder, interrupt(terminate, 7))
    return folder


@pytest.fixture
def stopped(stopped_at_7: Path, tmp_path: Path) -> Path:
    """A copy of it, tmp_path/run."""
    return Path(shutil.copytree(stopped_at_7, tmp_path / "run"))


@pytest.fixture(scope="module")
def constant(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole training of constant rate with all its states; not to be changed."""
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


def test_a_resume_without_changes_logs_none(
    tiny: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vitdet"):
        go(tiny, stopped)
    assert not [message for message in caplog.messages if "changed settings" in message]


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (4, {}),  # milestones at 85 and 95 %: the first drop was after step 7, and is after step 10
        (8, CONSTANT),  # also a run that has ended
    ],
    ids=["before the first drop", "constant rate"],
)
def test_more_steps_give_the_bits_of_a_training_with_as_many_from_the_start(
    tiny: Path, constant: Path, tmp_path: Path, stop: int, changes: dict
) -> None:
    more = {**changes, "optim__steps": 12}
    if stop < STEPS:
        with pytest.raises(Stopped):
            go(tiny, tmp_path / "run", interrupt(terminate, stop), **changes)
    else:
        shutil.copytree(constant, tmp_path / "run")
    recorder = go(tiny, tmp_path / "run", **more)
    assert min(recorder.points) in (stop, stop + 1) and max(recorder.points) == 12
    go(tiny, tmp_path / "whole", **more)
    same_bits(tmp_path / "run", tmp_path / "whole")


def test_more_steps_that_would_change_earlier_rates_are_refused(tiny: Path, tmp_path: Path) -> None:
    cosine = {"optim__schedule": "cosine", "train__save_every": 1}
    with pytest.raises(Stopped):
        go(tiny, tmp_path / "cosine", interrupt(terminate, 3), **cosine)
    with pytest.raises(
        ValueError,
        match=r"cosine/checkpoints: optim.steps cannot change from 8 to 12 after step 3: the learning "
        r"rate of step 1 would have been 0.000491\S*, not 0.000481\S*; choose another --output",
    ):
        go(tiny, tmp_path / "cosine", optim__steps=12, **cosine)
    with pytest.raises(Stopped):
        go(tiny, tmp_path / "step", interrupt(terminate, 7), optim__milestones=[0.5])
    with pytest.raises(
        ValueError, match=r"rate of step 4 would have been 0.001, not 0.0001; choose"
    ):
        go(tiny, tmp_path / "step", optim__steps=12, optim__milestones=[0.5])
    go(tiny, tmp_path / "step", optim__milestones=[0.5])
    with pytest.raises(
        ValueError,
        match=r"step: holds a finished run with another config \(optim.steps: 12, not 8\); the learning "
        r"rate of step 4 would have been 0.001, not 0.0001; choose another --output or remove it",
    ):
        go(tiny, tmp_path / "step", optim__steps=12, optim__milestones=[0.5])


def test_fewer_steps_than_done_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        go(tiny, tmp_path, interrupt(terminate, 5), optim__milestones="[]")
    with pytest.raises(
        ValueError, match="holds a run of 5 steps, more than optim.steps = 4; choose"
    ):
        go(tiny, tmp_path, optim__milestones="[]", optim__steps=4)
    assert max(go(tiny, tmp_path, optim__milestones="[]", optim__steps=6).points) == 6


def test_more_steps_after_an_end_need_its_last_state(tiny: Path, tmp_path: Path) -> None:
    go(tiny, tmp_path, optim__milestones="[]", optim__steps=1)
    before = (tmp_path / "model.pt").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(
        ValueError, match="holds a finished run of 1 steps, and no training state to"
    ):
        go(tiny, tmp_path, optim__milestones="[]", optim__steps=2)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_scaled_rate_is_that_of_the_whole_training(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = {"optim__scale_lr": "true", "optim__lr_batch_size": 4, "optim__steps": 3}
    with caplog.at_level(logging.INFO, "vitdet"), pytest.raises(Stopped):
        go(tiny, tmp_path / "run", interrupt(terminate, 2), **half)
    note = "optim.lr=0.001 is meant for steps of 4 images, and train.batch_size is 2: optim.scale_lr makes it 0.0005"
    assert caplog.messages.count(note) == 1
    with pytest.raises(ValueError, match="another config .optim.lr_batch_size: 8, not 4"):
        go(tiny, tmp_path / "run", **half | {"optim__lr_batch_size": 8})
    rest = go(tiny, tmp_path / "run", **half)
    whole = go(tiny, tmp_path / "whole", optim__lr=0.0005, optim__steps=3)
    assert rest.points[3]["lr"] == whole.points[3]["lr"]
    same_weights(tmp_path / "run", tmp_path / "whole")


def run(tiny: Path, folder: Path, recorder: Recorder, **changes: object) -> Recorder:
    train(
        load_config("tiny", minimal(tiny, **changes)),
        folder / "out",
        checkpoints=folder / "states",
        start_tracking=lambda *_: recorder,
    )
    return recorder


def test_a_folder_of_states_is_found_with_other_operational_settings(
    tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path, interrupt(cut, 4))
    found = run(tiny, tmp_path, Recorder(), data__workers=1, train__keep=1)
    assert min(found.points) == 4  # resumed from the state after step 3
    assert len(list((tmp_path / "states").iterdir())) == 1


def test_a_folder_of_states_is_found_with_more_steps(tiny: Path, tmp_path: Path) -> None:
    constant = {"optim__milestones": "[]", "train__keep": 9, "train__save_every": 1}
    run(tiny, tmp_path, Recorder(), **constant)
    assert min(run(tiny, tmp_path, Recorder(), **constant, optim__steps=12).points) in (8, 9)
    assert len(list((tmp_path / "states").iterdir())) == 1
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):  # its steps have other learning rates: from the start
        run(tiny, tmp_path, interrupt(cut, 1), optim__steps=12, optim__schedule="cosine")
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_a_folder_named_by_commit_dad8b8b_is_found_with_other_operational_settings(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path(shutil.copytree(tiny, "tiny"))
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path, interrupt(cut, 4))
    (states,) = (tmp_path / "states").iterdir()
    config = load_config("tiny", minimal(root))
    text = f"{legacy_digest(config)} {dataset_digest(config.data)} "
    old = tmp_path / "states" / hashlib.sha256(text.encode()).hexdigest()[:12]
    states.rename(old)
    assert min(run(root, tmp_path, Recorder(), train__keep=5, data__workers=1).points) == 4
    assert list((tmp_path / "states").iterdir()) == [old]


def test_a_folder_named_by_commit_dad8b8b_is_found(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name hashes all settings (94542b7606c5), the identity of the data and the initial weights."""
    stored = json.loads((STORED / "state_tiny.json").read_text())
    name, _ = stored["file"].split("/")
    assert name == folder_name(stored["content"]["dataset_digest"])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "data/tiny")
    root = Path("data/tiny")
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path, interrupt(cut, 4))
    (states,) = (tmp_path / "states").iterdir()
    old = tmp_path / "states" / folder_name(dataset_digest(load_config("tiny", minimal(root)).data))
    states.rename(old)
    assert min(run(root, tmp_path, Recorder()).points) == 4
    assert list((tmp_path / "states").iterdir()) == [old]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):  # another training has another folder
        run(root, tmp_path, interrupt(cut, 1), train__seed=1)
    assert len(list((tmp_path / "states").iterdir())) == 2


def folder_name(identity: str) -> str:
    return hashlib.sha256(f"94542b7606c5 {identity} ".encode()).hexdigest()[:12]


def test_an_evaluation_that_fails_leaves_the_weights_and_their_average_where_they_were(
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
    with pytest.raises(ValueError, match="no figures"):
        go(tiny, tmp_path)
    (loop,) = loops
    state = torch.load(tmp_path / "checkpoints" / "step_00000004.pt", weights_only=True)
    name = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(state["model"][name], state["average"][name])
    assert torch.equal(loop.detector.state_dict()[name], state["model"][name])
    assert torch.equal(loop.average.state_dict()[name], state["average"][name])


def test_the_draws_of_a_step_depend_on_seed_step_and_rank(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    monkeypatch.setattr(trainer.torch, "manual_seed", seeds.append)
    go(tiny, tmp_path, optim__steps=2, train__seed=3)
    assert seeds[-2:] == [12467808127879573787, 11425928242767342472]


def test_states_of_earlier_versions_are_loaded_and_those_of_an_unknown_version_are_not(
    tiny: Path, stopped: Path, tmp_path: Path
) -> None:
    path = sorted((stopped / "checkpoints").iterdir())[-1]
    content = torch.load(path, weights_only=True)
    assert content["format"] == "vitdet training state, version 4"
    torch.save({**content, "format": "vitdet training state, version 5"}, path)
    with pytest.raises(ValueError, match="got 'vitdet training state, version 5'"):
        go(tiny, stopped)
    assert content.pop("best") == {"value": None, "step": 0, "stale": 0}
    assert content["scaler"] == {}  # not in fp16
    for version in (STATE_3, STATE_2, STATE_1):
        if version != STATE_3:
            content.pop("scaler", None)
        output = tmp_path / version[-1]
        (output / "checkpoints").mkdir(parents=True)
        torch.save({**content, "format": version}, output / "checkpoints" / path.name)
        assert min(go(tiny, output).points) == 8


def test_the_config_that_is_stored_is_the_new_one(tiny: Path, stopped: Path) -> None:
    go(tiny, stopped, evaluate__max_detections=3)
    config = load_config("tiny", minimal(tiny, evaluate__max_detections=3))
    assert load_config(stopped / "config.yaml") == config
    assert load_model_file(stopped / "model.pt")["config"]["evaluate"]["max_detections"] == 3


@pytest.mark.parametrize(("stop", "steps"), [(4, 4), (8, 8)], ids=["fewer steps", "at the end"])
def test_metrics_of_other_evaluate_settings_are_measured_again(
    tiny: Path, constant: Path, tmp_path: Path, stop: int, steps: int
) -> None:
    states = tmp_path / "run" / "checkpoints"
    states.mkdir(parents=True)
    path = states / f"step_{stop:08d}.pt"
    shutil.copy(constant / "checkpoints" / path.name, path)
    evaluation = json.loads((constant / "checkpoints" / f"{path.stem}.json").read_text())
    state = torch.load(path, weights_only=True) | evaluation  # in one file, as they were once
    assert state["evaluated"] == stop
    state["metrics"]["box_ap"] = 33.0
    torch.save(state, path)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    go(tiny, again, **CONSTANT, optim__steps=steps, evaluate__batch_size=1)  # changes no AP
    assert load_model_file(again / "model.pt")["metrics"]["box_ap"] == 33.0
    go(tiny, tmp_path / "run", **CONSTANT, optim__steps=steps, evaluate__max_detections=1)
    done = load_model_file(tmp_path / "run" / "model.pt")
    assert done["config"]["evaluate"]["max_detections"] == 1
    assert done["metrics"] == evaluate(tmp_path / "run" / "model.pt")
