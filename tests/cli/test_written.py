"""Atomic writes of files and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitdet.files import write_json, written, written_folder


def test_a_file_is_made_with_its_folder_and_takes_the_place_of_a_link(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "new.json", {"x": [1]})
    assert (tmp_path / "a" / "b" / "new.json").read_text() == '{\n "x": [\n  1\n ]\n}\n'
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "new.json")
    write_json(tmp_path / "link", 1, indent=None)
    assert (
        not (tmp_path / "link").is_symlink()
        and (tmp_path / "a" / "b" / "new.json").stat().st_size == 19
    )
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "b", "new.json", "link"}


def test_a_failure_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == tmp_path
        raise KeyboardInterrupt
    with pytest.raises(ValueError), written_folder(tmp_path / "folder") as temporary:
        (temporary / "inside").touch()
        raise ValueError
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_the_content_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((tmp_path / "file").exists()))
    for sync in (False, True):
        with written(tmp_path / "file", sync) as temporary:
            temporary.write_text("new")
        assert seen == [False, True] * sync  # the file, then the folder with its name
        (tmp_path / "file").unlink()


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").touch()
    with written_folder(tmp_path / "empty") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "empty" / "new").exists() and (
        tmp_path / "empty"
    ).stat().st_mode & 0o777 == 0o755
    with pytest.raises(OSError, match="not empty"), written_folder(tmp_path / "full") as temporary:
        (temporary / "new").touch()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "empty",
        "empty/new",
        "full",
        "full/old",
    ]
