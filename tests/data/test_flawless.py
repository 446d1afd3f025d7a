"""The vectorized check of annotations agrees with the check of each annotation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from vitdet.data.annotation_file import Annotation, Entries, read_entries
from vitdet.data.annotations import AnnotationValidator

THING = {
    "image_id": 1,
    "category_id": 1,
    "bbox": [10, 20, 30, 40],
    "area": 600.5,
    "iscrowd": 0,
    "segmentation": [[10, 20, 40, 30.5, 25, 60]],
}
PARTS = [[10, 20, 40, 20, 40, 30], [12, 50, 20, 50, 20, 60, 12, 60]]
DOT = [[10, 20, 10.5, 20, 10.5, 20.5]]
RLE = {"size": [100, 80], "counts": [2000, 6, 5994]}
Change = dict[str, object]
FAULTS: dict[str, Change] = {
    "none": {},
    "whole numbers": {"area": 600, "segmentation": [[10, 20, 40, 20, 40, 60]]},
    "two parts": {"segmentation": PARTS},
    "a part of two points": {"segmentation": [*PARTS, [1, 2, 3, 4]]},
    "a part of an odd number": {"segmentation": [[1, 2, 3, 4, 5, 6, 7], *PARTS]},
    "no parts": {"segmentation": []},
    "null": {"segmentation": None, "area": None, "iscrowd": None},
    "text in a part": {"segmentation": [[10, 20, "40", 20, 40, 60]]},
    "true in a part": {"segmentation": [[10, 20, True, 20, 40, 60]]},
    "a nested part": {"segmentation": [[[10, 20], [40, 20], [40, 60]]]},
    "a flat outline": {"segmentation": [10, 20, 40, 20, 40, 60]},
    "a line": {"segmentation": [[10, 20, 10, 40, 10, 60]]},
    "far outside": {"segmentation": [[10, 20, 40, 20, 9000, 60]]},
    "too large a number": {"segmentation": [[10, 20, 1e200, 20, 40, 1e308]]},
    "RLE": {"segmentation": RLE},
    "crowd": {"segmentation": RLE, "iscrowd": 1},
    "crowd of polygons": {"iscrowd": 1},
    "crowd of 2": {"iscrowd": 2},
    "crowd as text": {"iscrowd": "0"},
    "crowd as a fraction": {"iscrowd": 0.0},
    "box that differs": {"bbox": [10, 20, 26, 40]},
    "box within rounding": {"bbox": [10.6, 19.2, 30.1, 40.9]},
    "box elsewhere": {"bbox": [50, 70, 20, 20]},
    "corners": {"bbox": [10, 20, 40, 60]},
    "box outside": {"bbox": [90, 20, 30, 40]},
    "box at the edge": {"bbox": [-0.5, 20, 40.5, 40]},
    "box partly outside": {"bbox": [-3, 20, 43, 40]},
    "empty box": {"bbox": [10, 20, 0, 40]},
    "negative box": {"bbox": [10, 20, -1, 40]},
    "box below a pixel": {"bbox": [10, 20, 0.5, 0.5], "area": 0.2, "segmentation": DOT},
    "three numbers": {"bbox": [10, 20, 30]},
    "a large area": {"area": 5000},
    "a small area": {"area": 1},
    "an impossible area": {"area": 1e12},
    "a negative area": {"area": -4},
    "no such image": {"image_id": 77},
    "image without size": {"image_id": 3},
    "image as text": {"image_id": "1"},
    "no such category": {"category_id": 9},
    "the root": {"category_id": 0},
    "a known id": {"id": 1},
    "a known id as text": {"id": "2"},
    "a large id": {"id": 2**63},
    "a huge id": {"id": 2**80},
}


def tree_of(things: list[dict]) -> dict:
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 100, "width": 80} for n in (1, 2)]
    images.append({"id": 3, "file_name": "3.jpg", "height": 0, "width": 80})
    names = [{"id": 0, "name": "all", "supercategory": "none"}]
    names += [{"id": n, "name": f"c{n}", "supercategory": "all"} for n in (1, 2)]
    return {"images": images, "annotations": things, "categories": names}


def outcome(content: dict, lvis: bool, flawless: bool) -> tuple:
    said: list[tuple[str, str, str, str]] = []
    validator = AnnotationValidator(
        lvis,
        lambda *what: said.append(("error", *what)),
        lambda *what: said.append(("warning", *what)),
    )
    table = validator.read_header(content)["annotations"]
    found = [
        (valid.annotation.id, valid.annotation.bbox, valid.segmentation, *valid[2:])
        for valid in validator.annotations(table, flawless)
    ]
    numbers = validator.instances, validator.objects, validator.outlines, validator.count
    return sorted(said) if lvis else said, (validator.categories, *numbers), found


@pytest.mark.parametrize("fault", FAULTS)
def test_both_checks_agree(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block, place in product((1, 3, 1024), (0, 2, 5)):
        monkeypatch.setattr("vitdet.data.annotations.BLOCK", block)
        things = [THING | {"id": n + 1, "image_id": 1 + n % 2} for n in range(6)]
        things[place] = things[place] | copy.deepcopy(FAULTS[fault])
        agree(tree_of(things), tmp_path, lvis=False)


@pytest.mark.parametrize("lost", ["iscrowd", "area", "segmentation", "bbox", "id", "image_id"])
@pytest.mark.parametrize("lvis", [False, True])
def test_both_checks_agree_on_missing_keys(lost: str, lvis: bool, tmp_path: Path) -> None:
    things = [THING | {"id": n + 1} for n in range(4)]
    del things[1][lost]
    agree(tree_of(things), tmp_path, lvis)


def agree(tree: dict, folder: Path, lvis: bool) -> None:
    path = folder / "x.json"
    path.write_text(json.dumps(tree))
    streamed = read_entries(path)
    assert isinstance(streamed["annotations"], Entries)
    said, state, found = outcome(streamed, lvis, True)
    assert (said, state, found) == outcome(json.loads(path.read_text()), lvis, True)
    assert (said, state) == outcome(streamed, lvis, False)[:2]
    warned = {text for _, _, text, _ in said}
    silent = outcome(streamed, lvis, False)[2]
    assert all(row in found for row in silent) and len(silent) <= len(found)
    assert warned or not silent


def test_only_annotations_with_problems_are_checked_individually(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    real: Callable = AnnotationValidator._annotation

    def annotation(self: AnnotationValidator, given: Annotation) -> object:
        looked.append(given.id)
        return real(self, given)

    monkeypatch.setattr(AnnotationValidator, "_annotation", annotation)
    things = [THING | {"id": n} for n in range(9)]
    things[4] |= FAULTS["box that differs"]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(tree_of(things)))
    outcome(read_entries(path), False, True)
    assert looked == [4]
