"""`vitdet data convert` accounts for every image, label file and row, and reports all problems at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import features

from tests.datasets import test_convert_data as data
from tests.datasets.test_convert_data import Run, tree
from vitdet.data.masks import decode
from vitdet.datasets.importers.dataset import image_suffixes

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    "</bndbox></object>"
)
XML = f"<annotation>{OBJECT.format('cat', 11, 11, 40, 40)}</annotation>"


def write(path: Path, content: str = "0 0.5 0.5 0.2 0.4\n") -> None:
    data.write(path, content)


def image(path: Path, value: int = 0) -> None:
    data.image(path, (96, 64), value)


def names(root: Path, split: str) -> list[str]:
    return [image["file_name"] for image in tree(root, split)["images"]]


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    root = tmp_path / "yolo"
    write(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog, bus]\n")
    for split in ("train", "val"):
        for number in range(4):
            image(root / f"images/{split}/{split}{number}.png", 20 * number)
            rows = f"{number % 3} 0.5 0.5 0.2 0.4\n1 0.2 0.2 0.1 0.1\n"
            write(root / f"labels/{split}/{split}{number}.txt", rows)
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "voc"
    for number, name in enumerate(("p1", "p2", "p3", "my pic")):
        image(root / "JPEGImages" / f"{name}.jpg", 20 * number)
        write(root / "Annotations" / f"{name}.xml", XML)
    write(root / "ImageSets/Main/train.txt", "p1\np2\n")
    write(root / "ImageSets/Main/val.txt", "p3\nmy pic\n")
    return root


@pytest.mark.parametrize("suffix", ["gif", "jp2", "ppm", "tga", "avif", "webp", "JPE", "jfif"])
def test_images_of_every_format_are_accepted(vitdet: Run, yolo: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    image(yolo / f"images/train/more.{suffix}")
    write(yolo / "labels/train/more.txt")
    assert vitdet("data", "convert", yolo, "out")[0] == 0
    assert f"more.{suffix}" in names(Path("out"), "train")


def test_an_image_is_recognized_by_its_content(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    (yolo / "images/train/train0.png").rename(yolo / "images/train/train0.raw_1")
    assert vitdet("data", "convert", yolo, "out")[0] == 0
    assert "train0.raw_1" in names(tmp_path / "out", "train")


def test_suffixes_exclude_formats_that_cannot_be_decoded() -> None:
    assert not {".eps", ".wmf", ".mpg", ".h5", ".pdf", ".heic"} & image_suffixes()


def test_yolo_counts_skipped_objects_and_files(vitdet: Run, yolo: Path) -> None:
    for name in ("a.heic", "b.HEIC", "c.mov"):
        (yolo / "images/train" / name).write_bytes(b"\0\0\0\x18ftypheic")
    for name in ("a.txt", "nothing.txt", "empty.txt"):
        write(yolo / "labels/train" / name, "" if name == "empty.txt" else "0 .5 .5 .1 .1")
    write(yolo / "labels/classes.txt", "cat\ndog\nbus")
    image(yolo / "images/extra/e.png")
    write(yolo / "labels/extra/e.txt")
    code, output, errors = vitdet("data", "convert", yolo, "out")
    assert (code, errors) == (0, "")
    reason = "not a supported image format"
    assert {
        f"  2 x .heic files skipped, {reason}, 1 of them with a label file",
        f"  1 x .mov files skipped, {reason}",
        "  1 x images skipped (not in any split)",
        "  2 x label files skipped (no image)",
    } <= {*output.splitlines()}


def test_a_test_split_is_not_skipped_silently(vitdet: Run, yolo: Path) -> None:
    head = (yolo / "data.yaml").read_text()
    write(yolo / "data.yaml", head + "test: ../test/images\n")
    _, output, _ = vitdet("data", "convert", yolo, "one")
    assert "  split test skipped: ../test/images not found" in output.splitlines()
    image(yolo / "images/test/t.png")
    write(yolo / "data.yaml", head + "test: images/test\n")
    _, output, _ = vitdet("data", "convert", yolo, "two")
    assert "  1 x test images skipped: none has a label file" in output.splitlines()
    (yolo / "images/none").mkdir()
    write(yolo / "data.yaml", head.replace("images/val", "images/none"))
    code, output, _ = vitdet("data", "convert", yolo, "three")
    assert code == 0
    assert "  split val skipped: no image in images/none" in output.splitlines()
    assert "no validation split, which training requires; --val-share 0.1" in output
    write(yolo / "data.yaml", head.replace("images/val", "images/none") + "test: images/val\n")
    _, output, _ = vitdet("data", "convert", yolo, "four")
    # --val-share requires a single split
    assert "  no validation split, which training requires" in output.splitlines()


def test_an_id_may_contain_a_space(vitdet: Run, voc: Path, tmp_path: Path) -> None:
    for number, line in enumerate(("my pic", '"my pic"', " my pic\t", "my pic.jpg")):
        write(voc / "ImageSets/Main/val.txt", f"p3\n{line}\n")
        assert vitdet("data", "convert", voc, f"out{number}")[0] == 0
        assert names(tmp_path / f"out{number}", "val") == ["p3.jpg", "my pic.jpg"]


def test_an_invalid_list_is_named_with_its_line(vitdet: Run, voc: Path) -> None:
    write(voc / "ImageSets/Main/val.txt", "p3\nno pic\nnone\n/p1\n")
    code, output, errors = vitdet("data", "convert", voc, "out")
    assert (code, output) == (1, "") and not Path("out").exists()
    assert "val.txt:2: 'no pic': expected an ID, but there is no file" in errors
    assert f"val.txt:3: {voc}/Annotations/none.xml: no such annotation file" in errors
    assert "val.txt:4: '/p1': expected the name of an image" in errors
    write(voc / "ImageSets/Main/val.txt", "p3\np2 1\n")
    assert "val.txt: expected lines 'ID' or lines" in vitdet("data", "convert", voc, "out")[2]


def test_lists_named_val_and_valid_keep_their_images(vitdet: Run, voc: Path) -> None:
    write(voc / "ImageSets/Main/valid.txt", "p1\n")
    output = vitdet("data", "convert", voc, "out")[1]
    splits = "train 2 images, 2 objects; val 2 images, 2 objects; valid 1 image"
    assert output.startswith(f"out: 1 class; {splits}")


def test_an_unreadable_image_of_voc_is_named(vitdet: Run, voc: Path) -> None:
    (voc / "JPEGImages/p1.jpg").rename(voc / "JPEGImages/p1.heic")
    (voc / "JPEGImages/p1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    code, _, errors = vitdet("data", "convert", voc, "out")
    assert code == 1 and errors.count("\n") == 1
    assert "JPEGImages/p1.heic: not a supported image format" in errors


def test_voc_counts_skipped_objects_and_files(vitdet: Run, voc: Path) -> None:
    write(voc / "ImageSets/Main/val.txt", "p3\n")
    write(voc / "ImageSets/Main/test.txt", "t1\nt2\n")
    write(voc / "ImageSets/Main/extra.txt", "\n")
    write(voc / "ImageSets/Main/trainval.txt", "p1\np2\np3\nmy pic\n")
    write(voc / "ImageSets/Main/cat_train.txt", "p1  1\nmy pic -1\n")
    image(voc / "JPEGImages/none.png")
    (voc / "JPEGImages/p9.heic").write_bytes(b"\0\0\0\x18ftypheic")
    write(voc / "Annotations/p9.xml", XML)
    code, output, errors = vitdet("data", "convert", voc, "out")
    assert (code, errors) == (0, "")
    assert {
        f"  split extra skipped: {voc}/ImageSets/Main/extra.txt contains no IDs",
        "  1 x IDs of trainval.txt skipped, in neither train.txt nor val.txt",
        "  1 x per-class lists (with a second column) ignored",
        "  2 x test images skipped: none has an annotation file",
        "  1 x images without an annotation file skipped",
        "  2 x annotation files skipped (not in any list)",
        "  1 x .heic files skipped, not a supported image format, 1 of them with a label file",
    } <= {*output.splitlines()}


def test_all_problems_of_yolo_are_reported_at_once(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    write(yolo / "labels/train/train0.txt", "0 .5 .5 .1 .1\n1 1.02 .5 .1 .2\n1 9 9 9 9\n")
    write(yolo / "labels/train/train1.txt", "0 .5 .5 .1 .1 .9\n")
    write(yolo / "labels/val/val0.txt", "7 .5 .5 .1 .1\n")
    write(yolo / "images/val/val1.png", "no image")
    code, output, errors = vitdet("data", "convert", yolo, "out")
    assert (code, output) == (1, "")
    lines = errors.splitlines()
    assert lines[0] == f"vitdet: {yolo}: 5 problems, nothing was written"
    assert "  2 x coordinate outside its image" in lines
    for place in ("train0.txt:2", "train0.txt:3", "train1.txt:1", "val0.txt:1", "val1.png"):
        assert sum(f"{place}: " in line for line in lines) == 1, place
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]


def test_only_twenty_problems_of_a_kind_are_listed(vitdet: Run, yolo: Path) -> None:
    write(yolo / "labels/train/train0.txt", "0 .5 .5 2 .1\n" * 30)
    lines = vitdet("data", "convert", yolo, "out")[2].splitlines()
    assert lines[1] == "  30 x coordinate outside its image" and lines[-1] == "      ..."
    assert len(lines) == 2 + 20 + 1


def test_all_problems_of_voc_are_reported_at_once(vitdet: Run, voc: Path, tmp_path: Path) -> None:
    objects = OBJECT.format("cat", 40, 1, 9, 9) + OBJECT.format("cat", "x", 1, 9, 9)
    write(voc / "Annotations/p1.xml", f"<annotation>{objects}</annotation>")
    write(voc / "Annotations/p2.xml", "<annotation>")
    (voc / "JPEGImages/p3.jpg").unlink()
    code, output, errors = vitdet("data", "convert", voc, "out")
    assert (code, output) == (1, "") and not (tmp_path / "out").exists()
    assert errors.startswith(f"vitdet: {voc}: 4 problems, nothing was written\n")
    boxes = ("p1.xml: bndbox: expected finite xmin <= xmax", "p1.xml: bndbox: expected numbers")
    for text in (*boxes, "p2.xml: invalid XML", "p3.xml: no image"):
        assert text in errors


def test_the_area_of_an_outline_is_that_of_its_mask(
    vitdet: Run, yolo: Path, tmp_path: Path
) -> None:
    crossing, star = "0 0.1 0.1 0.9 0.9 0.9 0.1 0.1 0.9", "0 0 0 1 0 1 1 0 1 0 0 1 0 1 1 0 1"
    write(yolo / "labels/train/train0.txt", f"{crossing}\n{star}\n")
    assert vitdet("data", "convert", yolo, "out")[0] == 0
    first, second = tree(tmp_path / "out", "train")["annotations"][:2]
    assert first["area"] == decode(first["segmentation"], 64, 96).sum() == 1924
    # a pixel is counted once, even if the outline surrounds it several times
    assert second["area"] == decode(second["segmentation"], 64, 96).sum() <= 96 * 64
    box = tree(tmp_path / "out", "val")["annotations"][0]
    assert box["area"] == pytest.approx(box["bbox"][2] * box["bbox"][3], abs=0.01)


@pytest.mark.parametrize("value", ["", "val:\n", "val: []\n", "val: ~\n"])
def test_a_single_split_is_reported_or_divided(
    vitdet: Run, yolo: Path, tmp_path: Path, value: str
) -> None:
    write(yolo / "data.yaml", f"train: [images/train, images/val]\n{value}names: [cat, dog, bus]\n")
    code, output, _ = vitdet("data", "convert", yolo, "one")
    assert code == 0 and "no validation split, which training requires; --val-share" in output
    assert os.listdir("one/annotations") == ["instances_train.json"]
    share = ("--val-share", 0.25, "--seed")
    code, output, _ = vitdet("data", "convert", yolo, "two", *share, 0)
    assert code == 0 and "  val: 2 of 8 images, drawn with seed 0" in output.splitlines()
    assert output.startswith("two: 3 classes; train 6 images, 12 objects; val 2 images, 4 objects")
    train, val = names(tmp_path / "two", "train"), names(tmp_path / "two", "val")
    assert sorted(train + val) == sorted(names(tmp_path / "one", "train"))
    assert vitdet("data", "convert", yolo, "three", *share, 0)[0] == 0
    assert names(tmp_path / "three", "val") == val
    drawn = set()
    for seed in range(1, 6):
        assert vitdet("data", "convert", yolo, f"seed{seed}", *share, seed)[0] == 0
        drawn.add(tuple(names(tmp_path / f"seed{seed}", "val")))
    assert len(drawn) > 1


def test_only_a_single_split_is_divided(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    code, _, errors = vitdet("data", "convert", yolo, "out", "--val-share", 0.5)
    assert code == 1 and "splits the images of a single split, but there are train, val" in errors
    code, _, errors = vitdet("data", "convert", yolo, "out", "--val-share", 1.5)
    assert code == 1 and "--val-share: expected at least 0 and less than 1, got 1.5" in errors
    words = ("--val-share", 0.5, "--splits", "train")
    code, output, _ = vitdet("data", "convert", yolo, "out", *words)
    assert code == 0 and "  split val skipped, not requested" in output.splitlines()
    assert len(names(tmp_path / "out", "train")) == len(names(tmp_path / "out", "val")) == 2


def test_only_requested_splits_are_converted(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    write(yolo / "labels/val/val0.txt", "not read")
    code, output, _ = vitdet("data", "convert", yolo, "out", "--splits", "train")
    assert code == 0 and not (tmp_path / "out/val").exists()
    code, _, errors = vitdet("data", "convert", yolo, "none", "--splits", "train,dev")
    assert code == 1 and "no split dev; available: train, val" in errors


def test_classes_are_renamed_then_selected(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    write(tmp_path / "map.yaml", "cat: animal\ndog: animal\n")
    assert vitdet("data", "convert", yolo, "one", "--rename", "map.yaml")[0] == 0
    merged = tree(tmp_path / "one", "train")["categories"]
    assert [category["name"] for category in merged] == ["animal", "bus"]
    write(tmp_path / "map.json", '{"cat": "pet", "dog": "hound"}')
    words = ("--rename", "map.json", "--classes", "bus,pet")
    code, output, _ = vitdet("data", "convert", yolo, "two", *words)
    assert code == 0
    assert "  10 x objects of other classes dropped (--classes)" in output.splitlines()
    train = tree(tmp_path / "two", "train")
    assert train["categories"] == [{"id": 1, "name": "bus"}, {"id": 2, "name": "pet"}]
    assert [entry["category_id"] for entry in train["annotations"]] == [2, 1, 2]
    assert [entry["id"] for entry in train["annotations"]] == [1, 2, 3]
    assert len(train["images"]) == 4  # including images without objects


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--classes", "cat,cow"), "--classes: no class 'cow'; available: cat, dog, bus"),
        (("--rename", "wrong.yaml"), "--rename: no class 'cow'; available: cat, dog, bus"),
        (("--rename", "list.yaml"), "list.yaml: expected entries 'old name: new name', got"),
        (("--rename", "none.yaml"), "none.yaml: no such file"),
        (("--rename", "bad.yaml"), "bad.yaml: not YAML or JSON"),
    ],
)
def test_bad_options_are_rejected(vitdet: Run, yolo: Path, words: tuple, says: str) -> None:
    for name, content in (("wrong", "cow: cat"), ("list", "- a"), ("bad", "a: [")):
        write(Path(f"{name}.yaml"), content)
    code, output, errors = vitdet("data", "convert", yolo, "out", *words)
    assert (code, output, errors.count("\n")) == (1, "", 1) and says in errors
    assert not Path("out").exists()


def test_all_entries_of_data_yaml_are_reported(vitdet: Run, yolo: Path) -> None:
    places = "train: [images/train, images/none]\nval: {a: b}\ntest: images/gone\n"
    write(yolo / "data.yaml", f"{places}names: 3\n")
    code, _, errors = vitdet("data", "convert", yolo, "made")
    assert code == 1 and "3 problems, nothing was written" in errors
    for text in (
        "names: expected a list of class names, or a map 0: name, 1: name, ...; got '3'",
        "train: images/none does not exist in",
        "val: expected a folder, a text file or a list of these",
    ):
        assert text in errors


def test_files_of_other_formats_in_a_list_are_skipped(vitdet: Run, yolo: Path) -> None:
    """A folder may contain such files; a text file in a list of images is an error."""
    train = yolo / "images/train"
    (train / "z.heic").write_bytes(b"\0\0\0\x18ftypheic")
    names = [path.name for path in sorted(train.iterdir())]
    write(yolo / "train.txt", "".join(f"images/train/{name}\n" for name in names))
    head = (yolo / "data.yaml").read_text()
    write(yolo / "data.yaml", head.replace("train: images/train", "train: train.txt"))
    code, output, errors = vitdet("data", "convert", yolo, "made")
    assert (code, errors) == (0, "")
    assert "1 x .heic files skipped, not a supported image format" in output
    write(yolo / "train.txt", "images/train/z.heic\n")
    code, _, errors = vitdet("data", "convert", yolo, "other")
    assert code == 1 and "train: no image in train.txt" in errors
    write(yolo / "train.txt", f"images/train/{names[0]}\ndata.yaml\n")
    code, _, errors = vitdet("data", "convert", yolo, "other")
    assert code == 1 and "data.yaml: not a readable image" in errors
