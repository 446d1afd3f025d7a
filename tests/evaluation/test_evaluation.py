"""Evaluation: COCO results of detections, metrics of a checkpoint, and pictures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import nn

from vitdet import distributed
from vitdet.config import DataConfig, EvalConfig, load_config, override
from vitdet.data import coco
from vitdet.data.dataset import TrainData, read_split
from vitdet.data.masks import decode
from vitdet.data.protocol import Protocol, settings_of
from vitdet.evaluation.evaluator import detect, detections_to_results, evaluate, evaluate_detector
from vitdet.evaluation.pictures import write_pictures
from vitdet.stages.plan import check_comparable
from vitdet.types import Detections
from vitdet.visualize import spread


class BrightSpot(nn.Module):
    """A detector that finds pixels brighter than 128 in each image, and an empty box."""

    def forward(self, images, targets=None, sizes=None):
        assert not self.training and not torch.is_grad_enabled()
        return [self.look(image) for image in images]

    def look(self, image):
        y, x = torch.nonzero(image.float().mean(0) > 128, as_tuple=True)
        if not len(x):
            return found(torch.zeros(0, 4))
        corners = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        return found(torch.tensor([corners, [3, 3, 3, 9]], dtype=torch.float32), label=1)


def found(boxes, masks=None, label=0):
    """Return detections with score 0.9; masks are 1 by default."""
    labels = torch.full((len(boxes),), label)
    masks = torch.ones(len(boxes), 28, 28) if masks is None else masks
    return Detections(boxes, torch.full((len(boxes),), 0.9), labels, masks)


@pytest.fixture
def spots(tmp_path):
    """Five black images of different sizes; all but the last have a white box of category 9."""
    images, annotations = [], []
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    sizes = [(40, 80), (90, 50), (64, 64), (33, 100), (50, 60)]
    for number, (height, width) in enumerate(sizes, start=1):
        pixels = np.zeros((height, width), np.uint8)
        x, y, w, h = width // 4, height // 5, width // 2, height // 2
        if number < len(sizes):
            pixels[y : y + h, x : x + w] = 255
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotation = {"id": number, "image_id": number, "category_id": 9, "bbox": [x, y, w, h]}
            annotations.append({**annotation, "segmentation": outline})
        name = f"{number}.png"
        Image.fromarray(pixels).save(tmp_path / "val" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": 9, "name": "spot"}, {"id": 4, "name": "nothing"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(tree))
    splits = {"train_split": "val", "val_split": "val"}
    return DataConfig(root=str(tmp_path), image_size=128, workers=0, **splits)


def test_results_are_in_unrounded_pixels_of_the_original_image():
    canvas = found(torch.tensor([[0.0, 0, 1024, 682], [100, 100, 200, 300], [7, 7, 7, 50]]))
    canvas.labels[0] = 1
    whole, part = detections_to_results(canvas, (682, 1024), (333, 500), 12, (4, 9))
    assert whole["bbox"] == [0, 0, 500, 333]
    assert (whole["image_id"], whole["category_id"], part["category_id"]) == (12, 9, 4)
    x, y, w, h = part["bbox"]
    assert (x, w) == pytest.approx((100 * 500 / 1024, 100 * 500 / 1024))
    assert (y, h) == pytest.approx((100 * 333 / 682, 200 * 333 / 682))
    # the pasted mask fades to 0 at the corners
    assert decode(whole["segmentation"], 333, 500).mean() > 0.999
    rows, columns = np.nonzero(decode(part["segmentation"], 333, 500))
    inside = np.round([x, y, x + w, y + h])
    around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(around - inside).max() <= 1
    assert json.loads(json.dumps([whole, part])) == [whole, part]


def test_mask_pixels_have_a_probability_of_at_least_one_half():
    masks = torch.tensor([0.5, 0.4999]).view(2, 1, 1).expand(-1, 28, 28)
    canvas = found(torch.tensor([[2.0, 2, 10, 10]] * 2), masks)
    yes, no = detections_to_results(canvas, (20, 20), (20, 20), 1, (1,))
    # bilinear sampling fades to zero beyond the outermost cell centers
    assert rle.area(yes["segmentation"]) >= 36
    assert rle.area(no["segmentation"]) == 0


def test_many_large_masks_are_pasted_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    low = 60 * torch.rand(7, 2, generator=generator)
    canvas = found(torch.cat([low, low + 30], 1), torch.rand(7, 28, 28, generator=generator))
    at_once = detections_to_results(canvas, (100, 100), (150, 200), 1, (1,))
    monkeypatch.setattr("vitdet.evaluation.detections.BYTES", 2 * 50 * 70)
    assert detections_to_results(canvas, (100, 100), (150, 200), 1, (1,)) == at_once
    assert detections_to_results(canvas[:0], (100, 100), (150, 200), 1, (1,)) == []


def test_a_perfect_detector_has_an_ap_of_100(spots):
    # box sides are whole pixels of a canvas up to 4 times finer or coarser than the image
    figures, results = evaluate_detector(BrightSpot(), spots, EvalConfig(batch_size=2))
    assert figures["box_ap50"] == figures["mask_ap50"] == pytest.approx(100)
    assert figures["box_ap"] > 80
    assert [result["image_id"] for result in results] == [1, 2, 3, 4]
    assert {result["category_id"] for result in results} == {9}


@pytest.mark.parametrize(("most", "name"), [(5, "100"), (100, "100"), (300, "300")])
def test_the_evaluation_limit_follows_the_detector_s_limit(spots, most, name, caplog):
    with caplog.at_level("INFO", "vitdet"):
        metrics, _ = evaluate_detector(BrightSpot(), spots, EvalConfig(max_detections=most))
    assert ("box_ar_100" in metrics) == (name == "100")
    assert metrics[f"box_ar_{name}"] == pytest.approx(100)
    said = "evaluate.max_detections=300: AP is computed with up to 300 detections"
    assert (said in caplog.text) == (most == 300)


def test_results_of_an_image_do_not_depend_on_its_batch(spots):
    alone = detect(BrightSpot(), spots, EvalConfig(batch_size=1))
    assert alone == detect(BrightSpot(), spots, EvalConfig(batch_size=3))
    assert alone == detect(BrightSpot(), replace(spots, workers=1), EvalConfig(batch_size=5))
    assert alone[1] == [1, 2, 3, 4, 5]


def test_two_processes_have_the_results_of_one_process(spots, monkeypatch):
    whole = detect(BrightSpot(), spots, EvalConfig(batch_size=2))
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "async_max", lambda value: lambda: value)
    monkeypatch.setattr(distributed, "gather_objects", lambda part: shares.append(part) or [part])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        detect(BrightSpot(), spots, EvalConfig(batch_size=2))
    assert len(shares[0]) + len(shares[1]) == 5
    monkeypatch.setattr(distributed, "gather_objects", lambda share: shares)
    assert detect(BrightSpot(), spots, EvalConfig(batch_size=2)) == whole


def test_evaluate_max_images_limits_only_validation(spots, caplog):
    caplog.set_level("INFO")
    figures, results = evaluate_detector(BrightSpot(), spots, EvalConfig(max_images=2))
    by_data = evaluate_detector(BrightSpot(), replace(spots, max_images=2), EvalConfig())
    assert (figures, results) == by_data
    assert [result["image_id"] for result in results] == [1, 2]
    assert figures["box_ap50"] == pytest.approx(100)
    assert "evaluate.max_images=2: AP is computed on 2 of 5 images in val" in caplog.messages
    assert len(TrainData(read_split(spots, "val"), spots, 0).records) == 4
    more = evaluate_detector(BrightSpot(), spots, EvalConfig(max_images=9))[1]
    assert [result["image_id"] for result in more] == [1, 2, 3, 4]


def test_limited_validation_has_a_different_protocol():
    plain, few = (load_config("tiny", overrides) for overrides in ([], ["evaluate.max_images=2"]))
    # as stored in the registry by version 0.1
    stored = ("score_threshold=0.05", "nms_iou=0.5", "max_detections=60")
    assert settings_of(plain) == " evaluate.".join(("data.dataset=coco", *stored))
    assert settings_of(few) == settings_of(plain) + " evaluate.max_images=2"
    assert Protocol.of(plain, "x").tag != Protocol.of(few, "x").tag
    with pytest.raises(ValueError, match="in few, evaluate.max_images is 2, not 0"):
        check_comparable(plain, few, "plain", "few")


def test_lvis_is_evaluated_by_its_own_rules(spots):
    root = Path(spots.root)
    tree = json.loads((root / "annotations" / "instances_val.json").read_text())
    # the last image has no annotation, so by the rules of LVIS it may contain a spot
    for image in tree["images"]:
        image["coco_url"] = f"http://host/val/{image.pop('file_name')}"
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category, frequency in zip(tree["categories"], "cr", strict=True):
        category["frequency"] = frequency
    (root / "annotations" / "lvis_v1_val.json").write_text(json.dumps(tree))
    bright = np.full((50, 60), 200, np.uint8)
    Image.fromarray(bright).save(root / "val" / "5.png")
    figures, results = evaluate_detector(BrightSpot(), replace(spots, dataset="lvis"), EvalConfig())
    assert 5 in {result["image_id"] for result in results}
    assert figures["box_ap50"] == figures["mask_ap50"] == pytest.approx(100)
    assert figures["box_ap_common"] == figures["box_ap"] and "box_ar_300" in figures
    assert "box_ap_rare" not in figures
    for category in tree["categories"]:
        del category["frequency"]
    (root / "annotations" / "lvis_v1_val.json").write_text(json.dumps(tree))
    message = "category 9: category whose frequency is not r, c or f: required by LVIS"
    with pytest.raises(ValueError, match=message):  # raised before any detection
        evaluate_detector(None, replace(spots, dataset="lvis"), EvalConfig())


@pytest.mark.parametrize("training", [True, False])
def test_the_detector_s_mode_is_restored(spots, training, tmp_path):
    detector = BrightSpot().train(training)
    evaluate_detector(detector, spots, EvalConfig(batch_size=5))
    assert detector.training is training
    write_pictures(detector, spots, tmp_path / "pictures", 1)
    assert detector.training is training
    Path(spots.root, "val", "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3.png"):
        evaluate_detector(detector, spots, EvalConfig(batch_size=5))
    assert detector.training is training


def test_a_checkpoint_has_the_final_metrics_of_its_run(trained, tiny, tmp_path):
    points = json.loads((trained / "points.json").read_text())
    last = points[max(points, key=int)]
    folders = {name: tmp_path / name for name in ("pictures", "plots")}
    metrics = evaluate(trained / "model.pt", **folders)
    for name, value in metrics.items():
        assert value == pytest.approx(last[name], abs=1e-6), name
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 4
    rows = json.loads((tmp_path / "plots" / "curve.json").read_text())
    kinds = {f"{kind}_iou{iou}" for kind in ("box", "mask") for iou in (50, 75)}
    assert set(rows[0]) == {"recall", *kinds} and len(rows) == 101
    (row, *_) = json.loads((tmp_path / "plots" / "classes.json").read_text())
    assert {"class", "box_ap", "mask_ap"} <= set(row)
    assert len(json.loads((tmp_path / "plots" / "results.json").read_text())) > 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_annotation_file_is_read_once(trained, tmp_path, monkeypatch):
    read, original = [], coco.read_entries

    def read_entries(path: Path, mapped: bool = True) -> object:
        read.append(path.name)
        return original(path, mapped)

    monkeypatch.setattr(coco, "read_entries", read_entries)
    evaluate(trained / "model.pt", pictures=tmp_path / "pictures", plots=tmp_path / "plots")
    assert read == ["instances_val.json"]


def test_settings_of_the_evaluation_can_change(trained, tmp_path):
    changes = ["evaluate.max_detections=1", "evaluate.nms_iou=0.25"]
    other = override(load_config(trained / "config.yaml"), changes)
    evaluate(trained / "model.pt", ["evaluate.nms_iou=0.5"], config=other, plots=tmp_path)
    images = [result["image_id"] for result in json.loads((tmp_path / "results.json").read_text())]
    assert len(images) == len(set(images)) == 4


@pytest.mark.parametrize("is_class", [True, False])
def test_other_classes_and_settings_are_refused(is_class, trained, spots, tmp_path):
    changes, message = [f"data.root={spots.root}", "data.val_split=val"], "class 0 is 'nothing'"
    if not is_class:
        changes = ["model.roi_heads.num_classes=3"]
        message = "model.roi_heads.num_classes=3.*only data"
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(trained / "model.pt", changes, pictures=tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_pictures_show_fixed_images_with_truth_and_detections(spots, tmp_path):
    first = write_pictures(BrightSpot(), spots, tmp_path / "a", 3)
    second = write_pictures(BrightSpot(), spots, tmp_path / "b", 3)
    assert [path.name for path in first] == [f"{number:012d}.jpg" for number in (1, 3, 5)]
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
    sheet = np.asarray(Image.open(first[1])).astype(int)
    half = sheet.shape[1] // 2
    color = sheet.max(2) - sheet.min(2) > 60  # only drawn pixels have a color
    assert color[:, :half].sum() > 1000 and color[:, half:].sum() > 1000
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(write_pictures(BrightSpot(), spots, tmp_path / "c", 50)) == 5


def test_spread_returns_distinct_indices_over_the_whole_range():
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(0, 8) == spread(8, 0) == []
