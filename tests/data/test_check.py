"""`data check` on a damaged data set: every problem is listed with its location."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from tests.helpers.annotations import document, draw_images
from vitdet.data.check import Report, check
from vitdet.data.segmentation import read_outline

COCO_SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "coco-sample"


def write(folder: Path, split: str, content: dict | str) -> None:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations" / f"instances_{split}.json").write_text(text)


def kinds(report: Report) -> tuple[dict[str, int], dict[str, int]]:
    return {f.kind: f.count for f in report.errors}, {f.kind: f.count for f in report.warnings}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for split, first_id in (("train", 1), ("val", 11)):
        write(folder, split, document(first_id))
        draw_images(folder / split, first_id)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def test_a_valid_folder_has_warnings_for_objects_that_training_omits(sound: Path) -> None:
    report = check(sound)
    assert report.ok and report.splits == {"train": (3, 5, 2), "val": (3, 5, 2)}
    left_out = ("crowd region (ignored in training)", "box of zero size (ignored in training)")
    assert kinds(report) == ({}, dict.fromkeys(("image without objects", *left_out), 2))
    lines = report.lines()
    counts = "(images: 3, annotations: 5, categories: 2)"
    assert lines[1:4] == [f"  train {counts}", f"  val {counts}", "errors: none"]
    assert "      instances_train.json: annotation 2 (image 2)" in lines


def test_real_pictures_and_the_tiny_data_set_pass(tmp_path: Path) -> None:
    from vitdet.demo.tiny import make_tiny

    make_tiny(tmp_path / "tiny", 12, 8)
    assert not kinds(check(tmp_path / "tiny"))[0]
    if not COCO_SAMPLE.is_dir():
        pytest.skip("needs ../shared")
    report = check(COCO_SAMPLE)
    assert not report.errors and len(report.splits) == 2


def set_value(table: str, index: int, key: str, value: object) -> Callable[[dict], None]:
    return lambda content: content[table][index].__setitem__(key, value)


def delete(table: str, index: int, key: str) -> Callable[[dict], None]:
    return lambda content: content[table][index].__delitem__(key)


def outline(index: int, value: object) -> Callable[[dict], None]:
    return set_value("annotations", index, "segmentation", value)


FAULTS = [  # test_odd_annotations.py covers all kinds
    (set_value("annotations", 1, "id", 1), "duplicate annotation id", "annotation 1: entry 1"),
    (set_value("images", 1, "id", 1), "duplicate image id", "image 1: entry 1"),
    (set_value("categories", 1, "id", 1), "duplicate category id", "category 1: entry 1"),
    (set_value("images", 1, "height", 0), "image height that is not a whole", "image 2: 0"),
    (set_value("images", 1, "width", 63), "image size that differs", "64 x 48, annotated 63 x 48"),
    (set_value("images", 1, "file_name", "none.png"), "missing image file", "train/'none.png'"),
    (set_value("annotations", 0, "bbox", [1, 2, 3]), "bbox that is not four", "[1, 2, 3]"),
    (outline(0, [5]), "polygon that is not a list [x, y, x, y, ...]", "5"),
    (outline(0, [[[1, 2]] * 6]), "polygon with coordinates that are not", "annotation 1"),
    (outline(1, {"size": [64, 48], "counts": [3072]}), "RLE whose size differs", "[64, 48]"),
    (outline(1, {"size": [48, 64], "counts": [5, 6]}), "RLE whose counts do not", "11 instead of"),
    (outline(1, {"counts": [1]}), "RLE without size [height, width]", "None"),
    (delete("annotations", 0, "image_id"), "annotation without 'image_id'", "annotation 1"),
    (delete("categories", 0, "id"), "category without 'id'", "category entry 0"),
    (lambda tree: tree["images"].append("x"), "image that is not a JSON object", "'x'"),
    (lambda tree: tree.pop("images"), "no 'images' in the file", "annotations"),
    (lambda tree: tree.update(categories={}), "'categories' is not a list", "{}"),
]


@pytest.mark.parametrize(("damage", "kind", "example"), FAULTS)
def test_an_error_states_its_place(folder: Path, damage: Callable, kind: str, example: str) -> None:
    content = document()
    damage(content)
    write(folder, "train", content)
    report = check(folder)
    found = [finding.examples[0] for finding in report.errors if finding.kind.startswith(kind)]
    assert found and example in found[0] and "instances_train.json" in found[0], report.lines()


def test_all_problems_are_listed_at_once_with_counts_and_three_examples(folder: Path) -> None:
    content = document()
    for index in range(5):
        content["annotations"][index]["category_id"] = 77
    content["images"][2]["height"] = "high"
    write(folder, "train", content)
    write(folder, "val", '{"images": [], \n "annotations": [,]}')
    report = check(folder)
    assert kinds(report)[0] == {
        "most objects: annotation of an unknown category (dropped)": 1,
        "image height that is not a whole number from 1 to 65535": 1,
        "invalid JSON": 1,
    }
    text = report.lines()
    assert sum("category 77" in line for line in text) == 3 and "      ..." in text
    assert any("line 2 column 18" in line for line in text)


NO_UNICODE = "\ud800".encode("utf-8", "surrogatepass").decode("latin1")


@pytest.mark.parametrize("text", ["[1, 2]", "null", '{"images": 1e999}', NO_UNICODE])
def test_an_invalid_annotation_file_is_an_error(folder: Path, text: str) -> None:
    write(folder, "train", text)
    report = check(folder, ["train"])
    assert not report.ok and "instances_train.json" in report.errors[0].examples[0]


def test_damaged_and_missing_images_are_distinguished(folder: Path) -> None:
    whole = (folder / "train" / "1.png").read_bytes()
    (folder / "train" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "2.png").write_text("<html>not found</html>")
    (folder / "train" / "3.png").unlink()
    report = check(folder)
    assert kinds(report)[0] == {"truncated or invalid image file": 2, "missing image file": 1}
    assert kinds(check(folder, images=False))[0] == {"missing image file": 1}


def test_an_exif_rotated_image_has_the_size_of_the_upright_image(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(folder / "train" / "1.png", "JPEG", exif=exif)
    assert check(folder).ok


def test_the_same_picture_in_two_splits_is_an_error_under_any_name(folder: Path) -> None:
    shutil.copy(folder / "train" / "2.png", folder / "val" / "13.png")
    assert kinds(check(folder))[0] == {"same image file in two splits": 1}


def test_the_same_ids_in_two_splits_are_an_error_unless_the_pictures_differ(folder: Path) -> None:
    write(folder, "val", document())
    for number in (1, 2, 3):
        (folder / "val" / f"1{number}.png").rename(folder / "val" / f"{number}.png")
    shared = {"image id in two splits": 3, "file name in two splits": 3}
    assert kinds(check(folder, images=False))[0] == shared
    errors, warnings = kinds(check(folder))
    assert not errors and shared.items() <= warnings.items()


def test_categories_that_differ_between_splits_are_an_error(folder: Path) -> None:
    content = document()
    content["categories"][0]["name"] = "cross"
    write(folder, "train", content)
    assert "categories that differ between splits" in kinds(check(folder))[0]


def test_a_missing_folder_or_split_is_an_error(folder: Path) -> None:
    assert kinds(check(folder / "nowhere"))[0] == {"no annotation file": 1}
    assert "instances_test.json" in check(folder, ["train", "test"]).lines()[4]


def test_compressed_run_lengths_are_accepted() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 9), (48, 64), (300, 500)):
        for density in (0.0, 0.01, 0.5, 1.0):
            code = rle.encode(np.asfortranarray(rng.random(size) < density, dtype=np.uint8))
            text = code["counts"].decode()
            found = read_outline({"size": list(size), "counts": text}, size)
            x, y, width, height = rle.toBbox(code).tolist()
            assert found.problem is None
            assert found.box == ((x, y, x + width, y + height) if width else None)
            assert read_outline({"size": list(size), "counts": text + "1"}, size).problem
            assert read_outline({"size": [size[0] + 1, size[1]], "counts": text}, None).problem
