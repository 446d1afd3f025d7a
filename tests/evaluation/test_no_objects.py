"""Evaluations without objects: in the whole split, in one class, or in the evaluated images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import minimal
from vitdet import stages
from vitdet.config import load_config
from vitdet.training import train

UNDEFINED = "no image of val has a usable object; .*{}.*"


def edit(root: Path, change: Callable[[dict], object], name: str = "instances_val") -> None:
    path = root / "annotations" / f"{name}.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def crowds(tree: dict) -> None:
    for annotation in tree["annotations"]:
        annotation["iscrowd"] = 1


def no_images(tree: dict) -> None:
    tree["annotations"].clear()
    tree["images"].clear()


def as_lvis(root: Path, empty: int) -> None:
    """Write the validation split as LVIS, with zero-area objects in its first `empty` images with objects."""
    tree = json.loads((root / "annotations" / "instances_val.json").read_text())
    for image in tree["images"]:
        image["coco_url"] = f"http://host/val/{image['file_name']}"
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category in tree["categories"]:
        category["frequency"] = "f"
    images = sorted({item["image_id"] for item in tree["annotations"] if not item.get("iscrowd")})
    for annotation in tree["annotations"]:
        if annotation["image_id"] in images[:empty]:
            annotation["area"] = 0
    for split in ("train", "val"):
        (root / "annotations" / f"lvis_v1_{split}.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda tree: tree["annotations"].clear(), "no annotations"),
        (crowds, "22 marked as crowd"),
        (no_images, "no annotations"),
    ],
)
@pytest.mark.parametrize("most", [0, 1])
def test_a_split_without_objects_is_refused(
    trained: Path, own_tiny: Path, tmp_path: Path, change: Callable, cause: str, most: int
) -> None:
    edit(own_tiny, change)
    out, settings = tmp_path / "plots", [f"data.root={own_tiny}", f"evaluate.max_images={most}"]
    with pytest.raises(ValueError, match=UNDEFINED.format(cause)) as caught:
        stages.evaluate(trained / "model.pt", settings, folder=tmp_path, plots=out)
    assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.parametrize(
    ("empty", "most", "refused"), [(4, 0, True), (2, 2, True), (2, 3, False), (2, 0, False)]
)
def test_objects_without_area_are_refused_by_evaluation_and_training(
    trained: Path, own_tiny: Path, tmp_path: Path, empty: int, most: int, refused: bool
) -> None:
    as_lvis(own_tiny, empty)
    settings = [f"data.root={own_tiny}", "data.dataset=lvis", f"evaluate.max_images={most}"]
    report = tmp_path / "report.html"

    def evaluated() -> object:
        return stages.evaluate(trained / "model.pt", settings, folder=tmp_path, report=report)

    if not refused:
        metrics, _ = evaluated()
        assert "box_ap" in metrics and report.is_file()
        return
    message = f"undefined, as no object in the images .* .images: {most or 4}. is counted: all have"
    with pytest.raises(ValueError, match=message) as caught:
        evaluated()
    assert "\n" not in str(caught.value) and not report.exists()
    config = load_config("tiny", [*minimal(own_tiny), *settings[1:], "data.train_split=train"])
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_without_objects_has_no_ap(trained: Path, own_tiny: Path, tmp_path: Path) -> None:
    tree = json.loads((own_tiny / "annotations" / "instances_val.json").read_text())
    gone = tree["categories"][0]
    kept = [item for item in tree["annotations"] if item["category_id"] != gone["id"]]
    edit(own_tiny, lambda tree: tree.update(annotations=kept))
    settings, plots = [f"data.root={own_tiny}"], tmp_path / "plots"
    metrics, _ = stages.evaluate(trained / "model.pt", settings, folder=tmp_path, plots=plots)
    assert "box_ap" in metrics and f"class_ap/{gone['name']}" not in metrics
    page = (plots / "report.html").read_text()
    row = page.partition(f"<tr><th>{gone['name']}</th>")[2].partition("</tr>")[0]
    assert row.count("–") >= 10 and '<td class="n">0</td>' in row
