"""COCO exports in the layouts of annotation tools: found, checked and trained on without conversion.

The layouts are those of the tools' documentation; see `vitdet.data.coco_layouts`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.annotations import document, draw_images
from vitdet.config import DataConfig, load_config
from vitdet.data.check import check
from vitdet.data.coco_layouts import find_splits
from vitdet.data.dataset import read_split
from vitdet.data.layout import resolve_config, split_files
from vitdet.datasets.report.page import write_page

# Label Studio writes the path on its server for an image in images/
UPLOADS = "../../label-studio/data/media/upload/4/"


def content(first_id: int = 1, folder: str = "") -> dict:
    found = document(first_id)
    for image in found["images"]:
        image["file_name"] = folder + image["file_name"]
    return found


def write(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


def coco(root: Path) -> None:
    for split, first in (("train", 1), ("val", 11)):
        write(root / "annotations" / f"instances_{split}.json", content(first))
        draw_images(root / split, first)


def roboflow(root: Path) -> None:
    for split, first in (("train", 1), ("valid", 11)):
        found = content(first)
        found["categories"] = [
            {"id": 0, "name": "things", "supercategory": "none"},
            *({**category, "supercategory": "things"} for category in found["categories"]),
        ]
        write(root / split / "_annotations.coco.json", found)
        draw_images(root / split, first)


def one_split(file: str, folder: str, prefix: str = "") -> Callable[[Path], None]:
    """Return a function that writes one annotation file and its images in a folder."""

    def layout(root: Path) -> None:
        write(root / file, content(folder=prefix))
        draw_images(root / folder)

    return layout


def bare(root: Path) -> None:
    write(root / "dataset.json", content())
    write(root / "1.json", {"version": "5.0", "shapes": [], "imagePath": "1.png"})  # a LabelMe file
    draw_images(root)


ONE_SPLIT = {
    "cvat": one_split("annotations/instances_default.json", "images/default"),
    "cvat flat": one_split("annotations/instances_default.json", "images"),
    "label studio": one_split("result.json", "images", "images/"),
    "label studio on windows": one_split("result.json", "images", "images\\"),
    "label studio 1.16": one_split("result.json", "images", UPLOADS),
    "label studio 1.16 on windows": one_split("result.json", "images", UPLOADS.replace("/", "\\")),
    "fiftyone": one_split("labels.json", "data"),
    "bare": bare,
}


@pytest.mark.parametrize("layout", [coco, roboflow, *ONE_SPLIT.values()])
def test_every_layout_has_the_same_records(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    coco(tmp_path / "plain")
    layout(tmp_path / "own")
    expected = read_split(DataConfig(root=str(tmp_path / "plain")), "train")
    root = tmp_path / "own"
    splits = find_splits(root)
    named = {coco: ["train", "val"], roboflow: ["train", "valid"]}
    assert list(splits) == named.get(layout, ["default"])
    data = DataConfig(root=str(root))
    found = read_split(data, next(iter(splits)))
    assert found.class_names == expected.class_names == ("disc", "bar")
    for record, other in zip(found.records, expected.records, strict=True):
        assert record.image_id == other.image_id and record.segmentations == other.segmentations
        assert record.labels.tolist() == other.labels.tolist()
        assert record.boxes.tolist() == other.boxes.tolist() and record.path.is_file()
    report = check(root)
    assert report.ok and list(report.splits) == list(splits), report.lines()
    images, objects, _ = write_page(root, tmp_path / "page.html")
    assert images == 3 * len(splits) and objects == 5 * len(splits)


def test_a_roboflow_export_is_resolved_without_its_root_category(tmp_path: Path) -> None:
    roboflow(tmp_path)
    config, found = resolve_config("tiny", [f"data.root={tmp_path}"])
    assert (found["data.val_split"], found["model.roi_heads.num_classes"]) == ("valid", 2)
    assert read_split(config.data, "valid").class_names == ("disc", "bar")
    assert check(tmp_path).splits["valid"] == (3, 5, 2)
    path = split_files(config.data, "train")[0]
    used = json.loads(path.read_text())
    used["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(used))
    config, _ = resolve_config("tiny", [f"data.root={tmp_path}"])
    assert config.model.roi_heads.num_classes == 3
    assert read_split(config.data, "train").class_names == ("things", "disc", "bar")


def test_the_splits_of_cvat_are_found_by_their_capitalized_names(tmp_path: Path) -> None:
    for split, first in (("Test", 21), ("Train", 1), ("Validation", 11)):
        write(tmp_path / "annotations" / f"instances_{split}.json", content(first))
        draw_images(tmp_path / "images" / split, first)
    config, _ = resolve_config("tiny", [f"data.root={tmp_path}"])
    assert (config.data.train_split, config.data.val_split) == ("Train", "Validation")
    assert len(read_split(config.data, "Validation").records) == 3
    write(tmp_path / "annotations/instances_Test.json", content(21) | {"annotations": []})
    assert check(tmp_path).ok


def test_a_category_may_be_called_shapes(tmp_path: Path) -> None:
    bare(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"disc"', '"shapes"'))
    assert list(find_splits(tmp_path)) == ["default"]


@pytest.mark.parametrize("layout", ONE_SPLIT.values(), ids=ONE_SPLIT)
def test_a_single_split_is_not_used_for_both_training_and_validation(
    vitdet: Callable, layout: Callable[[Path], None]
) -> None:
    layout(Path("own"))
    code, _, error = vitdet("train", "tiny", "--set", "data.root=own", "--output", "out")
    assert code == 1 and "only split is default" in error and "--val-share 0.1" in error
    assert not Path("out").exists()
    advised = error.partition("`vitdet ")[2].partition("`")[0]
    assert vitdet(*advised.split())[0] == 0
    assert list(find_splits(Path("DST"))) == ["train", "val"]


def test_the_error_for_an_unknown_layout_lists_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [a]")
    (tmp_path / "images").mkdir()
    (error,) = check(tmp_path).errors
    assert error.examples[0].endswith("found data.yaml, images")


def test_coco_and_lvis_splits_are_found_in_one_folder(tmp_path: Path) -> None:
    coco(tmp_path)
    write(tmp_path / "annotations" / "lvis_v1_val.json", document(lvis=True))
    assert list(find_splits(tmp_path)) == ["train", "val"]
    assert list(find_splits(tmp_path, "lvis")) == ["val"]
    assert load_config("tiny").data.dataset == "coco"
    shutil.rmtree(tmp_path / "annotations")
    assert find_splits(tmp_path) == {}
