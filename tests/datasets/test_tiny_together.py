"""The tiny data set, drawn by several processes at once: the pods of one job start together."""

from __future__ import annotations

import multiprocessing
import shutil
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from vitdet.demo.tiny import make_tiny

COUNTS = (3, 2)


def draw(folder: Path, ready: Barrier, answers: Queue) -> None:
    """One of the processes: it renames only when all others are about to, each having found no folder."""
    rename = Path.replace

    def together(temporary: Path, target: Path) -> Path:
        ready.wait()
        return rename(temporary, target)

    Path.replace = together
    try:
        answers.put(make_tiny(folder, *COUNTS, processes=1))
    except Exception as error:
        answers.put(repr(error))


def test_of_processes_that_draw_it_at_once_one_makes_it_and_the_others_find_it(
    tmp_path: Path,
) -> None:
    # as make_tiny itself does; the package takes a second to import
    context = multiprocessing.get_context("fork")
    ready, answers = context.Barrier(3), context.Queue()
    racing = [
        context.Process(target=draw, args=(tmp_path / "tiny", ready, answers), daemon=True)
        for _ in range(3)
    ]
    for process in racing:
        process.start()
    given = [answers.get() for _ in racing]
    for process in racing:
        process.join()
    assert sorted(given, key=str) == [False, False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]  # the losers' drawings are gone
    assert not make_tiny(tmp_path / "tiny", *COUNTS)


@pytest.mark.parametrize(
    ("theirs", "refused"),
    [((3, 2), ""), ((4, 2), "contains something else than the tiny data set")],
)
def test_what_another_process_has_finished_meanwhile_counts_if_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: tuple[int, int], refused: str
) -> None:
    make_tiny(tmp_path / "theirs", *theirs, processes=1)
    rename = Path.replace

    def too_late(temporary: Path, target: Path) -> Path:
        shutil.copytree(tmp_path / "theirs", target)
        return rename(temporary, target)

    monkeypatch.setattr(Path, "replace", too_late)
    folder = tmp_path / "tiny"
    if refused:
        with pytest.raises(ValueError, match=refused):
            make_tiny(folder, *COUNTS, processes=1)
    else:
        assert make_tiny(folder, *COUNTS, processes=1) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "tiny"]


def test_another_trouble_with_the_folder_stays_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(temporary: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        make_tiny(tmp_path / "tiny", *COUNTS, processes=1)
    assert not list(tmp_path.iterdir())
