"""Unusual annotations: the result of `data check` for each, and agreement of all readers with it.

The cases include those that fuzzing found.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.annotations import (
    COMPRESSED,
    HEIGHT,
    SQUARE,
    WIDTH,
    document,
    draw_images,
    results,
)
from tests.helpers.readers import judged
from vitdet.config import DataConfig
from vitdet.data.annotation_file import read_entries
from vitdet.data.annotations import WITHOUT_AREA
from vitdet.data.dataset import read_split
from vitdet.data.loader import train_loader
from vitdet.evaluation.evaluator import evaluate_results
from vitdet.evaluation.results import read_truth

SIZE = [HEIGHT, WIDTH]
ELSEWHERE = "box that does not fit its outline (object used for box and class only)"
DIFFERS = "bbox that differs from the box around its outline (training uses bbox)"
NO_PIXELS = "outline without pixels in its image (object used for box and class only)"
NO_OUTLINE = "object without an outline (used for box and class only)"
PARTS = "outline with parts of fewer than 3 points or an odd length (ignored)"
LINE = "name that is not one line of text"
NUMBER = "number stored as a different type (read as an integer)"
NO_IMAGE = "annotation of an unknown image (dropped)"
NO_CATEGORY = "annotation of an unknown category (dropped)"
# Findings that a single changed value may also cause
CONSEQUENCES = {"category without instances", "area that does not fit its box"}
WHOLE = "id that is not a whole number"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A folder whose annotation file is replaced by each test."""
    folder = tmp_path_factory.mktemp("odd")
    draw_images(folder / "val")
    (folder / "annotations").mkdir()
    return DataConfig(root=str(folder), train_split="val", val_split="val", image_size=64)


def kinds(data: DataConfig, content: bytes | dict) -> tuple[set[str], set[str]]:
    """Return the kinds of errors and of added warnings; check that all readers agree with them."""
    plain = {f"{what} (ignored in training)" for what in ("crowd region", "box of zero size")}
    plain.add("image without objects")
    report = judged(data, content if isinstance(content, bytes) else json.dumps(content).encode())
    return {case.kind for case in report.errors}, {case.kind for case in report.warnings} - plain


def changed(table: str, key: str, value: object, index: int = 0) -> dict:
    content = document()
    content[table][index][key] = value
    return content


def without(table: str, key: str) -> dict:
    content = document()
    del content[table][0][key]
    return content


def each(table: str, key: str, values: Iterable[object], kind: str, index: int = 0) -> list[tuple]:
    """Return a case for each value of the key."""
    return [(changed(table, key, value, index), kind) for value in values]


def outlines(values: Iterable[object], kind: str) -> list[tuple]:
    return each("annotations", "segmentation", values, kind)


def run_lengths(values: Iterable[object], kind: str) -> list[tuple]:
    return outlines(({"size": SIZE, "counts": counts} for counts in values), kind)


BROKEN_RUNS = [
    "",
    "\x7f",
    "0`1`n",
    "ä",
    "o" * 8,
    "oooooooo0",
    [1.5, 3070.5],
    [-1, 3073],
    [True],
    None,
]
SHORT_RUNS = ["0`1`n3", "0", [3071], [], [2**32 + 3072]]
NOT_FINITE = [float("nan"), float("inf"), "30", None, 10**400, [1]]
BOXES = [[1, 2, 3], [1, 2, 3, float("nan")], ["1", 2, 3, 4], [True, 2, 3, 4], [1, 2, 3, 10**400]]
BOXES += [None, "1 2 3 4", {"x": 1}]
SIDES = [0, -1, 48.5, "high", None, 2**16, True]
LEAVING = ["../val/1.png", "/etc/passwd", "a/../../val/1.png"]
FAR = [[-100, 0, 120, 20], [0, 0, 1e39, 20], [0, 0, 10**200, 10**200], [0, 0, 0, 1e39]]
PAIRS = [[[10, 10], [30, 10], [30, 30], [10, 30]]]
AREAS = [-1, float("nan"), float("inf"), "400", True, 1e11, 10**400]
NEEDED = {
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "images": ("id", "width", "height", "file_name"),
    "categories": ("id", "name"),
}
ERRORS = [
    *each("annotations", "id", (1.5, "1.0", "one", True, None, [1]), f"annotation {WHOLE}"),
    *each("images", "id", (3.5, "three", True, None), f"image {WHOLE}", 2),
    *each("categories", "id", (3.5, "three", True, None), f"category {WHOLE}", 1),
    (changed("annotations", "id", 2**63), "annotation id of more than 64 bits"),
    *each("annotations", "iscrowd", (2, 0.5, "no", [0]), "iscrowd that is neither 0 nor 1"),
    *run_lengths(BROKEN_RUNS, "RLE whose counts are not run lengths"),
    *run_lengths(SHORT_RUNS, "RLE whose counts do not add up to its size"),
    *outlines([COMPRESSED | {"size": SIZE[::-1]}], "RLE whose size differs from the image size"),
    *outlines([COMPRESSED | {"size": [48.5, 64]}], "RLE without size [height, width]"),
    *outlines(("x", 5, True), "segmentation that is neither polygons nor RLE"),
    *outlines([[5]], "polygon that is not a list [x, y, x, y, ...]"),
    *outlines(
        (PAIRS, *([[*SQUARE[:-1], value]] for value in NOT_FINITE)),
        "polygon with coordinates that are not finite numbers",
    ),
    *outlines(
        ([[*SQUARE[:-1], value]] for value in (129, -65, 1e308)), "polygon far outside its image"
    ),
    *each("annotations", "bbox", BOXES, "bbox that is not four finite numbers"),
    *each("annotations", "bbox", FAR, "box far outside its image"),
    *each("annotations", "area", AREAS, "area that is not a number of pixels"),
    *each("categories", "name", (None, ["a"], "\ud800", "a\nb"), f"category {LINE}"),
    *each("images", "file_name", ("", None, "x\ny", "a\0b"), f"file {LINE}"),
    *each("images", "file_name", LEAVING, "file name that points outside its folder"),
    *each("images", "file_name", ["none.png"], "missing image file"),
    *each("images", "file_name", ("é" * 300, "\ud800"), "image file that cannot be read"),
    *each("images", "height", SIDES, "image height that is not a whole number from 1 to 65535"),
    *each("images", "width", SIDES, "image width that is not a whole number from 1 to 65535"),
    *(
        (without(table, key), f"{table[:-1].replace('ie', 'y')} without {key!r}")
        for table, keys in NEEDED.items()
        for key in keys
    ),
    (document() | {"annotations": None}, "'annotations' is not a list"),
    (document() | {"annotations": [None]}, "annotation that is not a JSON object"),
    (document() | {"annotations": []}, "no objects"),
]


@pytest.mark.parametrize(("content", "kind"), ERRORS, ids=[kind for _, kind in ERRORS])
def test_readers_reject_what_check_rejects(data: DataConfig, content: dict, kind: str) -> None:
    assert kind in kinds(data, content)[0]


NO_CROWD = "annotation without 'iscrowd' (read as 0)"
OUTSIDE = "box outside its image (ignored in training)"
TOLERATED = [
    *each("annotations", "id", (-7, 2**63 - 1), ""),
    *each("annotations", "iscrowd", [True], ""),
    *each("categories", "image_count", [10**400], ""),
    *each("annotations", "bbox", [[10, 10, 19, 21]], ""),  # rounding
    *each("annotations", "bbox", [[10, 10, 20, 15]], DIFFERS),
    *each("annotations", "bbox", [[64, 10, 20, 20]], OUTSIDE),
    *each("annotations", "bbox", [[-1.5, 0, 2.5, HEIGHT]], "box partly outside its image", 4),
    *outlines([COMPRESSED], ELSEWHERE),
    *outlines([[[5, 5] * 3], [[70, 10, 90, 10, 90, 30]]], NO_PIXELS),  # a point; outside the image
    *run_lengths(([0, 0, 3072], [3072]), NO_PIXELS),
    *outlines(([], None), NO_OUTLINE),
    *outlines([[SQUARE, [1, 2, 3, 4]]], PARTS),
    *each("annotations", "id", (1.0, "1"), NUMBER),
    *each("annotations", "image_id", (1.0, "1"), NUMBER),
    *each("annotations", "category_id", (1.0, "1"), NUMBER),
    *each("annotations", "iscrowd", (0.0, "0"), NUMBER),
    *each("images", "id", (3.0, "3"), NUMBER, 2),
    *each("images", "height", (48.0, "48"), NUMBER),
    *each("images", "width", (64.0, "64"), NUMBER),
    *each("categories", "id", (3.0, "3"), NUMBER, 1),
    *each("annotations", "image_id", (True, -1, None, 1.5), NO_IMAGE),
    *each("annotations", "category_id", (True, 2**63, None), NO_CATEGORY),
    *each("annotations", "iscrowd", [None], NO_CROWD),
    *each("annotations", "area", [None], WITHOUT_AREA),
    *each("annotations", "area", [4000.0], "area that does not fit its box"),
    (without("annotations", "area"), WITHOUT_AREA),
    (without("annotations", "iscrowd"), NO_CROWD),
    (without("annotations", "segmentation"), NO_OUTLINE),
    *each("categories", "name", ["bar"], "duplicate category name"),
    *each("images", "file_name", ["2.png"], "file shared by several images"),
]


@pytest.mark.parametrize(("content", "kind"), TOLERATED)
def test_readers_accept_what_check_tolerates(data: DataConfig, content: dict, kind: str) -> None:
    errors, warnings = kinds(data, content)
    expected = {kind} - {""}
    assert not errors and expected <= warnings <= expected | CONSEQUENCES


CORNERS = "bbox that looks like corners"


def every(key: str, change: Callable[[object], object]) -> dict:
    """Return the document without its empty box, with a value changed in every annotation."""
    content = document()
    del content["annotations"][2]
    for annotation in content["annotations"]:
        annotation[key] = change(annotation[key])
    return content


@pytest.mark.parametrize(
    ("key", "change", "kind"),
    [
        ("image_id", lambda _: 77, NO_IMAGE),
        ("category_id", lambda _: 77, NO_CATEGORY),
        ("bbox", lambda box: [side / 64 for side in box], "box smaller than a pixel"),
        ("bbox", lambda box: [box[1] + 9, box[0] + 30, 12, 8], ELSEWHERE),
        ("bbox", lambda box: [10, 10, 30, 30] if box[0] else [0, 0, 1, HEIGHT], CORNERS),
    ],
)
def test_a_fault_in_most_objects_is_an_error(
    data: DataConfig, key: str, change: Callable, kind: str
) -> None:
    assert f"most objects: {kind}" in kinds(data, every(key, change))[0]


def test_objects_with_outlines_outside_the_image_keep_their_boxes(
    data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    content = every("segmentation", lambda _: [[70, 10, 90, 10, 90, 30]])
    errors, warnings = kinds(data, content)
    assert not errors and NO_PIXELS in warnings
    batch = next(iter(train_loader(replace(data, scale_range=(1.0, 1.0), workers=0), 2, 0, 0, 1)))
    assert any(len(target) for target in batch.targets)
    assert not any(target.has_mask.any() for target in batch.targets)
    assert "box and class only: 3 with an outline that has no pixels in the image" in caplog.text
    assert "objects ignored in training: 1 marked as crowd" in caplog.text


def test_boxes_given_as_corners_are_recognized_without_outlines(data: DataConfig) -> None:
    content = every("segmentation", lambda _: [])
    for annotation in content["annotations"]:
        annotation["bbox"] = [40, 20, 60, 40]
    assert f"most objects: {CORNERS}" in kinds(data, content)[0]


SOUND = json.dumps(document()).encode()
DEEP_INSIDE = SOUND.replace(b"48", b"[" * 5000 + b"]" * 5000, 1)
BROKEN = {
    "empty": (b"", "the file is empty"),
    "gzip": (gzip.compress(SOUND), "compressed with gzip"),
    "truncated": (SOUND[:-100], "line 1 column"),
    "latin-1": (SOUND.replace(b"disc", "Fläche".encode("latin-1")), "utf-8"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep inside": (DEEP_INSIDE, "nested too deeply|is not a whole number"),
    "half utf-16": (b"\xff\xfe\x00", "utf"),
    "more": (SOUND + b"}", "Extra data"),
    "number": (SOUND.replace(b"[10.0", b"[10.", 1), "line 1 column"),
    "bracket": (b'{"images": [}', "line 1 column"),
    "escape": (b'{"images": ["\\x"]}', "line 1 column"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_an_invalid_file_is_refused(data: DataConfig, content: bytes, message: str) -> None:
    assert kinds(data, content)[0]
    path = Path(data.root, "annotations", "instances_val.json")
    for read in (lambda: read_split(data, "val"), lambda: read_truth(path)):
        with pytest.raises(ValueError, match=f"instances_val.json: .*({message})"):
            read()


@pytest.mark.parametrize(
    "content", [SOUND.decode().encode(code) for code in ("utf-8-sig", "utf-16", "utf-32-be")]
)
def test_other_encodings_of_json_are_read(data: DataConfig, content: bytes) -> None:
    assert kinds(data, content) == (set(), set())


@pytest.mark.parametrize("first", ['"images": 3', '"images": [{"id": 9}]', '"annotations": null'])
def test_the_last_of_duplicate_keys_wins(data: DataConfig, first: str) -> None:
    assert kinds(data, b"{" + first.encode() + b", " + SOUND[1:]) == (set(), set())
    twice = SOUND.replace(b'"id": 1,', b'"id": "x", "id": 1,')
    assert kinds(data, twice) == (set(), set())
    path = Path(data.root, "annotations", "instances_val.json")
    assert len(list(read_entries(path)["images"])) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": COMPRESSED | {"counts": "äao2"}}, "RLE whose counts are not run lengths"),
        ({"image_id": "a\nb"}, r"no image 'a\\nb'"),
        ({"score": 10**400}, "score must be"),
        ({"score": [1]}, "score must be"),
        ({"bbox": [10**400, 0, 0.5, 1]}, "bbox must be"),
        ({"segmentation": [[1e9] * 6]}, "polygon far outside its image"),
        (None, "results.json: not readable as JSON .lists or objects are nested too deeply"),
    ],
)
def test_odd_results_are_refused_in_one_line(
    tmp_path: Path, change: dict | None, message: str
) -> None:
    path, truth = tmp_path / "results.json", tmp_path / "truth.json"
    found = [result | {"segmentation": COMPRESSED} for result in results()]
    truth.write_text(json.dumps(document()))
    path.write_text(json.dumps(found))
    assert evaluate_results(path, truth)
    found[1] |= change or {}
    path.write_text(json.dumps(found) if change else "[" * 100_000)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_results(path, truth)
    assert "results.json" in str(caught.value) and "\n" not in str(caught.value)
