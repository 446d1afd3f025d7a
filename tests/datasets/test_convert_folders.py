"""`vitdet data convert`: files and folders as operating systems and annotation tools leave them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.datasets.test_convert_data import image, tree, write
from tests.datasets.test_convert_layouts import (
    Layout,
    coco,
    coco_beside,
    cvat_images,
    expected,
    images,
    labelme_files,
    records,
    voc_beside,
    voc_folders,
    voc_xml,
    yolo_lists,
)
from vitdet.data.check import check

Run = Callable[..., tuple[int, str, str]]
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "


def names(root: str, split: str = "train") -> list[str]:
    return sorted(image["file_name"] for image in tree(Path(root), split)["images"])


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    root = tmp_path / "yolo"
    write(root / "data.yaml", "train: images\nnames: [cat]\n")
    image(root / "images/a.jpg")
    write(root / "labels/a.txt", "0 .5 .5 .5 .5")
    return root


def checkpoints(root: Path) -> None:
    """Copy the files of every folder to .ipynb_checkpoints, as Jupyter does."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        files = [path for path in folder.iterdir() if path.is_file()]
        (folder / ".ipynb_checkpoints").mkdir()
        for path in files:
            name = f"{path.stem}-checkpoint{path.suffix}"
            shutil.copy(path, folder / ".ipynb_checkpoints" / name)


def test_hidden_folders_are_skipped(vitdet: Run, yolo: Path) -> None:
    checkpoints(yolo)
    code, output, _ = vitdet("data", "convert", yolo, "out")
    assert code == 0 and names("out") == ["a.jpg"]
    assert "skipped" not in output and "without a label file" not in output


@pytest.mark.parametrize("layout", [labelme_files, voc_beside])
def test_copies_in_hidden_folders_are_skipped(vitdet: Run, layout: Layout) -> None:
    layout(Path("source"))
    checkpoints(Path("source"))
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert records(Path("out"), "train") == expected("p1", "p2")


def test_links_to_folders_are_followed_once(vitdet: Run, yolo: Path, tmp_path: Path) -> None:
    for site in ("images", "labels"):
        (tmp_path / "site" / site).mkdir(parents=True)
        (yolo / site / "site").symlink_to(tmp_path / "site" / site)
        (yolo / site / "again").symlink_to(yolo / site)
    image(tmp_path / "site/images/b.jpg", value=90)
    write(tmp_path / "site/labels/b.txt", "0 .5 .5 .5 .5")
    output = vitdet("data", "convert", yolo, "out")[1]
    assert output.startswith("out: 1 class; train 2 images, 2 objects")
    assert names("out") == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "layout", [yolo_lists, voc_folders, voc_beside, coco_beside, labelme_files, cvat_images]
)
def test_resource_forks_of_macos_are_skipped(vitdet: Run, layout: Layout) -> None:
    layout(Path("source"))
    for path in [path for path in Path("source").rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, errors) == (0, "") and "ignored" not in output
    assert records(Path("out"), "train") == expected("p1", "p2")


def test_a_byte_order_mark_is_ignored(vitdet: Run) -> None:
    labelme_files(Path("source"))
    for path in Path("source").glob("*.json"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert records(Path("out"), "train") == expected("p1", "p2")


@pytest.mark.parametrize("layout", [voc_folders, cvat_images])
def test_a_size_may_have_decimals(vitdet: Run, layout: Layout) -> None:
    layout(Path("source"))
    for path in Path("source").rglob("*.xml"):
        text = path.read_text()
        for side in (96, 64):
            text = text.replace(f">{side}<", f">{side}.0<").replace(f'"{side}"', f'"{side}.0"')
        path.write_text(text)
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert records(Path("out"), "train") == expected("p1", "p2")


@pytest.mark.parametrize("name", ["instances_{}2017", "{}2017"])
@pytest.mark.parametrize("folder", ["", "images"])
def test_a_file_of_a_year_can_be_the_source(vitdet: Run, name: str, folder: str) -> None:
    for split, picture in (("train", "p1"), ("val", "p2")):
        images(Path("source", folder, f"{split}2017"), picture)
        write(Path("source/annotations", f"{name.format(split)}.json"), json.dumps(coco(picture)))
    file = f"source/annotations/{name.format('val')}.json"
    for source, target in (("source", "all"), (file, "one")):
        code, _, errors = vitdet("data", "convert", source, target)
        assert (code, errors) == (0, "")
        assert records(Path(target), "val2017") == expected("p2")


def test_a_raw_file_of_a_camera_is_not_an_image(vitdet: Run, yolo: Path) -> None:
    preview = Image.new("RGB", (16, 8))
    preview.save(yolo / "images/a.nef", "TIFF", tiffinfo={254: 1})
    output = vitdet("data", "convert", yolo, "out")[1]
    assert names("out") == ["a.jpg"]
    reason = "not a supported image format, 1 of them with a label file"
    assert f"  1 x .nef files skipped, {reason}" in output.splitlines()


def test_names_are_unique_where_case_is_ignored(vitdet: Run, yolo: Path) -> None:
    for folder, name in (("other", "A"), ("composed", "\u00e9"), ("decomposed", "e\u0301")):
        image(yolo / f"images/{folder}/{name}.jpg")
        write(yolo / f"labels/{folder}/{name}.txt", "0 .5 .5 .5 .5")
    assert vitdet("data", "convert", yolo, "out")[0] == 0
    assert names("out") == ["A_2.jpg", "a.jpg", "e\u0301_2.jpg", "\u00e9.jpg"]


def test_a_split_in_a_hidden_folder_is_skipped(vitdet: Run) -> None:
    images(Path("source/train"), "p1", "p2")
    write(Path("source/train/_annotations.coco.json"), json.dumps(coco("p1", "p2")))
    shutil.copytree("source/train", "source/.Trash-0")
    assert [*check(Path("source"), images=False).splits] == ["train"]
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert records(Path("out"), "train") == expected("p1", "p2")


@pytest.mark.parametrize("format", ["coco", "labelme"])
def test_a_data_set_without_images_is_rejected(vitdet: Run, format: str) -> None:
    write(Path("source/train.json"), json.dumps(coco()))
    code, output, errors = vitdet("data", "convert", "source", "out", "--format", format)
    assert (code, output, errors) == (1, "", "vitdet: source: nothing to convert\n")
    assert not Path("out").exists()


def test_only_a_requested_split_must_exist(vitdet: Run, yolo: Path) -> None:
    write(yolo / "data.yaml", "train: images\nval: ../valid/images\nnames: [cat]\n")
    assert vitdet("data", "convert", yolo, "out")[0] == 1
    code, output, _ = vitdet("data", "convert", yolo, "out", "--splits", "train")
    assert code == 0 and "  split val skipped: ../valid/images not found" in output.splitlines()


def test_an_unreadable_folder_is_an_error(
    vitdet: Run, yolo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sub", "lost+found"):  # the latter is at the root of each volume with ext4
        (yolo / "images" / name).mkdir()
    scandir, denied = os.scandir, {"lost+found"}

    def deny(path: str) -> Iterator:
        if os.path.basename(path) in denied:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert vitdet("data", "convert", yolo, "out")[0] == 0
    denied.add("sub")
    code, output, errors = vitdet("data", "convert", yolo, "other")
    assert (code, output) == (1, "")
    assert errors == f"vitdet: [Errno 13] Permission denied: '{yolo / 'images/sub'}'\n"


def test_images_are_found_by_id_in_a_folder_named_annotations(vitdet: Run) -> None:
    images(Path("source/images"), "p1", "p2")
    for name, other in (("p1", "p2"), ("p2", "IMG_2")):  # the images were renamed
        write(Path(f"source/annotations/{name}.xml"), voc_xml(other))
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert [image["file_name"] for image in tree(Path("out"), "train")["images"]] == [
        "p1.jpg",
        "p2.jpg",
    ]


def test_a_path_without_links_takes_precedence(vitdet: Run, yolo: Path) -> None:
    for name in ("z/real/c", "b/b"):
        image(yolo / f"images/{name}.jpg")
        write(yolo / f"labels/{name}.txt", "0 .5 .5 .5 .5")
    (yolo / "images/b/link").symlink_to("../z/real")
    code, output, _ = vitdet("data", "convert", yolo, "out")
    assert code == 0 and output.startswith("out: 1 class; train 3 images, 3 objects")


def test_images_may_be_beside_a_folder_with_annotations(vitdet: Run) -> None:
    voc_folders(Path("source"))
    shutil.move("source/Annotations", "source/annotations")
    for path in list(Path("source/JPEGImages").iterdir()):
        shutil.move(path, "source")
    Path("source/JPEGImages").rmdir()
    code, _, errors = vitdet("data", "convert", "source", "out")
    assert (code, errors) == (0, "") and names("out") == ["p1.jpg", "p2.jpg"]


def test_the_file_missing_in_an_empty_folder_is_named(vitdet: Run) -> None:
    voc_folders(Path("source"))
    for path in Path("source/Annotations").iterdir():
        path.unlink()
    code, _, errors = vitdet("data", "convert", "source", "out", "--format", "voc")
    assert code == 1 and "source/Annotations/p1.xml: no such annotation file" in errors
