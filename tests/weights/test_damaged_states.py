"""Damaged training states: every rank resumes from the previous state, and one warning reports the lost steps."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.helpers.runs import TOGETHER, cut, go, interrupt, same_bits, spawn_pair, terminate
from vitdet import checkpoint
from vitdet.checkpoint import STATE, Checkpoints, DamagedError
from vitdet.files import damaged_record
from vitdet.training import Stopped


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    """Flip one bit of the largest tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert damaged_record(path)


def stopped_at_7(tiny: Path, folder: Path) -> list[Path]:
    with pytest.raises(Stopped):
        go(tiny, folder, interrupt(terminate, 7))
    states = sorted((folder / "checkpoints").glob("*.pt"))
    assert [path.name for path in states] == ["step_00000006.pt", "step_00000007.pt"]
    return states


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty"])
def test_training_resumes_from_the_state_before_a_damaged_state(
    tiny: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    _, newest = stopped_at_7(tiny, tmp_path)
    if kind == "flipped":
        flip(newest)
    else:
        newest.write_bytes(newest.read_bytes()[: 1000 if kind == "cut" else 0])
    caplog.set_level(logging.WARNING)
    assert min(go(tiny, tmp_path).points) == 7
    (said,) = (message for message in caplog.messages if "damaged" in message)
    assert said.startswith(f"{newest}: not a complete vitdet checkpoint (") and said.endswith(
        "; renamed to step_00000007.pt.damaged; resuming from step 6; the steps up to 7 are repeated"
    )
    same_bits(tmp_path, trained)
    files = ("6.pt", "7.pt.damaged", "8.json", "8.pt")
    assert names(newest.parent) == [".lock", *(f"step_0000000{file}" for file in files)]


def test_a_damaged_state_is_reported_once_and_not_counted_as_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        states.save(step, {"w": torch.ones(999) * step})
        states.save_evaluation(step, {"metrics": {}})
    flip(tmp_path / "step_00000003.pt")
    for _ in range(2):  # a start that fails before it acquires the lock changes nothing
        assert Checkpoints(tmp_path, keep=2).latest()["step"] == 2
    assert states.latest()["step"] == 2
    states.set_aside(2)
    assert len(caplog.messages) == 1 and not states.damaged
    states.set_aside(2)
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest()["step"] == 2 and not again.damaged and len(caplog.messages) == 1
    again.save(3, {"w": torch.ones(999)})
    files = ("2.json", "2.pt", "3.pt", "3.pt.damaged")
    assert names(tmp_path) == [f"step_0000000{file}" for file in files]
    again.save(4, {})
    assert [path.name for path in again.all()] == ["step_00000003.pt", "step_00000004.pt"]


def test_an_error_advises_starting_over_if_all_states_are_damaged(tmp_path: Path) -> None:
    states = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        states.save(step, {}).write_bytes(b"PK")
    advice = "remove this file and all earlier states, which are damaged too, to start over"
    with pytest.raises(ValueError, match=f"step_00000003.pt: not a complete .*; {advice}$"):
        states.latest()
    assert len(states.all()) == 3


def test_unreadable_but_undamaged_states_raise_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causes: a state of a later version, too little memory, and too many open files."""
    states = Checkpoints(tmp_path, keep=3)
    states.save(1, {})
    checkpoint.save(tmp_path / "step_00000002.pt", {"format": f"{STATE}0", "step": 2})
    with pytest.raises(ValueError, match=f"expected a '{STATE}' file, got") as e:
        states.latest()
    assert not isinstance(e.value, DamagedError)
    states.save(2, {})
    for error in (
        RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
        MemoryError(),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", Mock(side_effect=error))
            with pytest.raises((ValueError, OSError)) as e:
                states.latest()
            assert not isinstance(e.value, DamagedError)
            assert "does not fit in memory (" in str(e.value) or e.value is error
    assert not states.damaged and states.latest()["step"] == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\udcff"])
def test_a_damaged_evaluation_affects_only_the_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    states = Checkpoints(tmp_path, keep=2)
    states.save(4, {"evaluated": 0})
    path = tmp_path / "step_00000004.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert states.latest() == {"format": STATE, "step": 4, "evaluated": 0}
    states.set_aside(4)
    (said,) = caplog.messages
    assert said.startswith(f"{path}: ") and "the metrics of step 4 are lost" in said
    assert names(tmp_path) == ["step_00000004.json.damaged", "step_00000004.pt"]


def test_a_damaged_evaluation_is_repeated(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, interrupt(cut, 5))
    path = tmp_path / "checkpoints" / "step_00000004.json"
    before = json.loads(path.read_text())["metrics"]
    path.write_text("{")
    recorder = interrupt(cut, 5)
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, recorder)
    assert min(recorder.points) == 4 and json.loads(path.read_text())["metrics"] == before


def one_of_two(rank: int, root: Path, folder: Path) -> None:
    """Run one of two processes; the second reads damaged newest states and a damaged evaluation."""
    if rank == 1:
        load = checkpoint.load

        def damaged(path: Path, *given: str, **named: bool) -> dict:
            if path.name != "step_00000004.pt":
                raise DamagedError(f"{path}: damaged on the way")
            return load(path, *given, **named)

        def lost(path: Path) -> dict:
            raise DamagedError(f"{path}: damaged on the way")

        checkpoint.load, checkpoint._read_evaluation = damaged, lost
    go(root, folder, train__keep=3, **TOGETHER)


@pytest.mark.slow
def test_all_processes_resume_from_the_newest_state_that_all_can_read(
    tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        go(tiny, tmp_path, interrupt(terminate, 7), train__keep=3, **TOGETHER)
    spawn_pair(one_of_two, tiny, tmp_path)
    damaged = [name for name in names(tmp_path / "checkpoints") if name.endswith(".damaged")]
    assert damaged == ["step_00000006.pt.damaged", "step_00000007.pt.damaged"]
    assert (tmp_path / "checkpoints" / "step_00000004.json").exists()  # rank 0 can read it
    assert (tmp_path / "model.pt").exists()
