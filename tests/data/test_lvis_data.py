"""LVIS-format data: reading, checking, training with the federated loss, evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import Recorder, minimal
from vitdet import Predictor
from vitdet.checkpoint import load_model_file, restore_detector
from vitdet.config import DataConfig, load_config
from vitdet.data.check import check
from vitdet.data.coco import read_coco
from vitdet.data.dataset import read_split
from vitdet.data.fingerprint import fingerprints
from vitdet.data.header import LISTS
from vitdet.evaluation.evaluator import evaluate
from vitdet.training import train

SHARED = Path(__file__).parents[3] / "shared" / "data" / "coco-eval" / "lvis_val_100.json"
UNSURE = "not_exhaustive_category_ids"
COUNTS = (100, 81, 1, 0, 9, 4)  # image_count of each category in the training file


def as_lvis(tiny: Path, folder: Path) -> Path:
    """Write the tiny data set as LVIS: no file names or crowds; one val image is in train2017."""
    for split, place in (("train", "train2017"), ("val", "val2017")):
        content = json.loads((tiny / "annotations" / f"instances_{split}.json").read_text())
        first = content["categories"][0]["id"]
        for number, image in enumerate(content["images"]):
            place_of = "train2017" if number == 0 else place
            name = f"{split}_{image.pop('file_name')}"
            image["coco_url"] = f"http://images.cocodataset.org/{place_of}/{name}"
            image |= {"neg_category_ids": [first], "not_exhaustive_category_ids": []}
            (folder / place_of).mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / split / name.removeprefix(f"{split}_"), folder / place_of / name)
        content["annotations"] = [
            item for item in content["annotations"] if not item.pop("iscrowd")
        ]
        for number, category in enumerate(content["categories"]):
            category |= {"frequency": "rcf"[number % 3], "synset": f"{category['name']}.n.01"}
            if split == "train":
                category["image_count"] = COUNTS[number]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def lvis(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set in LVIS format."""
    return as_lvis(tiny, tmp_path_factory.mktemp("lvis"))


@pytest.fixture
def own_lvis(lvis: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lvis, tmp_path / "lvis"))


def settings(folder: Path) -> DataConfig:
    return DataConfig(dataset="lvis", root=str(folder), train_split="train", val_split="val")


def change(folder: Path, split: str, what: Callable[[dict], object]) -> None:
    path = folder / "annotations" / f"lvis_v1_{split}.json"
    content = json.loads(path.read_text())
    what(content)
    path.write_text(json.dumps(content))


def test_paths_follow_the_urls_and_counts_are_read_from_the_file(lvis: Path, tiny: Path) -> None:
    data = settings(lvis)
    found = read_split(data, "val")
    folders = [lvis / "train2017", *[lvis / "val2017"] * 3]
    assert [record.path.parent for record in found.records] == folders
    coco = read_split(DataConfig(root=str(tiny), train_split="train", val_split="val"), "train")
    train_split = read_split(data, "train")
    for record, other in zip(train_split.records, coco.records, strict=True):
        assert record.labels.tolist() == other.labels.tolist()
    assert train_split.dropped == {} and train_split.image_counts == COUNTS
    holding = [sum(label in record.labels for record in found.records) for label in range(6)]
    assert found.image_counts == tuple(holding)  # the val file has no image_count


def test_labels_follow_sorted_ids_and_file_names_replace_urls(own_lvis: Path) -> None:
    def renumber(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation["category_id"] *= 100
        for category in content["categories"]:
            category["id"] *= 100
        content["categories"].reverse()
        for image in content["images"]:
            image["file_name"] = "/".join(image.pop("coco_url").split("/")[-2:])
            image.update({key: [100 * number for number in image[key]] for key in LISTS})

    before = read_split(settings(own_lvis), "train")
    change(own_lvis, "train", renumber)
    after = read_split(settings(own_lvis), "train")
    assert after.category_ids == tuple(100 * category_id for category_id in before.category_ids)
    for record, other in zip(after.records, before.records, strict=True):
        assert record.path == other.path and record.labels.tolist() == other.labels.tolist()


def test_real_lvis_annotations_are_read() -> None:
    if not SHARED.exists():
        pytest.skip("needs ../shared")
    found = read_coco(SHARED, "root", by_url=True)
    assert len(found.class_names) == 1230
    assert len(found.records) == 100 and sum(map(len, found.records)) == 977
    assert found.records[0].path == Path("root/val2017/000000006460.jpg")
    assert found.class_names[0] == "acorn" and found.image_counts[:5] == (0, 0, 0, 3, 0)


def test_a_fingerprint_covers_only_images_in_the_annotations(own_lvis: Path) -> None:
    data = settings(own_lvis)
    first = fingerprints(data)
    (own_lvis / "test2017").mkdir()
    (own_lvis / "train2017" / "other.jpg").write_bytes(b"none of these")
    assert fingerprints(data) == first != fingerprints(replace(data, max_images=1))
    image = read_split(data, "val").records[0].path
    image.write_bytes(image.read_bytes() + b" ")
    assert fingerprints(data) != first


def test_a_valid_folder_has_no_errors_and_its_images_are_read(lvis: Path, own_lvis: Path) -> None:
    report = check(lvis)
    assert report.ok and list(report.splits) == ["lvis_v1_train", "lvis_v1_val"]
    image = read_split(settings(own_lvis), "val").records[0].path
    image.write_bytes(image.read_bytes()[:300])
    (error,) = check(own_lvis).errors
    assert error.kind == "truncated or invalid image file" and "'train2017/va" in error.examples[0]
    assert not check(own_lvis, ["val", "nothing"], images=False).ok  # a missing split


def test_coco_and_lvis_may_share_a_folder(lvis: Path, tiny: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(lvis, tmp_path / "both"))
    shutil.copytree(tiny, both, dirs_exist_ok=True)
    report = check(both)
    assert report.ok and list(report.splits) == ["train", "val", "lvis_v1_train", "lvis_v1_val"]


@pytest.mark.parametrize(
    ("table", "key", "value", "kind"),
    [
        ("images", "coco_url", ..., "image without 'file_name'"),
        ("images", "coco_url", 3, "file name that is not one line of text"),
        ("images", "neg_category_ids", ..., "image without 'neg_category_ids'"),
        ("images", "neg_category_ids", [99], "'neg_category_ids' that is not a list of categories"),
        ("images", UNSURE, None, f"'{UNSURE}' that is not a list of categories"),
        ("categories", "frequency", ..., "category whose frequency is not r, c or f"),
        ("annotations", "area", -1, "area that is not a number of pixels"),
    ],
)
def test_requirements_of_lvis_are_checked(
    own_lvis: Path, table: str, key: str, value: object, kind: str
) -> None:
    def damage(content: dict) -> None:
        content[table][1][key] = value
        if value is ...:
            del content[table][1][key]

    change(own_lvis, "val", damage)
    (error,) = check(own_lvis, images=False).errors
    assert error.kind == kind and "lvis_v1_val.json" in error.examples[0]


def test_the_federated_loss_weights_classes_by_image_count(
    lvis: Path, picture: Path, tmp_path: Path
) -> None:
    changes = {
        "data__dataset": "lvis",
        "data__repeat_threshold": 0.5,
        "model__roi_heads__loss": "federated",
        "model__roi_heads__federated_classes": 3,
        "optim__steps": 3,
        "train__eval_every": 3,
    }
    recorder, weights = Recorder(), "roi_heads.classification.class_weights"
    config = load_config("tiny", minimal(lvis, **changes))
    path = train(config, tmp_path / "run", start_tracking=lambda *_: recorder)
    odds = torch.tensor([10.0, 9.0, 1.0, 0.0, 3.0, 2.0])  # square roots of image_count
    torch.testing.assert_close(load_model_file(path)["model"][weights], odds)
    detector, config, names = restore_detector(path)
    torch.testing.assert_close(detector.roi_heads.classification.class_weights, odds)
    assert config.data.dataset == "lvis" and len(names) == 6
    figures = evaluate(path, [f"data.root={lvis}"])
    assert figures == pytest.approx(load_model_file(path)["metrics"], nan_ok=True)
    assert {"box_ap", "mask_ap", "box_ap_rare", "box_ar_300"} <= set(figures)
    assert len(Predictor.load(path)(picture, threshold=0.0)) <= 4

    # The new data set's weights replace those of the initial detector.
    changes |= {"optim__steps": 1, "train__eval_every": 1, "train__init": path}
    own = Path(shutil.copytree(lvis, tmp_path / "own"))
    change(own, "train", lambda content: content["categories"][3].update(image_count=49))
    tuned = train(load_config("tiny", minimal(own, **changes)), tmp_path / "tuned")
    odds[3] = 7
    torch.testing.assert_close(load_model_file(tuned)["model"][weights], odds)
