"""Objects without outlines: detectors without a mask head, mixed data, and their evaluation."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from tests.conftest import environment, minimal, options
from tests.helpers.published import DETECTORS, file_of
from tests.helpers.small import images, small_config, small_detector, target
from tests.weights.test_convert_file import FORK, PLAIN, write_config, write_model
from vitdet.checkpoint import load_model_file, restore_detector
from vitdet.config import DataConfig, EvalConfig, load_config
from vitdet.data.dataset import TrainData, read_split
from vitdet.data.layout import resolve_config
from vitdet.demo.tiny import make_tiny
from vitdet.evaluation.coco import compare, summary
from vitdet.evaluation.results import read_truth
from vitdet.models import build_detector
from vitdet.models.assign import BACKGROUND
from vitdet.models.losses import mask_bce
from vitdet.models.mask_head import BINS
from vitdet.models.roi_pool import pool
from vitdet.predictor import Predictor
from vitdet.types import Targets
from vitdet.weights.convert import convert_file, shapes_of
from vitdet.weights.formats import FORMATS
from vitdet.weights.formats.table import to_ours
from vitdet.weights.load import Source, fitted, load_pretrained

BOXES = [[10, 20, 60, 70], [50, 5, 120, 100], [30, 60, 90, 120], [5, 5, 40, 40]]
LABELS = [0, 1, 2, 3]
SERVED = """
import mlflow, numpy
model = mlflow.pyfunc.load_model("models:/vitdet/1")
print(*model.predict(numpy.zeros((64, 64, 3), numpy.uint8), params={"threshold": 0.0}).columns)
"""
PATTERNS = [
    [[True] * 4, [True] * 4],
    [[True, False, True, False], [False, True, True, True]],
    [[False] * 4, [True, False, False, False]],
    [[False] * 4, [False] * 4],
]


def slow_mask_loss(detector, features, assigned, targets) -> torch.Tensor:
    """Compute the mean loss of all mask cells in a loop over boxes."""
    heads, losses, cells = detector.roi_heads, torch.zeros(()), 0
    first = torch.zeros(1, dtype=torch.int64)
    for i, truth in enumerate(targets):
        of_image = [level[i : i + 1] for level in features]
        taken = 0
        for box, matched in zip(assigned.boxes[i], assigned.matched[i].tolist(), strict=True):
            if matched <= BACKGROUND or not truth.has_mask[matched] or taken == heads.mask_samples:
                continue
            taken += 1
            pooled = pool(of_image, box[None], first, heads.strides, BINS, heads.sampling_ratio)
            logits = heads.mask(pooled, truth.labels[matched : matched + 1])
            wanted = heads.mask_targets(truth.masks[[matched]], box[None])
            losses = losses + mask_bce(logits, wanted) * wanted.numel()
            cells += wanted.numel()
    return losses / max(cells, 1)


@pytest.mark.parametrize("ious", [(0.5,), (0.5, 0.6, 0.7)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_objects_without_an_outline_are_excluded_from_the_mask_loss(
    pattern: list[list[bool]], ious: tuple[float, ...]
) -> None:
    detector = small_detector(ious=ious).train()
    pixels = images(2).float()
    targets = [replace(target(BOXES, LABELS), has_mask=torch.tensor(row)) for row in pattern]
    torch.manual_seed(3)
    losses = detector(pixels, targets)
    sizes = torch.tensor([[128, 128]] * 2)
    torch.manual_seed(3)
    features = detector.pyramid(detector.backbone(detector.normalize(pixels, sizes)))
    found = detector.rpn(features)
    proposals = detector.rpn.propose(found, sizes, detector.rpn.top_train)
    batch = Targets.of(targets)
    assigned = detector.roi_heads.sample(proposals.boxes, proposals.filled, batch)
    expected = slow_mask_loss(detector, features, assigned, targets)
    assert losses["loss_mask"].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    torch.manual_seed(3)
    others = detector(pixels, [target(BOXES, LABELS)] * 2)
    assert all(losses[key] == others[key] for key in losses.keys() | others if key != "loss_mask")
    losses["loss_mask"].backward()  # even without masks, as DDP needs a gradient on every rank


@pytest.mark.parametrize("ious", [(0.5,), (0.5, 0.6, 0.7)])
def test_a_detector_without_masks_has_equal_boxes_and_box_losses(ious: tuple[float, ...]) -> None:
    whole = small_detector(ious=ious)
    config = small_config(ious)
    config = replace(config, mask=replace(config.mask, enabled=False))
    boxes = build_detector(config, EvalConfig(score_threshold=0.05, max_detections=20))
    weights = {k: v for k, v in whole.state_dict().items() if not k.startswith("roi_heads.mask.")}
    assert boxes.state_dict().keys() == weights.keys()
    boxes.load_state_dict(weights)
    targets = [target(BOXES, LABELS)] * 2
    torch.manual_seed(3)
    ours = boxes.train()(images(2).float(), targets)
    torch.manual_seed(3)
    theirs = whole.train()(images(2).float(), targets)
    assert ours == {key: loss for key, loss in theirs.items() if key != "loss_mask"}
    found = boxes.eval()(images(2).float())
    for boxed, other in zip(found, whole.eval()(images(2).float()), strict=True):
        assert boxed.masks is None and torch.equal(boxed.boxes, other.boxes) and len(boxed) > 0
        assert torch.equal(boxed.scores, other.scores) and boxed[:1].to("cpu").masks is None


def without_outlines(folder: Path, share: int = 1, splits: tuple[str, ...] = ("train", "val")):
    """Remove the outline of every `share`-th object."""
    for split in splits:
        path = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for number, annotation in enumerate(content["annotations"]):
            if number % share == 0:
                annotation["segmentation"] = []
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "data", 4, 2)
    return tmp_path / "data"


def test_masks_are_disabled_if_the_training_split_has_no_outline(tiny: Path) -> None:
    key = "model.mask.enabled"
    assert resolve_config("tiny", minimal(tiny))[0].model.mask.enabled
    without_outlines(tiny, splits=("val",))
    assert resolve_config("tiny", minimal(tiny))[0].model.mask.enabled
    without_outlines(tiny)
    config, found = resolve_config("tiny", minimal(tiny))
    assert not config.model.mask.enabled and found[key] is False
    explicit, found = resolve_config("tiny", [*minimal(tiny), f"{key}=true"])
    assert explicit.model.mask.enabled and key not in found


def test_boxes_without_an_outline_are_transformed_as_rectangles(tiny: Path) -> None:
    data = DataConfig(root=str(tiny), train_split="train", val_split="val", image_size=128)
    whole = TrainData(read_split(data, "train"), data, seed=0)
    without_outlines(tiny, share=2)
    split = read_split(data, "train")
    mixed = TrainData(split, data, seed=0)
    assert split.outlines and split.unmasked == {
        "without an outline": sum(int(record.own_box.sum()) for record in split.records)
    }
    seen = 0
    for position in range(12):
        (objects,), (other,) = mixed[position].targets, whole[position].targets
        assert objects.has_mask is None or len(objects.has_mask) == len(objects.boxes)
        if len(objects) == len(other) and objects.has_mask is not None:
            kept = objects.has_mask
            assert torch.equal(objects.boxes[kept], other.boxes[kept])
            # the rectangle's visible part contains the outline's visible part
            inside = (objects.boxes[~kept][:, :2] <= other.boxes[~kept][:, :2] + 1e-3).all(1)
            inside &= (objects.boxes[~kept][:, 2:] >= other.boxes[~kept][:, 2:] - 1e-3).all(1)
            assert inside.all()
            seen += int((~kept).sum())
    assert seen > 5


def slow_mask_ap(truth: dict, results: list[dict]) -> float:
    """Compute the mask AP of one class and image in loops over thresholds and detections."""
    size = [truth["images"][0][side] for side in ("height", "width")]
    masked = [item for item in truth["annotations"] if item["segmentation"]]
    boxed = np.array([item["bbox"] for item in truth["annotations"] if item not in masked], float)
    ignored = [0] * len(boxed)
    codes = [rle.merge(rle.frPyObjects(item["segmentation"], *size)) for item in masked]
    precisions = []
    for threshold in np.linspace(0.5, 0.95, 10):
        free, hits = set(range(len(codes))), []
        for result in sorted(results, key=lambda item: -item["score"]):
            ious = rle.iou([result["segmentation"]], codes, [0] * len(codes))[0]
            best = max(free, key=lambda i: ious[i], default=None)
            if best is not None and ious[best] >= threshold:
                free.remove(best)
                hits.append(1)
            elif rle.iou(np.array([result["bbox"]], float), boxed, ignored).max() < threshold:
                hits.append(0)
        found = np.cumsum(hits)
        recall = found / len(codes)
        precision = found / np.arange(1, len(hits) + 1)
        levels = np.linspace(0, 1, 101)
        precisions.append(np.mean([max(precision[recall >= at], default=0.0) for at in levels]))
    return 100 * float(np.mean(precisions))


def rectangle(box: list[float]) -> list[list[float]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.mark.parametrize("seed", range(6))
def test_mask_ap_of_mixed_data_equals_a_slow_computation(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sides = [(*rng.integers(0, 140, 2), *rng.integers(20, 60, 2)) for _ in range(7)]
    boxes = [list(map(int, box)) for box in sides]
    of_image = {"image_id": 1, "category_id": 1}
    annotations = [
        {**of_image, "id": i + 1, "iscrowd": 0, "bbox": box, "area": box[2] * box[3]}
        | {"segmentation": rectangle(box) if i % 2 else []}
        for i, box in enumerate(boxes)
    ]
    pictures = [{"id": 1, "file_name": "1.png", "height": 200, "width": 200}]
    truth = {"images": pictures, "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
    results = []
    for box in (box for box in boxes for _ in range(3)):
        moved = (np.array(box) + rng.integers(-6, 7, 4)).clip(1).tolist()
        code = rle.frPyObjects(rectangle(moved), 200, 200)[0]
        code["counts"] = code["counts"].decode()
        found = {"bbox": moved, "score": float(rng.random()), "segmentation": code}
        results.append(of_image | found)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    metrics = summary(compare(read_truth(tmp_path / "truth.json"), results))
    assert metrics["mask_ap"] == pytest.approx(slow_mask_ap(truth, results), abs=1e-6)
    # results without boxes use the boxes of their masks
    every = [{key: result[key] for key in result if key != "bbox"} for result in results]
    alone = summary(compare(read_truth(tmp_path / "truth.json"), every, kinds=["segm"]))
    assert set(alone) == {key for key in metrics if key.startswith("mask_")}
    for annotation in annotations:
        annotation["segmentation"] = None
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    boxes_only = summary(compare(read_truth(tmp_path / "truth.json"), results))
    assert not any(key.startswith("mask_") for key in boxes_only)
    assert boxes_only == {key: metrics[key] for key in boxes_only}


def test_training_evaluation_and_prediction_work_with_box_only_data(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vitdet import Predictor as Public
    from vitdet import stages
    from vitdet.evaluation.evaluator import evaluate

    without_outlines(tiny)
    config, _ = resolve_config("tiny", minimal(tiny))
    with caplog.at_level(logging.INFO):
        path = stages.train(config, "tiny", tiny.parent / "out")
    stored = torch.load(path, weights_only=True)
    assert not stored["config"]["model"]["mask"]["enabled"]
    assert not any("mask" in name for name in stored["model"])
    metrics = evaluate(path, pictures=tiny.parent / "pictures", plots=tiny.parent / "plots")
    assert "box_ap" in metrics and not any(key.startswith("mask") for key in metrics)
    assert list((tiny.parent / "pictures").glob("*.jpg"))
    results = json.loads((tiny.parent / "plots" / "results.json").read_text())
    assert results and not any("segmentation" in result for result in results)
    image = next((tiny / "val").iterdir())
    found = Public.load(path)(image, threshold=0.0)
    assert found.masks is None and found.draw(image).size[0] > 0 and Public is Predictor


def test_an_explicit_mask_head_without_outlines_causes_a_warning(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vitdet.training import train

    without_outlines(tiny)
    config = load_config("tiny", minimal(tiny, optim__steps=1))
    train(config, tiny.parent / "out")
    assert "the mask head is not trained" in caplog.text


@pytest.mark.parametrize("name", DETECTORS)
def test_a_box_only_detector_has_the_published_names_without_the_mask_head(name: str) -> None:
    system, _, _ = name.partition("/")
    config = load_config(DETECTORS[name], ["model.mask.enabled=false"])
    layout = FORMATS[system]
    head = ("roi_heads.mask_head.", "roi_head.mask_head.")
    file = {key: tensor for key, tensor in file_of(name).items() if not key.startswith(head)}
    assert len(file) < len(file_of(name))
    ours = to_ours(file, layout)
    whole = to_ours(file_of(name), layout)
    assert ours.keys() == {key for key in whole if not key.startswith("roi_heads.mask.")}
    weights, _ = fitted(Source(ours, system, layout.scaled), shapes_of(config), Path(f"{name}.pkl"))
    assert weights.keys() == shapes_of(config).state_dict().keys()


@pytest.mark.parametrize(("layout", "suffix"), [("detectron2", ".pkl"), ("mmdet", ".pth")])
@pytest.mark.parametrize("enabled", ["true", "false"])
def test_a_box_only_file_is_converted_in_both_directions_with_any_recipe(
    tiny: Path, tmp_path: Path, layout: str, suffix: str, enabled: str
) -> None:
    changes = PLAIN if layout == "detectron2" else FORK
    boxes = write_config(tiny, tmp_path / "boxes.yaml", [*changes, "model.mask.enabled=false"])
    masks = f"model.mask.enabled={enabled}"
    recipe = write_config(tiny, tmp_path / "recipe.yaml", [*changes, masks])
    model = write_model(boxes, tmp_path / "model.pt")
    convert_file(model, tmp_path / f"theirs{suffix}", layout, reverse=True)
    notes = convert_file(tmp_path / f"theirs{suffix}", tmp_path / "back.pt", layout, recipe)
    detector, config, _ = restore_detector(tmp_path / "back.pt")
    assert not config.model.mask.enabled
    assert ("the file has no mask head: model.mask.enabled=false" in notes) == (enabled == "true")
    expected = load_model_file(model)["model"]
    assert detector.state_dict().keys() == expected.keys()
    for key, tensor in detector.state_dict().items():
        assert torch.allclose(tensor, expected[key], atol=1e-6)


@pytest.mark.parametrize(
    ("file", "here", "note"),
    [
        ("true", "false", "roi_heads.mask.*: not loaded (this detector has no mask head)"),
        ("false", "true", "roi_heads.mask.*: newly initialized (the file has no mask head)"),
    ],
)
def test_detectors_with_and_without_masks_initialize_each_other(
    tiny: Path, tmp_path: Path, file: str, here: str, note: str
) -> None:
    recipe = write_config(tiny, tmp_path / "file.yaml", [f"model.mask.enabled={file}"])
    model = write_model(recipe, tmp_path / "model.pt")
    config = load_config("tiny", [*minimal(tiny), f"model.mask.enabled={here}"])
    detector = build_detector(config.model)
    loaded = load_pretrained(detector, model)
    assert note in loaded.notes
    assert all(name.startswith("roi_heads.mask.") for name in loaded.fresh)
    stored = load_model_file(model)["model"]
    own = detector.state_dict()
    assert all(torch.equal(own[key], stored[key]) for key in own.keys() - set(loaded.fresh))


@pytest.mark.slow
def test_commands_from_data_check_to_pipeline_run_accept_box_only_data(
    vitdet: Callable[..., tuple[int, str, str]], tiny: Path
) -> None:
    """Run the commands as a user does."""
    without_outlines(tiny)
    folder, space = tiny.parent, tiny.parent / "space"
    sets, metrics = options(minimal(tiny)), folder / "metrics.json"
    model = folder / "out" / "model.pt"
    code, said, _ = vitdet("data", "check", tiny)
    assert code == 0 and "object without an outline" in said
    assert vitdet("data", "report", tiny, "--output", folder / "page.html")[0] == 0
    code, _, said = vitdet("train", "tiny", *sets, "--output", folder / "out")
    assert code == 0 and "box AP" in said and "mask AP" not in said
    code, said, _ = vitdet("evaluate", model, "--output", metrics)
    assert code == 0 and "mask" not in said and "box_ap" in json.loads(metrics.read_text())
    assert vitdet("register", model)[0] == 0

    def run(*argv: object) -> str:
        words, env = [sys.executable, *map(str, argv)], environment(folder)
        done = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    columns = run("-c", SERVED).split()
    assert "score" in columns and "mask" not in columns
    said = run("-m", "pipeline", "run", "tiny", "--workspace", space, *sets)
    assert "model.mask.enabled=false" in said and "box AP" in said
