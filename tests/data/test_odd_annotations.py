"""Unusual annotations: the result of `data check` for each, and agreement of all readers with it.

What fuzzing found stands here as well.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
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
ELSEWHERE = "box that does not fit its outline (trains box and class only)"
DIFFERS = "box that differs from the one around its outline (training uses the box)"
NO_PIXELS = "outline without pixels in its image (trains box and class only)"
NO_OUTLINE = "object without an outline (trains box and class only)"
PARTS = "outline with parts of fewer than 3 points (ignored)"
NUMBER = "number of another type (read as a whole number)"
NO_IMAGE = "annotation of an unknown image (dropped)"
NO_CATEGORY = "annotation of an unknown category (dropped)"
TEXT_SIDES = [("height", 48.0), ("height", "48"), ("width", 64.0), ("width", "64")]
# What may follow from the change of one value
CONSEQUENCES = {"category without instances", "area that does not fit its box"}
WHOLE = "id that is not a whole number"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A folder whose annotation file each test replaces."""
    folder = tmp_path_factory.mktemp("odd")
    draw_images(folder / "val")
    (folder / "annotations").mkdir()
    return DataConfig(root=str(folder), train_split="val", val_split="val", image_size=64)


def kinds(data: DataConfig, content: bytes | dict) -> tuple[set[str], set[str]]:
    """Errors and warnings of the file, beside the warnings of a sound one; all readers agree with them."""
    plain = {
        "crowd region (ignored in training)",
        "image without objects",
        "box of zero size (ignored in training)",
    }
    report = judged(data, content if isinstance(content, bytes) else json.dumps(content).encode())
    return {one.kind for one in report.errors}, {one.kind for one in report.warnings} - plain


def changed(table: str, key: str, value: object, index: int = 0) -> dict:
    content = document()
    content[table][index][key] = value
    return content


def without(table: str, key: str) -> dict:
    content = document()
    del content[table][0][key]
    return content


ERRORS = [
    *(
        (changed("annotations", "id", value), f"annotation {WHOLE}")
        for value in (1.5, "1.0", "one", True, None, [1])
    ),
    *(
        (changed("images", "id", value, 2), f"image {WHOLE}")
        for value in (3.5, "three", True, None)
    ),
    *(
        (changed("categories", "id", value, 1), f"category {WHOLE}")
        for value in (3.5, "three", True, None)
    ),
    (changed("annotations", "id", 2**63), "annotation id of more than 64 bits"),
    *(
        (changed("annotations", "iscrowd", value), "iscrowd that is neither 0 nor 1")
        for value in (2, 0.5, "no", [0])
    ),
    *(
        (
            changed("annotations", "segmentation", {"size": SIZE, "counts": counts}),
            "RLE whose counts are not run lengths",
        )
        for counts in (
            "",
            "\x7f",
            "0`1`n",
            "ä",
            "o" * 8,
            "oooooooo0",
            [1.5, 3070.5],
            [-1, 3073],
            ["3072"],
            [True],
            None,
        )
    ),
    *(
        (
            changed("annotations", "segmentation", {"size": SIZE, "counts": counts}),
            "RLE whose counts do not fill its size",
        )
        for counts in ("0`1`n3", "0", [3071], [], [2**32 + 3072])
    ),
    (
        changed("annotations", "segmentation", COMPRESSED | {"size": SIZE[::-1]}),
        "RLE of another size than its image",
    ),
    (
        changed("annotations", "segmentation", COMPRESSED | {"size": [48.5, 64]}),
        "RLE without size [height, width]",
    ),
    *(
        (
            changed("annotations", "segmentation", value),
            "segmentation that is neither polygons nor RLE",
        )
        for value in ("x", 5, True)
    ),
    *(
        (
            changed("annotations", "segmentation", [SQUARE[:-1] + [value]]),
            "polygon with coordinates that are not finite numbers",
        )
        for value in (float("nan"), float("inf"), "30", None, 10**400, [1])
    ),
    *(
        (
            changed("annotations", "segmentation", [SQUARE[:-1] + [value]]),
            "polygon far outside its image",
        )
        for value in (129, -65, 1e9, 1e308)
    ),
    *(
        (changed("annotations", "bbox", value), "bbox that is not four finite numbers")
        for value in (
            [1, 2, 3],
            [1, 2, 3, 4, 5],
            [1, 2, 3, float("nan")],
            [1, 2, float("inf"), 4],
            ["1", 2, 3, 4],
            [True, 2, 3, 4],
            [1, 2, 3, 10**400],
            None,
            "1 2 3 4",
            {"x": 1},
        )
    ),
    *(
        (changed("annotations", "bbox", value), "box far outside its image")
        for value in (
            [-100, 0, 120, 20],
            [0, 0, 1e39, 20],
            [0, 0, 10**200, 10**200],
            [0, 0, 0, 1e39],
        )
    ),
    *(
        (changed("annotations", "area", value), "area that is not a number of pixels")
        for value in (-1, float("nan"), float("inf"), "400", True, 1e11)
    ),
    *(
        (changed("categories", "name", value), "category name that is not text")
        for value in (None, 5, ["a"], "\ud800", "a\nb")
    ),
    *(
        (changed("images", "file_name", value), "file name that leaves its folder")
        for value in ("../val/1.png", "/etc/passwd", "a/../../val/1.png")
    ),
    *(
        (changed("images", "file_name", value), "file name that is not text")
        for value in ("", None, 1, "x\ny", "a\0b")
    ),
    (changed("annotations", "segmentation", [5]), "polygon that is not a list x, y, x, y, ..."),
    (changed("images", "file_name", "none.png"), "missing image file"),
    *(
        (changed("images", "file_name", value), "image file that cannot be read")
        for value in ("é" * 300, "\ud800")
    ),
    *(
        (
            changed("images", side, value),
            f"image {side} that is not a whole number from 1 to 65535",
        )
        for side in ("height", "width")
        for value in (0, -1, 48.5, "high", None, 2**16, True)
    ),
    *(
        (without(table, key), f"{table[:-1].replace('ie', 'y')} without {key!r}")
        for table, key in (
            ("annotations", "id"),
            ("annotations", "image_id"),
            ("annotations", "category_id"),
            ("annotations", "bbox"),
            ("images", "id"),
            ("images", "width"),
            ("images", "height"),
            ("images", "file_name"),
            ("categories", "id"),
            ("categories", "name"),
        )
    ),
    (document() | {"annotations": None}, "'annotations' is not a list"),
    (document() | {"annotations": [None]}, "annotation that is not an object"),
    (document() | {"annotations": []}, "no objects"),
]


@pytest.mark.parametrize(
    ("content", "kind"), ERRORS, ids=[f"{number}-{kind}" for number, (_, kind) in enumerate(ERRORS)]
)
def test_an_error_is_one_for_all_readers(data: DataConfig, content: dict, kind: str) -> None:
    assert kind in kinds(data, content)[0]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (changed("annotations", "id", -7), ""),
        (changed("annotations", "id", 2**63 - 1), ""),
        (changed("annotations", "iscrowd", True), ""),
        (changed("annotations", "segmentation", COMPRESSED), ELSEWHERE),
        (changed("annotations", "segmentation", {"size": SIZE, "counts": [0, 0, 3072]}), NO_PIXELS),
        (changed("annotations", "segmentation", [[5, 5] * 3]), NO_PIXELS),  # a point
        (changed("annotations", "bbox", [10, 10, 20, 15]), DIFFERS),
        (changed("annotations", "bbox", [10, 10, 19, 21]), ""),  # rounding
        (changed("annotations", "segmentation", [[70, 10, 90, 10, 90, 30]]), NO_PIXELS),
        (changed("annotations", "segmentation", {"size": SIZE, "counts": [3072]}), NO_PIXELS),
        *((changed("annotations", "segmentation", value), NO_OUTLINE) for value in ([], None)),
        (without("annotations", "segmentation"), NO_OUTLINE),
        (changed("annotations", "segmentation", [SQUARE, [1, 2, 3, 4]]), PARTS),
        *((changed("annotations", "id", value), NUMBER) for value in (1.0, "1")),
        *((changed("images", "id", value, 2), NUMBER) for value in (3.0, "3")),
        *((changed("categories", "id", value, 1), NUMBER) for value in (3.0, "3")),
        *((changed("annotations", "image_id", value), NUMBER) for value in (1.0, "1")),
        *((changed("annotations", "category_id", value), NUMBER) for value in (1.0, "1")),
        *((changed("annotations", "iscrowd", value), NUMBER) for value in (0.0, "0")),
        *((changed("images", side, value), NUMBER) for side, value in TEXT_SIDES),
        *((changed("annotations", "image_id", value), NO_IMAGE) for value in (True, -1, None, 1.5)),
        *(
            (changed("annotations", "category_id", value), NO_CATEGORY)
            for value in (True, 2**63, None)
        ),
        (
            changed("annotations", "bbox", [64, 10, 20, 20]),
            "box outside its image (ignored in training)",
        ),
        (changed("annotations", "iscrowd", None), "annotation without 'iscrowd' (read as 0)"),
        (changed("annotations", "area", None), WITHOUT_AREA),
        (without("annotations", "area"), WITHOUT_AREA),
        (without("annotations", "iscrowd"), "annotation without 'iscrowd' (read as 0)"),
        (changed("annotations", "bbox", [-1.5, 0, 2.5, HEIGHT], 4), "box partly outside its image"),
        (changed("categories", "name", "bar"), "duplicate category name"),
        (changed("annotations", "area", 4000.0), "area that does not fit its box"),
        (changed("images", "file_name", "2.png"), "file shared by several images"),
        (changed("categories", "image_count", 10**400), ""),
    ],
)
def test_what_is_tolerated_is_tolerated_by_all(data: DataConfig, content: dict, kind: str) -> None:
    errors, warnings = kinds(data, content)
    expected = {kind} - {""}
    assert not errors and expected <= warnings <= expected | CONSEQUENCES


def every(key: str, change: Callable[[object], object]) -> dict:
    """The document without its box of zero size, with a value of each annotation changed."""
    content = document()
    del content["annotations"][2]
    for one in content["annotations"]:
        one[key] = change(one[key])
    return content


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (every("image_id", lambda _: 77), f"most objects: {NO_IMAGE}"),
        (every("category_id", lambda _: 77), f"most objects: {NO_CATEGORY}"),
        (
            every("bbox", lambda box: [side / 64 for side in box]),
            "most objects: box smaller than a pixel",
        ),
        (every("bbox", lambda box: [box[1] + 9, box[0] + 30, 12, 8]), f"most objects: {ELSEWHERE}"),
        (
            every("bbox", lambda box: [10, 10, 30, 30] if box[0] else [0, 0, 1, HEIGHT]),
            "most objects: bbox that looks like corners",
        ),
    ],
)
def test_what_is_wrong_with_most_objects_is_an_error(
    data: DataConfig, content: dict, kind: str
) -> None:
    assert kind in kinds(data, content)[0]


def test_outlines_outside_of_their_images_leave_boxes_to_train(
    data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    content = every("segmentation", lambda _: [[70, 10, 90, 10, 90, 30]])
    errors, warnings = kinds(data, content)
    assert not errors and NO_PIXELS in warnings
    batch = next(iter(train_loader(replace(data, scale_range=(1.0, 1.0), workers=0), 2, 0, 0, 1)))
    assert any(len(target) for target in batch.targets)
    assert not any(target.has_mask.any() for target in batch.targets)
    assert "box and class only: 3 with an outline that has no pixels in its image" in caplog.text
    assert "objects ignored in training: 1 crowd" in caplog.text


def test_corners_are_recognized_without_outlines(data: DataConfig) -> None:
    content = every("segmentation", lambda _: [])
    for one in content["annotations"]:
        one["bbox"] = [40, 20, 60, 40]
    assert "most objects: bbox that looks like corners" in kinds(data, content)[0]


SOUND = json.dumps(document()).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (gzip.compress(SOUND), "compressed with gzip"),
        (SOUND[:-100], "line 1 column"),
        (SOUND.replace(b"disc", "Fläche".encode("latin-1")), "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (
            SOUND.replace(b"48", b"[" * 5000 + b"]" * 5000, 1),
            "nested too deeply|is not a whole number",
        ),
        (b"\xff\xfe\x00", "utf"),
        (SOUND + b"}", "Extra data"),
        (SOUND.replace(b"[10.0", b"[10.", 1), "line 1 column"),
    ],
    ids=[
        "empty",
        "gzip",
        "truncated",
        "latin-1",
        "deep",
        "deep inside",
        "half utf-16",
        "more",
        "number",
    ],
)
def test_a_broken_file_is_refused_with_the_reason(
    data: DataConfig, content: bytes, message: str
) -> None:
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
def test_of_a_key_that_comes_twice_the_last_counts(data: DataConfig, first: str) -> None:
    assert kinds(data, b"{" + first.encode() + b", " + SOUND[1:]) == (set(), set())
    twice = SOUND.replace(b'"id": 1,', b'"id": "x", "id": 1,')
    assert kinds(data, twice) == (set(), set())
    assert (
        len(list(read_entries(Path(data.root, "annotations", "instances_val.json"))["images"])) == 3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: one["segmentation"].update(counts="äao2"),
            "RLE whose counts are not run lengths",
        ),
        (lambda one: one.update(image_id="a\nb"), r"no image 'a\\nb'"),
        (lambda one: one.update(score=10**400), "score must be"),
        (lambda one: one.update(score=[1]), "score must be"),
        (lambda one: one.update(bbox=[10**400, 0, 0.5, 1]), "bbox must be"),
        (lambda one: one.update(segmentation=[[1e9] * 6]), "polygon far outside its image"),
    ],
)
def test_odd_results_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    found = [one | {"segmentation": dict(COMPRESSED)} for one in results()]
    (tmp_path / "truth.json").write_text(json.dumps(document()))
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert evaluate_results(tmp_path / "results.json", tmp_path / "truth.json")
    change(found[1])
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_results(tmp_path / "results.json", tmp_path / "truth.json")
    assert "results.json" in str(caught.value) and "\n" not in str(caught.value)


def test_results_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text(json.dumps(document()))
    (tmp_path / "results.json").write_bytes(b"[" * 100_000)
    with pytest.raises(
        ValueError,
        match="results.json: not readable as JSON .lists or objects are nested too deeply",
    ):
        evaluate_results(tmp_path / "results.json", tmp_path / "truth.json")
