"""Downloaded LVIS: images are found by their coco_url, and no image is in both splits."""

# ruff: noqa: F401, F811 - fixtures of other files
from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.test_lvis_data import change, lvis, own_lvis, settings
from tests.datasets.test_data_fetch import BOTH, TRAIN, VAL, Fetch, asked, check
from tests.helpers.archives import path, zipped
from tests.helpers.web import Handler, Web, file, status
from vitdet.data import check as data_check
from vitdet.data.dataset import read_split
from vitdet.data.fingerprint import fingerprints
from vitdet.datasets import published
from vitdet.datasets.published import Archive


def packed(folder: Path) -> tuple[list[Archive], dict[str, bytes]]:
    """Pack a folder into archives like LVIS's; return them and their content by path on a server."""
    made, contents = [], {}
    for archive in published.archives("lvis"):
        place = folder / archive.folder
        files = {
            f"{archive.prefix}{name}": (place / name).read_bytes()
            for name in archive.members or sorted(child.name for child in place.iterdir())
        }
        contents[path(archive)] = content = zipped(files)
        unpacked, count = sum(map(len, files.values())), len(files)
        size = {"size": len(content), "count": count, "unpacked": unpacked}
        made.append(replace(archive, sha256="", **size))
    return made, contents


def test_a_fetched_data_set_can_be_trained_on(get: Fetch, web: Web, root: Path, lvis: Path) -> None:
    wanted, web.files = packed(lvis)
    get(wanted=wanted)
    data = settings(root)
    brought, made = (read_split(settings(place), "val") for place in (root, lvis))
    # LVIS splits COCO's images differently
    assert {record.path.parent.name for record in brought.records} == {"train2017", "val2017"}
    assert all(
        record.path.read_bytes() == other.path.read_bytes() and record.image_id == other.image_id
        for record, other in zip(brought.records, made.records, strict=True)
    )
    assert data_check.check(root).ok and len(fingerprints(data)) == 2


def test_archives_are_downloaded_in_parallel(get: Fetch, web: Web, root: Path) -> None:
    together = threading.Barrier(3)

    def with_the_others(to: Handler) -> None:
        try:
            together.wait(300)
        except threading.BrokenBarrierError:
            status(404)(to)
        else:
            file()(to)

    web.plans = {address: [with_the_others] for address in (TRAIN, VAL, BOTH)}
    get()
    check(root, web)
    assert asked(web) == [BOTH, TRAIN, VAL]  # each was requested only once


def leak(content: dict, folder: Path, url: str | None = None) -> None:
    """Add the first training image to the validation split, with its own URL or another URL."""
    train = json.loads((folder / "annotations" / "lvis_v1_train.json").read_text())["images"][0]
    content["images"].append({**train, **({"coco_url": url} if url else {})})


@pytest.mark.parametrize(
    "images, kind", [(False, "image id in two splits"), (True, "same image file in two splits")]
)
def test_an_image_of_both_splits_is_an_error(own_lvis: Path, images: bool, kind: str) -> None:
    change(own_lvis, "val", lambda content: leak(content, own_lvis))
    found = [error.kind for error in data_check.check(own_lvis, images=images).errors]
    assert kind in found


def test_a_copy_under_another_name_is_found_by_its_id(own_lvis: Path) -> None:
    train = json.loads((own_lvis / "annotations" / "lvis_v1_train.json").read_text())["images"][0]
    name = Path(train["coco_url"]).name
    shutil.copy(own_lvis / "train2017" / name, own_lvis / "val2017" / "copy.png")
    change(own_lvis, "val", lambda content: leak(content, own_lvis, "http://x/val2017/copy.png"))
    found = [error.kind for error in data_check.check(own_lvis, images=False).errors]
    assert found == ["image id in two splits"]
    found = [error.kind for error in data_check.check(own_lvis).errors]
    assert "same image file in two splits" in found
