"""Asynchronous writing of training states."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from tests.conftest import STEPS, Recorder
from tests.helpers.runs import cut_at, go, refused, same_bits, state_names
from vitdet import files
from vitdet.checkpoint import Checkpoints
from vitdet.training import trainer
from vitdet.training.saver import Saver


class Gated(Checkpoints):
    """Checkpoints whose states are written only after `open` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep=2)
        self.open = threading.Event()

    def save(self, step: int, content: dict) -> Path:
        assert self.open.wait(60)
        return super().save(step, content)


def test_a_state_has_the_values_at_the_start_of_saving(tmp_path: Path) -> None:
    states = Gated(tmp_path)
    weights, moments = torch.zeros(5), [torch.ones(2), 3]
    with Saver(states) as saver:
        for step in (1, 2):
            saver.save(step, {"model": {"w": weights}, "optimizer": moments, "metrics": {"a": 1.0}})
            weights += 1
            moments[0] *= 2
            states.open.set()
            saver.wait()
            state = states.latest()
            assert torch.equal(state["model"]["w"], torch.full((5,), step - 1.0))
            assert torch.equal(state["optimizer"][0], torch.full((2,), 2.0 ** (step - 1)))
            assert (state["step"], state["metrics"]) == (step, {"a": 1.0})
            states.open.clear()


def test_closing_a_saver_waits_for_the_state_in_flight(tmp_path: Path) -> None:
    states = Gated(tmp_path)
    timer = threading.Timer(0.3, states.open.set)
    with pytest.raises(ValueError, match="diverged"), Saver(states) as saver:
        saver.save(1, {"x": 1})
        timer.start()
        assert not states.all()
        raise ValueError("diverged")
    assert [path.name for path in states.all()] == ["step_00000001.pt"]


def test_a_full_disk_ends_the_run_at_the_next_step_in_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.save

    def full(content: dict, file: object) -> None:
        if content.get("step") == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(content, file)

    monkeypatch.setattr(torch, "save", full)
    recorder = Recorder()
    with refused("step_00000003.pt: could not be written .*; free some", OSError):
        go(tiny, tmp_path, recorder, train__eval_every=100)
    assert recorder.status == "FAILED"
    assert max(recorder.points) < 6  # the run ended before the next state
    assert state_names(tmp_path) == ["step_00000000.pt"]


def test_each_state_is_written_once(
    tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    class Counted(Checkpoints):
        def save(self, step: int, content: dict) -> Path:
            written.append(step)
            return super().save(step, content)

    monkeypatch.setattr(trainer, "Checkpoints", Counted)
    go(tiny, tmp_path)
    assert written == [0, 3, 4, 6, STEPS]
    last = f"step_{STEPS:08d}"
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {".lock", "step_00000006.pt", f"{last}.pt", f"{last}.json"}
    same_bits(tmp_path, trained)


def test_a_state_that_contains_its_evaluation_is_not_evaluated_again(
    tiny: Path, tmp_path: Path
) -> None:
    """Earlier versions wrote the evaluation into the state's file."""
    cut_at(5, tiny, tmp_path)
    path = tmp_path / "checkpoints" / "step_00000004.pt"
    evaluation = path.with_suffix(".json")
    torch.save(torch.load(path) | json.loads(evaluation.read_text()), path)
    evaluation.unlink()
    assert list(cut_at(5, tiny, tmp_path).points) == [5]


def test_an_evaluation_is_stored_with_its_settings(tiny: Path, tmp_path: Path) -> None:
    cut_at(5, tiny, tmp_path)
    for first in (4, 5):  # evaluated again once, not in every run
        assert min(cut_at(5, tiny, tmp_path, evaluate__max_detections=3).points) == first


def test_an_evaluation_of_a_removed_state_is_not_used(tmp_path: Path) -> None:
    states = Checkpoints(tmp_path, keep=2)
    states.save(4, {"evaluated": 0})
    states.save_evaluation(4, {"evaluated": 4})
    assert states.latest()["evaluated"] == 4
    (tmp_path / "step_00000004.pt").unlink()
    states.save(4, {"evaluated": 0})
    assert states.latest()["evaluated"] == 0


def test_a_state_file_and_its_folder_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noted)
    path = Checkpoints(tmp_path, keep=1).save(1, {})
    assert synced == [str(path.with_name(f".{path.name}.{files.writer()}.tmp")), str(tmp_path)]
