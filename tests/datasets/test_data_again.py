"""Downloads into folders that already contain archives, images, other files or links; full disks."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets.test_data_fetch import BOTH, TRAIN, VAL, Fetch, asked, check
from tests.helpers.archives import miniatures
from tests.helpers.web import Web
from vitdet.data import download_record


def test_existing_archives_are_used(get: Fetch, web: Web, root: Path, tmp_path: Path) -> None:
    for path, content in web.files.items():
        (tmp_path / path.split("/")[-1]).write_bytes(content)
    get(local=tmp_path, mirror="")
    check(root, web)
    assert web.asked == [] and len(list(tmp_path.glob("*.zip"))) == 5  # the archives are kept
    shutil.rmtree(root)
    (tmp_path / "val2017.zip").write_bytes(b"PK" + web.files[VAL][2:-1] + b"?")
    with pytest.raises(ValueError, match="val2017.zip: sha256 .* expected .*: not the published"):
        get(local=tmp_path, mirror="")
    (tmp_path / "val2017.zip").unlink()
    says = r"does not contain val2017.zip \(http://images.cocodataset.org/zips/val2017.zip"
    with pytest.raises(FileNotFoundError, match=says):
        get(local=tmp_path, mirror="")


def test_kept_archives_are_reused(get: Fetch, web: Web, root: Path) -> None:
    get(keep=True)
    assert {path.name for path in (root / "archives").iterdir()} == {
        name.split("/")[-1] for name in (TRAIN, VAL, BOTH)
    }
    shutil.rmtree(root / "train2017")
    assert get() is True and len(web.asked) == 3
    (root / "train2017" / "000000000003.jpg").unlink()
    with open(root / "archives" / "train2017.zip", "r+b") as damaged:
        damaged.write(b"?")
    with pytest.raises(ValueError, match="archives/train2017.zip: sha256"):
        get()


def test_lost_files_are_fetched_again_and_changed_files_are_named(
    get: Fetch, web: Web, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    get()
    (root / "val2017" / "000000000003.jpg").unlink()
    (root / "annotations" / "instances_val2017.json").unlink()
    web.asked.clear()
    assert get() is True and asked(web) == [BOTH, VAL]
    assert "annotations/instances_val2017.json: missing; extracting it again" in caplog.text
    assert "val2017: 11 files, " in caplog.text
    check(root, web)
    with open(root / "val2017" / "000000000003.jpg", "ab") as image:
        image.write(b"?")
    with pytest.raises(ValueError, match="val2017: 12 files, .*; move it away and repeat the"):
        get()


def test_existing_images_are_compared_and_completed(get: Fetch, web: Web, root: Path) -> None:
    get()
    train = root / "train2017"
    (root / "manifest.json").unlink()
    (train / "000000000007.jpg").unlink()
    get()
    check(root, web)
    (root / "manifest.json").unlink()
    (train / "000000000007.jpg").unlink()
    (train / "holiday.jpg").write_bytes(b"mine")
    web.asked.clear()
    with pytest.raises(ValueError, match="train2017/holiday.jpg: not in train2017.zip; move it aw"):
        get()
    (train / "holiday.jpg").rename(train / "000000000099.jpg")
    (train / "000000000098.jpg").write_bytes(b"mine")
    says = "train2017: contains more than the 12 files of train2017.zip; m"
    with pytest.raises(ValueError, match=says):
        get()
    assert web.asked == [] and (train / "000000000099.jpg").read_bytes() == b"mine"
    (train / "000000000098.jpg").unlink()
    says = "train2017.*/000000000099.jpg: not in train2017.zip .unexpected files: 1."
    with pytest.raises(ValueError, match=says):
        get()


def test_a_link_is_rejected_before_a_request(
    get: Fetch, web: Web, root: Path, tmp_path: Path
) -> None:
    root.mkdir()
    (root / "train2017").symlink_to(tmp_path)
    with pytest.raises(OSError, match="data/train2017: symbolic links are not followed"):
        get()
    assert web.asked == []


def test_free_space_is_checked_before_a_request(
    get: Fetch, web: Web, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, wanted = shutil.disk_usage(root.parent), miniatures("coco")[0]
    wanted[1] = replace(wanted[1], size=19_000_000_000, unpacked=20_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=30_000_000_000))
    says = r"data: 39.0 GB is needed \(19.0 for archives, 20.0 for their content"
    with pytest.raises(OSError, match=says):
        get(wanted=wanted)
    assert web.asked == []


def test_an_archive_with_missing_files_is_not_recorded(get: Fetch, root: Path) -> None:
    both, train = miniatures("coco", "train")[0]
    with pytest.raises(ValueError, match="train2017.zip: contains 12 of the 13 files of train2017"):
        get(wanted=[both, replace(train, count=13)])
    assert not (root / "manifest.json").exists() and not (root / "train2017").exists()


def test_an_unknown_checksum_is_recorded_from_the_download(get: Fetch, root: Path) -> None:
    wanted = miniatures("coco", "val")[0]
    get(wanted=[replace(archive, sha256="") for archive in wanted])
    noted = download_record.read(root).archives
    assert [archive.sha256 for archive in noted] == [archive.sha256 for archive in wanted]
    assert not any(archive.known for archive in noted)


def test_a_complete_data_set_needs_no_write_permission(
    get: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    get()
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(os, "open", None)
    assert get() is False


def test_an_invalid_record_is_rejected(get: Fetch, root: Path) -> None:
    root.mkdir()
    (root / "manifest.json").write_text(json.dumps({"archives": [{"name": 1}]}))
    with pytest.raises(ValueError, match="manifest.json: not a manifest of `vitdet data`"):
        get()
