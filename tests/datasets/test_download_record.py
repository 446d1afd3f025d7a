"""The download record: files that differ from it are reported in one line."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.conftest import minimal, options
from vitdet.config import DataConfig
from vitdet.data.dataset import read_split
from vitdet.data.download_record import (
    Archive,
    DownloadRecord,
    File,
    Images,
    compare,
    digest,
    read,
    verify,
    write,
)
from vitdet.data.fingerprint import describe


def file_entry(root: Path, path: str) -> File:
    content = (root / path).read_bytes()
    return File(path, len(content), sha256(content).hexdigest())


def folder_entry(root: Path, path: str) -> Images:
    files = {file.name: file.read_bytes() for file in sorted((root / path).iterdir())}
    lines = [f"{name} {len(content)}" for name, content in files.items()]
    sums = [f"{line} {zlib.crc32(files[line.split()[0]]):08x}" for line in lines]
    texts = ("".join(f"{line}\n" for line in every) for every in (lines, sums))
    names, content = (sha256(text.encode()).hexdigest() for text in texts)
    return Images(path, len(files), sum(map(len, files.values())), names, content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "a.jpg").write_bytes(b"one")
    (tmp_path / "val2017" / "b.jpg").write_bytes(b"four")
    (tmp_path / "some.json").write_bytes(b"{}")
    archive = Archive("x.zip", "http://x/x.zip", 9, "0" * 64, True)
    file, folder = file_entry(tmp_path, "some.json"), folder_entry(tmp_path, "val2017")
    write(tmp_path, DownloadRecord((archive,), (file,), (folder,)))
    return tmp_path


def test_the_record_lists_the_downloaded_files(root: Path) -> None:
    expected = sha256((root / "manifest.json").read_bytes()).hexdigest()
    assert verify(root) == verify(root, contents=True) == expected
    assert digest(["b.jpg 4", "a.jpg 3"]) == sha256(b"a.jpg 3\nb.jpg 4\n").hexdigest()
    assert {path.name for path in root.iterdir()} == {"val2017", "some.json", "manifest.json"}


def put(path: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(content)


def remove(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).unlink()


def move(path: str, other: str) -> Callable[[Path], object]:
    return lambda root: (root / path).rename(root / other)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (remove("some.json"), FileNotFoundError, "some.json: missing"),
        (
            put("some.json", "[]"),
            ValueError,
            "some.json: sha256 .*, but 44136fa3.* when downloaded",
        ),
        (put("some.json", "[1]"), ValueError, "some.json: 3 bytes, but 2 when downloaded"),
        (remove("val2017/a.jpg"), ValueError, "1 files, 4 bytes, but 2 files, 7 bytes"),
        (put("val2017/c.jpg", ""), ValueError, "3 files, 7 bytes, but 2 files, 7 bytes"),
        (put("val2017/a.jpg", "longer"), ValueError, "2 files, 10 bytes"),
        (move("val2017/a.jpg", "val2017/A.jpg"), ValueError, "names or sizes differ"),
        (move("val2017", "val"), FileNotFoundError, "val2017: missing"),
        (remove("manifest.json"), FileNotFoundError, "json: no such file; `vitdet data coco"),
        (put("manifest.json", "[]"), ValueError, "manifest.json: not a manifest"),
        (put("manifest.json", "{"), ValueError, "manifest.json: not a manifest"),
    ],
)
def test_a_changed_file_is_rejected(root: Path, change: Callable, error: type, says: str) -> None:
    change(root)
    with pytest.raises(error, match=says) as caught:
        verify(root)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(root))


def test_other_content_of_the_same_size_is_found_by_reading(root: Path) -> None:
    (root / "val2017" / "a.jpg").write_bytes(b"two")
    verify(root)
    with pytest.raises(ValueError, match="val2017: the content of a file has changed"):
        verify(root, contents=True)


def test_parts_of_a_record_are_verified_separately(root: Path) -> None:
    archive = Archive("a.zip", "http://x/a.zip", 1, "1" * 64, False)
    more = DownloadRecord((archive,), (File("other.json", 1, "2" * 64),))
    both = read(root).with_(more)
    assert [archive.name for archive in both.archives] == ["a.zip", "x.zip"]
    assert both.with_(more) == more.with_(both) == both
    compare(root, both.only(("x.zip",), ("some.json", "val2017")))
    with pytest.raises(FileNotFoundError, match="other.json: missing"):
        compare(root, both.only((), ("other.json",)))


def test_a_failed_write_keeps_the_old_record(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (root / "manifest.json").read_bytes()
    monkeypatch.setattr(os, "sync", Mock(side_effect=OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        write(root, DownloadRecord())
    assert (root / "manifest.json").read_bytes() == before and len(list(root.iterdir())) == 3


@pytest.fixture
def fetched(own_tiny: Path) -> Path:
    """Return the tiny data with a record as written by `vitdet data coco`."""
    files, folders = [], []
    for split in ("train", "val"):
        files.append(file_entry(own_tiny, f"annotations/instances_{split}.json"))
        folders.append(folder_entry(own_tiny, split))
    write(own_tiny, DownloadRecord((), tuple(files), tuple(folders)))
    return own_tiny


def settings(root: Path) -> DataConfig:
    return DataConfig(root=str(root), train_split="train", val_split="val")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def first(folder: Path) -> Path:
    return min(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "path", "says"),
    [
        (shutil.rmtree, "train", "train: no such file or folder; expected the"),
        (shutil.rmtree, "val", "val: no such file or folder; expected the"),
        (lambda val: first(val).unlink(), "val", "val: 3 files, .*, but 4 files, .* when"),
        (lambda train: longer(first(train)), "train", "12 files, .* differ. .* `vitdet data"),
        (longer, "annotations/instances_val.json", "val.json: .* bytes, but .* when downloaded"),
    ],
)
def test_no_training_run_starts_on_changed_images(
    fetched: Path, vitdet: Callable, change: Callable, path: str, says: str
) -> None:
    change(fetched / path)
    words = ["train", "tiny", *options(minimal(fetched)), "--output", "run"]
    code, _, said = vitdet(*words)
    assert code == 1 and re.search(says, said) and len(said.splitlines()) == 1, said
    assert not Path("run/model.pt").exists() and not list(Path("run").rglob("*.pt"))


def test_additional_files_make_no_difference(fetched: Path) -> None:
    for name in (".DS_Store", "more.jpg"):
        (fetched / "val" / name).touch()
    assert len(read_split(settings(fetched), "val").records) == 4
    longer(min((fetched / "val").glob("0*.jpg")))
    with pytest.raises(ValueError, match="val: 6 files,"):
        read_split(settings(fetched), "val")


def test_the_check_ignores_files_that_were_not_downloaded(root: Path) -> None:
    for old, new in (("a.jpg", "000000000001.jpg"), ("b.jpg", "000000000002.jpg")):
        (root / "val2017" / old).rename(root / "val2017" / new)
    write(root, DownloadRecord((), (), (folder_entry(root, "val2017"),)))
    (root / "val2017" / ".DS_Store").touch()
    verify(root, contents=True)
    (root / "val2017" / "000000000003.jpg").touch()
    with pytest.raises(ValueError, match="4 files, 7 bytes, but 2 files, 7 bytes"):
        verify(root)


def test_splits_are_compared_separately_and_other_manifests_are_ignored(fetched: Path) -> None:
    longer(min((fetched / "train").iterdir()))
    assert len(read_split(settings(fetched), "val").records) == 4
    with pytest.raises(ValueError, match="train: 12 files,"):
        read_split(settings(fetched), "train")
    (fetched / "manifest.json").write_text('{"version": 1}')
    assert len(read_split(settings(fetched), "train").records) == 12


def test_the_check_names_changed_images(fetched: Path, vitdet: Callable) -> None:
    assert vitdet("data", "check", fetched, "--images")[0] == 0
    with open(min((fetched / "val").iterdir()), "r+b") as picture:
        picture.seek(-1, os.SEEK_END)
        picture.write(b"?")  # after the end marker: still a valid image
    assert vitdet("data", "check", fetched)[0] == 0
    code, listed, _ = vitdet("data", "check", fetched, "--images")
    assert code == 1 and "1 x different from manifest.json" in listed
    assert "val: the content of a file" in listed


def test_a_pipeline_does_not_start_on_changed_data(own_tiny: Path) -> None:
    described = describe(settings(own_tiny))
    entry = file_entry(own_tiny, "annotations/instances_val.json")
    write(own_tiny, DownloadRecord((), (entry,)))
    assert describe(settings(own_tiny)) == described
    write(own_tiny, DownloadRecord((), (File(entry.path, entry.size, "0" * 64),)))
    says = "instances_val.json: sha256 .*, but 0000.* when downloaded"
    with pytest.raises(ValueError, match=says):
        describe(settings(own_tiny))
