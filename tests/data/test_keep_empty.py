"""`data.keep_empty`: sampling of images without objects, and their loss against values computed by hand."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import minimal
from tests.helpers.small import CLASSES, images, small_detector, target
from vitdet.config import DataConfig, load_config
from vitdet.data.dataset import TrainData, read_split
from vitdet.data.fingerprint import fingerprints
from vitdet.data.loader import train_loader
from vitdet.models.assign import BACKGROUND
from vitdet.models.boxes import encode
from vitdet.models.roi_heads import Assigned
from vitdet.models.rpn import WEIGHTS
from vitdet.training import train
from vitdet.types import Targets

FULL, EMPTY = target([[10, 10, 60, 70], [40, 50, 120, 120]], [0, 3]), target([], [])


@pytest.fixture
def data(tiny: Path, tmp_path: Path) -> DataConfig:
    """The demo data, with only crowds in the first training image and no object in the second."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).symlink_to(tiny / split)
        path = tiny / "annotations" / f"instances_{split}.json"
        (root / path.relative_to(tiny)).write_text(path.read_text())
    path = root / "annotations" / "instances_train.json"
    tree = json.loads(path.read_text())
    first, second = sorted(image["id"] for image in tree["images"])[:2]
    tree["annotations"] = [item for item in tree["annotations"] if item["image_id"] != second]
    for item in tree["annotations"]:
        item["iscrowd"] = int(item["image_id"] == first)
    path.write_text(json.dumps(tree))
    data = load_config("tiny", [*minimal(tiny), f"data.root={root}"]).data
    return replace(data, workers=0, image_size=64, scale_range=(1.0, 1.0))


def ids_of(data: DataConfig) -> list[int]:
    records = TrainData(read_split(data, "train"), data, 0).records
    return sorted({record.image_id for record in records})


@pytest.mark.parametrize("keep", [False, True])
def test_images_without_objects_are_omitted_or_used_as_background(
    data: DataConfig, keep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    every = [record.image_id for record in read_split(data, "train").records]
    data = replace(data, keep_empty=keep)
    assert ids_of(data) == (every if keep else every[2:])
    loader = train_loader(data, len(every), 0, 0, 1)
    path = Path(data.root) / "annotations" / "instances_train.json"
    done = "used as background" if keep else "ignored"
    assert f"{path}: images without objects ({done}): 2" in caplog.messages
    batch = next(iter(loader))
    if keep:
        assert sorted(batch.image_ids) == every
        for image_id, found in zip(batch.image_ids, batch.targets, strict=True):
            assert (len(found) == 0) == (image_id in every[:2])
            assert found.boxes.shape[1:] == (4,) and len(found.masks) == len(found)
    plain, own = (list(train_loader(split, 2, 0, 3, 6)) for split in (data, data))
    assert [batch.image_ids for batch in plain] == [batch.image_ids for batch in own]


def test_only_crops_of_images_with_objects_are_redrawn(data: DataConfig) -> None:
    data = replace(data, keep_empty=True, redraw_empty=True)
    count = len(read_split(data, "train").records)
    batch = next(iter(train_loader(data, count, 0, 0, 1)))
    assert sum(len(found) == 0 for found in batch.targets) == 2
    assert len(set(batch.image_ids)) == count


def test_images_without_objects_have_a_repeat_factor_of_1(data: DataConfig) -> None:
    data = replace(data, keep_empty=True, repeat_threshold=1.0)
    seen = [image_id for batch in train_loader(data, 8, 0, 0, 40) for image_id in batch.image_ids]
    first = read_split(data, "train").records[0].image_id
    assert 0 < seen.count(first) <= math.ceil(len(seen) / len(ids_of(data))) + 1


def test_max_images_includes_empty_images_only_in_training(data: DataConfig) -> None:
    every = [record.image_id for record in read_split(data, "train").records]
    few = replace(data, max_images=3)
    assert ids_of(few) == every[2:5]
    kept = replace(few, keep_empty=True)
    assert ids_of(kept) == every[:3]
    prints = [fingerprints(split) for split in (few, kept)]
    assert prints[0]["val"] == prints[1]["val"] and prints[0]["train"] != prints[1]["train"]


def test_a_training_split_without_objects_is_refused(data: DataConfig) -> None:
    data = replace(data, keep_empty=True)
    with pytest.raises(ValueError, match="no image of train has a usable object"):
        train_loader(replace(data, max_images=2), 1, 0, 0, 1)  # the two images without objects
    path = Path(data.root) / "annotations" / "instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(ValueError, match="no image of train has a usable object"):
        train_loader(data, 1, 0, 0, 1)


def cross_entropy(logit: float, truth: bool) -> float:
    return math.log1p(math.exp(-abs(logit))) + max(-logit if truth else logit, 0)


@pytest.mark.parametrize("targets", [[FULL, EMPTY], [EMPTY, FULL], [EMPTY, EMPTY]])
def test_the_losses_include_an_image_without_objects(targets: list) -> None:
    """The image's anchors and boxes are background; all losses but the mask loss include them."""
    detector = small_detector().train()
    pixels, sizes = images(2).float(), torch.tensor([[128, 128]] * 2)
    torch.manual_seed(3)
    losses = {name: loss.item() for name, loss in detector(pixels, targets).items()}
    torch.manual_seed(3)
    rpn, heads = detector.rpn, detector.roi_heads
    features = detector.pyramid(detector.backbone(detector.normalize(pixels, sizes)))
    found = rpn(features)
    proposals, batch = rpn.propose(found, sizes, rpn.top_train), Targets.of(targets)
    assigned = heads.sample(proposals.boxes, proposals.filled, batch)
    filled = assigned.filled
    logits, deltas = (rows[filled] for rows in heads.run_stage(0, features, assigned.boxes, filled))
    boxes, matched = assigned.boxes[filled], assigned.matched[filled].tolist()
    owner = filled.nonzero()[:, 0].tolist()
    expected = {"loss_cls": 0.0, "loss_box_reg": 0.0, "loss_rpn_cls": 0.0, "loss_rpn_loc": 0.0}
    for row, (image, truth) in enumerate(zip(owner, matched, strict=True)):
        assert truth == BACKGROUND or targets[image] is FULL
        label = CLASSES if truth == BACKGROUND else int(targets[image].labels[truth])
        odds = logits[row].exp()
        expected["loss_cls"] -= math.log((odds[label] / odds.sum()).item()) / len(boxes)
        if truth != BACKGROUND:
            wanted = encode(boxes[row][None], targets[image].boxes[[truth]], heads.weights[0])[0]
            miss = (deltas[row, label] - wanted).abs().sum().item()
            expected["loss_box_reg"] += miss / len(boxes)
    anchors = torch.cat(found.anchors)
    matches, sampled = rpn.sample(anchors, batch)
    for image, truth in enumerate(targets):
        owners, used = matches[image], sampled.chosen[image][sampled.filled[image]]
        assert len(used) == rpn.samples
        assert truth is FULL or not sampled.foreground[image].any()
        for chosen in used.tolist():
            logit = torch.cat(found.logits, 1)[image, chosen].item()
            is_object = int(owners[chosen]) != BACKGROUND
            expected["loss_rpn_cls"] += cross_entropy(logit, is_object) / (2 * rpn.samples)
            if is_object:
                box = truth.boxes[[int(owners[chosen])]]
                wanted = encode(anchors[[chosen]], box, WEIGHTS)[0]
                miss = (torch.cat(found.deltas, 1)[image, chosen] - wanted).abs().sum().item()
                expected["loss_rpn_loc"] += miss / (2 * rpn.samples)
    mask = heads.mask_loss(features, assigned, batch).item()
    assert losses == pytest.approx({**expected, "loss_mask": mask}, rel=1e-4, abs=1e-6)
    for alone in (i for i, kind in enumerate(targets) if kind is FULL):  # mean of FULL's masks
        only = slice(alone, alone + 1)
        of_full = [level[only] for level in features]
        own = Assigned(assigned.boxes[only], assigned.matched[only], assigned.most)
        loss = heads.mask_loss(of_full, own, Targets.of([FULL])).item()
        assert mask == pytest.approx(loss, rel=1e-5)


def test_losses_with_background_images_are_finite(data: DataConfig, tmp_path: Path) -> None:
    changes = ["data.keep_empty=true", "data.workers=0", "optim.steps=2"]
    settings = [*minimal(Path(data.root)), *changes]
    model = train(load_config("tiny", settings), tmp_path / "run")
    stored = torch.load(model, weights_only=True)["model"]
    assert all(np.isfinite(value.numpy()).all() for value in stored.values())
