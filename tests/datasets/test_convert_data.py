"""`vitdet data convert` from YOLO and Pascal VOC."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from vitdet.data.check import check
from vitdet.data.coco import read_coco
from vitdet.data.masks import decode

Run = Callable[..., tuple[int, str, str]]
OBJECT = (
    "<object><name>{}</name>{}<bndbox><ymin>{}</ymin><xmin>{}</xmin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    "</object>"
)
BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<annotation><filename>&b;</filename></annotation>"
)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def image(path: Path, size: tuple = (100, 50), value: int = 0, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (value, 90, 90)).save(path, exif=exif)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    root = tmp_path / "yolo"
    places = "path: ../datasets/yolo\ntrain: images/train\nval: [images/val.txt]\n"
    write(root / "data.yaml", f"{places}names: {{0: no, 1: dog}}\n")
    for number, name in enumerate(("train/a.jpg", "train/b.jpg", "train/none.png", "val/a.jpg")):
        image(root / "images" / name, value=40 * number)
    image(root / "images" / "train" / "turned.jpg", value=200, orientation=6)
    write(root / "images" / "val.txt", "./val/a.jpg\n\n")
    twice = "1 0.5 0.5 0.2 0.4\n" * 2
    write(root / "labels/train/a.txt", f"{twice}0 0.95 0.5 0.2 0.4\n")
    write(root / "labels/train/b.txt", "0 0.1 0.2 0.5 0.2 0.5 0.8\n")
    write(root / "labels/train/turned.txt", "1 0.5 0.5 1 0.1\n")
    write(root / "labels/val/a.txt", "")
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "voc"
    for number, name in enumerate(("one", "two")):
        image(root / "JPEGImages" / f"{name}.jpg", value=60 * number)
    size = "<size><width>100</width><height>50</height><depth>3</depth></size>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    things = OBJECT.format("dog", part, 1, 1, 10, 20)
    things += OBJECT.format("cat", "<difficult>1</difficult>", 11, 31, 100, 50)
    write(root / "Annotations" / "one.xml", f"<annotation>{size}{things}</annotation>")
    two = OBJECT.format("cat", "", 5, 5, 5, 5.5)
    write(root / "Annotations" / "two.xml", f"<annotation>{two}</annotation>")
    lists = {"train": "one\n", "val": "two\n", "trainval": "one\ntwo\n", "dog_train": "one  1\n"}
    for split, ids in lists.items():
        write(root / "ImageSets" / "Main" / f"{split}.txt", ids)
    numbers = np.zeros((50, 100), np.uint8)
    numbers[0:20, 0:8], numbers[20, 0:8] = 1, 255
    picture = Image.fromarray(numbers).convert("P")
    picture.putpalette([value for k in range(256) for value in (k, 255 - k, 128)])
    (root / "SegmentationObject").mkdir()
    picture.save(root / "SegmentationObject" / "one.png")
    return root


def tree(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def test_yolo_is_converted(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    code, output, errors = vitdet("data", "convert", yolo, "out")
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "out: 2 classes; train 4 images, 4 objects; val 1 image, 0 objects",
        "  3 x objects with a box but no mask (--boxes-as-masks converts boxes to masks)",
        "  1 x duplicate rows removed",
        "  1 x images without a label file (no objects)",
    ]
    out = tmp_path / "out"
    train = tree(out, "train")
    assert train["categories"] == [{"id": 1, "name": "no"}, {"id": 2, "name": "dog"}]
    images = [(image["file_name"], image["height"], image["width"]) for image in train["images"]]
    level = [("a.jpg", 50, 100), ("b.jpg", 50, 100), ("none.png", 50, 100)]
    assert images == [*level, ("turned.jpg", 100, 50)]
    box, cut, outline, turned = train["annotations"]
    assert box["bbox"] == [40, 15, 20, 20] and box["area"] == 400
    assert box["segmentation"] == [] and box["category_id"] == 2
    assert cut["bbox"] == [85, 15, 15, 20]  # clipped to the image
    assert outline["segmentation"] == [[10, 10, 50, 10, 50, 40]]
    assert outline["bbox"] == [10, 10, 40, 30] and outline["area"] == 600
    assert turned["bbox"] == [0, 45, 50, 10]  # relative to the upright image
    # train contains another file of this name
    assert [image["file_name"] for image in tree(out, "val")["images"]] == ["a_2.jpg"]
    _, output, _ = vitdet("data", "convert", yolo, "asked", "--boxes-as-masks")
    assert "  3 x boxes used as masks" in output.splitlines()
    box, *_ = tree(tmp_path / "asked", "train")["annotations"]
    assert box["segmentation"] == [[40, 15, 60, 15, 60, 35, 40, 35]]
    original = yolo / "images/train/a.jpg"
    assert (out / "train/a.jpg").samefile(original)
    assert [finding.kind for finding in check(out).errors] == ["no objects"]  # val has none
    found = read_coco(out / "annotations/instances_train.json", out / "train")
    assert found.class_names == ("no", "dog")
    assert vitdet("data", "convert", yolo / "data.yaml", "copied", "--copy")[0] == 0
    assert not (tmp_path / "copied/train/a.jpg").samefile(original)
    code, output, errors = vitdet("data", "convert", yolo, "out")
    assert (code, output, errors) == (1, "", "vitdet: out: already exists; choose a new folder\n")


def test_an_image_in_two_splits_keeps_its_name(yolo: Path, vitdet: Run) -> None:
    write(yolo / "images" / "val.txt", "./val/a.jpg\ntrain/b.jpg\n")
    assert vitdet("data", "convert", yolo, "out")[0] == 0
    found = check(Path("out"), images=False).errors
    assert [finding.kind for finding in found] == ["file name in two splits"]


def test_roboflow_split_paths_are_resolved_in_the_folder(vitdet: Run, tmp_path: Path) -> None:
    places = "train: ../train/images\nval: ../valid/images\n"
    write(tmp_path / "r" / "data.yaml", f"{places}nc: 1\nnames: ['a b']\n")
    for number, split in enumerate(("train", "valid")):
        image(tmp_path / "r" / split / "images" / f"{split}.jpg", value=number)
        write(tmp_path / "r" / split / "labels" / f"{split}.txt", "0 .5 .5 .5 .5")
    output = vitdet("data", "convert", "r", "out")[1]
    assert output.startswith("out: 1 class; train 1 image, 1 object; val 1 im")


ROWS, HEAD = "labels/train/a.txt", "data.yaml"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (ROWS, "0 .5 .5 .5 .5\n0 .5 .5 .5 .5 .9", "a.txt:2: expected 'class x y width height'"),
        (ROWS, "2 .5 .5 .5 .5", "a.txt:1: class 2: expected a whole number from 0 to 1"),
        (ROWS, "0.5 .5 .5 .5 .5", "class 0.5: expected a whole number"),
        (ROWS, "nan .5 .5 .5 .5", "class nan: expected a whole number"),
        (ROWS, "0 .5 .5 40 .5", "coordinate 40: expected a fraction of the image"),
        (ROWS, "0 .5 nan .5 .5", "coordinate nan"),
        (ROWS, "0 .5 x .5 .5", "expected numbers, got '0 .5 x .5 .5'"),
        ("images/train/a.jpg", "no image", "a.jpg: not an image that can be read"),
        ("images/val.txt", "./val/b.jpg", "val.txt:1: ./val/b.jpg: no such image file"),
        (HEAD, "train: images/train\nval: v\nnames: [a, b]", "val: v does not exist in"),
        (HEAD, "test: images/train\nnames: [a, b]", "under the key train or val; keys: test"),
        (HEAD, "train: images\nnames: {1: a}", "names: expected a list of class names"),
        (HEAD, "train: images\nnames: [a]\nnc: 2", "names has length 1, but nc is '2'"),
        (HEAD, "train: images\nnames: [a]\nkpt_shape: [17, 3]", "got keypoints"),
        (HEAD, "train: [", "data.yaml: not YAML"),
        (HEAD, "train: {a: b}\nnames: [a]", "train: expected a folder, a text file or a list of"),
    ],
)
def test_bad_yolo_is_rejected(vitdet: Run, yolo: Path, file: str, content: str, says: str) -> None:
    write(yolo / file, content)
    refused(vitdet("data", "convert", yolo, "out"), says)


def test_labels_in_the_wrong_folder_are_an_error(vitdet: Run, yolo: Path) -> None:
    (yolo / "labels").rename(yolo / "label")
    code, output, errors = vitdet("data", "convert", yolo, "out")
    assert (code, output) == (1, "") and not Path("out").exists()
    assert "train: no image has a label file (images: 4); expected" in errors
    assert "val: no image has a label file (images: 1); expected" in errors


def test_voc_is_converted(vitdet: Run, voc: Path, tmp_path: Path) -> None:
    code, output, errors = vitdet("data", "convert", voc, "out")
    assert (code, errors) == (0, "") and output.splitlines()[0] == (
        "out: 2 classes; train 1 image, 2 objects; val 1 image, 1 object"
    )
    assert "1 x difficult objects" in output and "2 x objects with a box but no mask" in output
    train, val = tree(tmp_path / "out", "train"), tree(tmp_path / "out", "val")
    classes = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert train["categories"] == val["categories"] == classes
    dog, cat = train["annotations"]
    assert (dog["category_id"], dog["bbox"]) == (2, [0, 0, 10, 20])
    assert (dog["iscrowd"], dog["area"]) == (0, 160)
    pixels = decode(dog["segmentation"], 50, 100)
    assert (
        pixels.sum() == 160 and pixels[:20, :8].all()
    )  # the border pixels of value 255 belong to no object
    assert (cat["category_id"], cat["bbox"], cat["iscrowd"]) == (1, [30, 10, 70, 40], 1)
    assert val["annotations"][0]["bbox"] == [4, 4, 1, 1.5]
    assert check(tmp_path / "out").ok


ONE = "Annotations/one.xml"


def wrong(*values: object) -> str:
    """Return an XML file with one object; values: name, ymin, xmin, xmax, ymax."""
    name, ymin, xmin, xmax, ymax = values
    return f"<a>{OBJECT.format(name, '', ymin, xmin, xmax, ymax)}</a>"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (ONE, BOMB, "one.xml: invalid XML: a DOCTYPE is not"),
        (ONE, "<annotation>", "one.xml: invalid XML: no element found"),
        (ONE, "", "one.xml: invalid XML: no element found"),
        (ONE, "<?xml version='1.0' encoding='no'?><a/>", "unknown encoding"),
        (ONE, "<a>" * (1 << 21), "6,291,456 bytes, expected at most 4,194,304"),
        (ONE, wrong("a", 1, 1, "x", 1), "bndbox: expected numbers"),
        (ONE, wrong("a", 1, 9, 5, 1), "expected finite xmin <= xmax"),
        (ONE, wrong("a", 1, "nan", 5, 1), "expected finite xmin <= xmax"),
        (ONE, wrong("a", 1, 101, 105, 9), "is outside the image of 100 x 50"),
        (ONE, wrong(" ", 1, 1, 5, 9), "an object without <name>"),
        (
            ONE,
            "<a><size><width>50</width><height>99</height></size></a>",
            "states a size of 50 x 99, ",
        ),
        (ONE, "<a/>", "contains object number 1, expected at most 0 (objects in"),
        ("ImageSets/Main/train.txt", "three", "three.xml: no such annotation file"),
        ("ImageSets/Main/train.txt", "../one", "'../one': expected the name of an image"),
        ("SegmentationObject/one.png", "", "one.png: the image cannot be read: the file is empty"),
    ],
)
def test_bad_voc_is_rejected(vitdet: Run, voc: Path, file: str, content: str, says: str) -> None:
    write(voc / file, content)
    refused(vitdet("data", "convert", voc, "out"), says)


def test_the_format_of_the_source_is_detected(vitdet: Run, voc: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(voc / "data.yaml", "names: [a]")
    for source, says in (
        ("empty", "empty: matches none of yolo, voc, coco, labelme, cvat; found nothing"),
        ("none", "none: no such file or folder"),
        (voc, "could be yolo or voc"),
    ):
        refused(vitdet("data", "convert", source, "out"), says)
    assert vitdet("data", "convert", voc, "out", "--format", "voc")[0] == 0


def test_images_are_copied_if_hard_links_fail(
    vitdet: Run, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("another disk")))
    assert vitdet("data", "convert", voc, "out")[0] == 0
    copy, original = tmp_path / "out/train/one.jpg", voc / "JPEGImages/one.jpg"
    assert copy.read_bytes() == original.read_bytes() and not copy.samefile(original)


def refused(result: tuple[int, str, str], says: str) -> None:
    """Assert that the error is one line, and that no file is left in the current folder."""
    code, output, errors = result
    assert (code, output, errors.count("\n")) == (1, "", 1) and says in errors, errors
    assert not [name for name in os.listdir() if name == "out" or name[0] == "."]
