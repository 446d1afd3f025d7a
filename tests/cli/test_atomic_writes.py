"""Atomic writes of files and folders, and removal of the temporary files of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from vitdet import files
from vitdet.checkpoint import Checkpoints
from vitdet.files import atomic_dir, atomic_write, remove_abandoned, write_json, writer

WRITING = """
import sys, time
from pathlib import Path
from vitdet.files import atomic_write, atomic_dir
folder = Path(sys.argv[1])
with atomic_write(folder / "model.pt") as file, atomic_dir(folder / "data") as inside:
    file.write_text("half")
    (inside / "image.jpg").touch()
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def process(tmp_path: Path) -> subprocess.Popen:
    """Start a process that writes a file and a folder in tmp_path."""
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


def test_only_temporary_files_of_ended_processes_are_removed(
    tmp_path: Path, process: subprocess.Popen
) -> None:
    remove_abandoned(tmp_path)
    assert [path.is_dir() for path in temporary(tmp_path)] == [True, False]
    process.kill()
    process.wait()
    write_json(tmp_path / "other.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_zombie_process_counts_as_ended(tmp_path: Path, process: subprocess.Popen) -> None:
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
    """This includes temporary names of version 0.1, which do not contain the host name."""
    path = tmp_path / name
    path.mkdir()
    (path / "inside").touch()
    hour = path.stat().st_mtime - files.DEAD_SECONDS - 60
    os.utime(path, (hour, hour))
    remove_abandoned(tmp_path)
    assert path.exists()  # it contains a new file
    os.utime(path / "inside", (hour, hour))
    os.utime(path, (hour, hour))
    remove_abandoned(tmp_path)
    assert not path.exists()


def test_files_with_other_names_are_kept(tmp_path: Path) -> None:
    names = {".a.tmp", "a.12.tmp", ".a.part", ".DS_Store", ".a.12.tmp.gz"}
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_incomplete_states_are_removed_when_a_run_starts(
    tmp_path: Path, process: subprocess.Popen
) -> None:
    process.kill()
    process.wait()
    with Checkpoints(tmp_path, 1).locked():
        assert not temporary(tmp_path)


def test_a_process_keeps_its_own_temporary_files(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as file, atomic_dir(tmp_path / "b"):
        file.touch()
        files._remove_once.cache_clear()
        write_json(tmp_path / "c", 1)
        assert file.exists() and len(temporary(tmp_path)) == 2


def test_atomic_write_creates_the_folder_and_replaces_a_link(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "new.json", {"x": [1]})
    assert (tmp_path / "a" / "b" / "new.json").read_text() == '{\n "x": [\n  1\n ]\n}\n'
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "new.json")
    write_json(tmp_path / "link", 1, indent=None)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "a" / "b" / "new.json").stat().st_size == 19
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "new.json", "link"}


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "link"):
        with pytest.raises(IsADirectoryError, match=f"'{tmp_path / name}'$"):
            write_json(tmp_path / name, {})
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_failure_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == tmp_path
        raise KeyboardInterrupt
    with pytest.raises(ValueError), atomic_dir(tmp_path / "folder") as temporary:
        (temporary / "inside").touch()
        raise ValueError
    assert [child.name for child in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_the_content_is_synced_before_the_file_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((tmp_path / "file").exists()))
    for sync in (False, True):
        with atomic_write(tmp_path / "file", sync) as temporary:
            temporary.write_text("new")
        assert seen == [False, True] * sync  # the file first, then its folder
        (tmp_path / "file").unlink()


def test_a_folder_replaces_only_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").touch()
    with atomic_dir(tmp_path / "empty") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "empty" / "new").exists()
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o755
    with pytest.raises(OSError, match="not empty"), atomic_dir(tmp_path / "full") as temporary:
        (temporary / "new").touch()
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert files == ["empty", "empty/new", "full", "full/old"]


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("disk/data")
    with atomic_dir(tmp_path / "link") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/data/new").exists()


@pytest.mark.parametrize("place", [".", "/proc"])
def test_a_folder_that_cannot_be_replaced_is_refused_first(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="choose a new folder in it"), atomic_dir(Path(place)):
        raise AssertionError
    assert not list(tmp_path.iterdir())
