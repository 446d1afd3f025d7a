"""Temporary files of killed processes, and their removal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from vitdet import files
from vitdet.checkpoint import Checkpoints
from vitdet.files import remove_abandoned, write_json, writer, written, written_folder

WRITING = """
import sys, time
from pathlib import Path
from vitdet.files import written, written_folder
folder = Path(sys.argv[1])
with written(folder / "model.pt") as file, written_folder(folder / "data") as inside:
    file.write_text("half")
    (inside / "image.jpg").touch()
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def process(tmp_path: Path) -> subprocess.Popen:
    """A process that writes a file and a folder in tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, tmp_path],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def temporary(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".tmp")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_kept(
    tmp_path: Path, process: subprocess.Popen
) -> None:
    remove_abandoned(tmp_path)
    assert [path.is_dir() for path in temporary(tmp_path)] == [True, False]
    process.kill()
    process.wait()
    write_json(tmp_path / "other.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_killed_process_that_nobody_waited_for_has_ended(
    tmp_path: Path, process: subprocess.Popen
) -> None:
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    remove_abandoned(tmp_path)
    assert not temporary(tmp_path)


def test_another_process_with_the_same_id_is_not_the_writer(tmp_path: Path) -> None:
    machine, pid, started = writer().split("-")
    ours = tmp_path / f".a.{machine}-{pid}-{started}.tmp"
    earlier = tmp_path / f".a.{machine}-{pid}-{int(started) - 1}.tmp"
    for path in (ours, earlier):
        path.touch()
    remove_abandoned(tmp_path)
    assert temporary(tmp_path) == [ours]


@pytest.mark.parametrize("name", [".a.00000000-1-1.tmp", ".a.12.tmp"])
def test_a_writer_on_another_machine_has_ended_after_an_hour_without_a_write(
    tmp_path: Path, name: str
) -> None:
    """So has that of a name of version 0.1, which does not tell the machine."""
    path = tmp_path / name
    path.mkdir()
    (path / "inside").touch()
    hour = path.stat().st_mtime - files.DEAD_SECONDS - 60
    os.utime(path, (hour, hour))
    remove_abandoned(tmp_path)
    assert path.exists()  # a file in it is new
    os.utime(path / "inside", (hour, hour))
    os.utime(path, (hour, hour))
    remove_abandoned(tmp_path)
    assert not path.exists()


def test_names_of_others_are_kept(tmp_path: Path) -> None:
    names = {".a.tmp", "a.12.tmp", ".a.part", ".DS_Store", ".a.12.tmp.gz"}
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_states_that_were_not_complete_are_removed_when_a_training_starts(
    tmp_path: Path, process: subprocess.Popen
) -> None:
    process.kill()
    process.wait()
    with Checkpoints(tmp_path, 1).locked():
        assert not temporary(tmp_path)


def test_a_process_removes_nothing_of_its_own(tmp_path: Path) -> None:
    with written(tmp_path / "a") as file, written_folder(tmp_path / "b"):
        file.touch()
        files._remove_once.cache_clear()
        write_json(tmp_path / "c", 1)
        assert file.exists() and len(temporary(tmp_path)) == 2
