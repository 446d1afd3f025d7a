"""Concurrent start on one volume: one rank reads the files and broadcasts the result or error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import minimal, options, start
from vitdet import distributed
from vitdet.config import DataConfig
from vitdet.data.loader import train_loader

WORLD = 3


@pytest.fixture
def everyone(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], list[object]]:
    """everyone(act) returns the result or error of act(rank) for all ranks, simulated by threads."""
    here, meeting, table = threading.local(), threading.Barrier(WORLD, timeout=500), [None] * WORLD

    def gather(value: object) -> list[object]:
        table[here.rank] = value
        meeting.wait()
        found = list(table)
        meeting.wait()
        return found

    monkeypatch.setattr(distributed, "rank", lambda: here.rank)
    monkeypatch.setattr(distributed, "world_size", lambda: WORLD)
    monkeypatch.setattr(distributed, "all_gather_objects", gather)

    def run(act: Callable[[int], object]) -> list[object]:
        def on_rank(rank: int) -> object:
            here.rank = rank
            try:
                return act(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(on_rank, range(WORLD)))

    return run


def test_only_rank_0_reads_and_all_ranks_get_the_result(everyone: Callable) -> None:
    looked = []
    found = everyone(lambda rank: distributed.rank0_result(lambda: looked.append(rank) or "digest"))
    assert found == ["digest"] * WORLD and looked == [0]


@pytest.mark.parametrize("broken", [{0}, {1}, {1, 2}])
def test_all_ranks_raise_the_error_of_the_lowest_rank(everyone: Callable, broken: set[int]) -> None:
    def make(rank: int) -> str:
        if rank in broken:
            raise FileNotFoundError(f"no file, says {rank}")
        return f"loader {rank}"

    found = everyone(lambda rank: distributed.reraise_on_all_ranks(lambda: make(rank)))
    assert {(type(error), str(error)) for error in found} == {
        (FileNotFoundError, f"no file, says {min(broken)}")
    }
    assert everyone(lambda rank: distributed.reraise_on_all_ranks(lambda: rank)) == [0, 1, 2]


def test_only_rank_0_looks_for_image_files(own_tiny: Path) -> None:
    next((own_tiny / "train").iterdir()).unlink()
    data = DataConfig(root=str(own_tiny), train_split="train", val_split="val", workers=0)
    train_loader(data, 2, 0, 0, 1, rank=1, world_size=2)
    with pytest.raises(FileNotFoundError, match="no such file"):
        train_loader(data, 2, 0, 0, 1, rank=0, world_size=2)


@pytest.mark.slow
def test_processes_with_invalid_data_end_with_one_line(own_tiny: Path, tmp_path: Path) -> None:
    gone = next((own_tiny / "train").iterdir())
    gone.unlink()
    words = ["train", "tiny", *options(minimal(own_tiny)), "--output", "run"]
    process = start(words, tmp_path, processes=2)
    output, errors = process.communicate()
    said = [line for line in errors.splitlines() if line.startswith("vitdet:")]
    assert process.returncode != 0 and not output and said and set(said) == {said[0]}, errors
    assert f"{gone}: no such file" in said[0]
    assert "imed out" not in errors  # no process waited for one that had ended
    assert not list((tmp_path / "run").rglob("*.pt"))
