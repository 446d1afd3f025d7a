"""Annotation files decoded entry by entry equal those decoded by json; records are slices of shared arrays."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.large import write
from vitdet.config import DataConfig
from vitdet.data.annotation_file import Entries, read_entries
from vitdet.data.check import check
from vitdet.data.coco import read_coco
from vitdet.data.dataset import read_split


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set with two small splits, written by tests.helpers.large."""
    folder = tmp_path_factory.mktemp("large")
    write(folder, 60, 300)
    write(folder, 20, 90, "val", first=1000)
    return folder


def test_entries_equal_the_result_of_json(large: Path) -> None:
    path = large / "annotations" / "instances_train.json"
    found, expected = read_entries(path), json.loads(path.read_bytes())
    assert set(found) == {"images", "annotations", "categories"}
    assert len(found["annotations"]) == 300
    for table, entries in found.items():
        assert isinstance(entries, Entries)
        for _ in range(2):
            assert list(entries) == expected[table]


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [{"a": NaN}], "annotations": [], "categories": []}',
        '{"images": [{"a": 1e400, "b": "\\ud800"}], "annotations": [3, null], "categories": [], "info": {}}',
        '{"images": {}, "annotations": [], "categories": []}',
        "[1, 2]",
        '{"images": [1267650600228229401496703205376]}',
    ],
)
def test_invalid_files_have_the_result_of_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    found, expected = read_entries(path), json.loads(text)
    if isinstance(found, dict):
        expected = {table: expected[table] for table in found}
        read = {table: list(part) for table, part in found.items() if isinstance(part, Entries)}
        found |= read
    assert repr(found) == repr(expected)  # NaN is not equal to itself


def test_records_are_equal_however_the_file_was_read(large: Path) -> None:
    path = large / "annotations" / "instances_train.json"
    tree = json.loads(path.read_bytes())
    streamed, whole = read_coco(path, large / "train"), read_coco(path, large / "train", tree=tree)
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in tree["images"]}
    for annotation in tree["annotations"]:
        if not annotation["iscrowd"]:
            of_image[annotation["image_id"]].append(annotation)
    assert streamed.dropped == whole.dropped and streamed.image_counts == whole.image_counts
    for record, other in zip(streamed.records, whole.records, strict=True):
        expected = of_image[record.image_id]
        assert record.path == other.path and record.segmentations == other.segmentations
        assert record.segmentations == [annotation["segmentation"] for annotation in expected]
        boxes = np.array([annotation["bbox"] for annotation in expected], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.array_equal(record.boxes, boxes) and np.array_equal(record.boxes, other.boxes)
        assert record.labels.tolist() == [annotation["category_id"] - 1 for annotation in expected]


def test_slices_of_records_share_arrays_and_keep_no_python_objects(large: Path) -> None:
    records = read_split(DataConfig(root=str(large), train_split="train"), "train").records
    part = records[10:50][::-2]
    assert [record.image_id for record in part] == [records[i].image_id for i in range(49, 9, -2)]
    assert records[-1].image_id == 60 and len(records[60:]) == 0
    with pytest.raises(IndexError):
        records[60]
    assert part.counts().tolist() == [len(record) for record in part]
    assert part.counts().tolist() == [len(labels) for labels in part.labels()]
    assert part.sizes().tolist() == [[record.height, record.width] for record in part]
    assert list(part.paths()) == [record.path for record in part]
    reached, waiting = 0, [records]
    while waiting:
        value = waiting.pop()
        reached += 1
        waiting += [other for other in gc.get_referents(value) if not isinstance(other, type | str)]
    assert reached < 400  # the split has 300 objects with 30 numbers each
    records[0].boxes[:] = -1
    assert (records[0].boxes >= 0).all()


def test_an_image_in_two_splits_is_found_by_reading_images(large: Path) -> None:
    assert check(large, images=False).ok  # IDs and names differ
    (error, *_) = check(large).errors
    # all images are links to the same four files
    assert error.kind == "same image file in two splits" and error.count == 20
