"""The inputs of a detector's golden case: config, weights, images and ground truth; no stored results.

A case for inference has no ground truth: no ground_truth.json, or one with sizes only, and no gt
arrays in inputs.npz. Its training settings are optional and default to the published ones.
The published samplers draw at random; the cases use `evenly` instead (tests/golden/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers import parts
from tests.parity.bitmaps import BitmapRoIHeads, Bitmaps
from vitdet.data.masks import edges_of
from vitdet.models.detector import Detector
from vitdet.models.losses import FederatedClassification, SoftmaxClassification
from vitdet.types import Polygons, Target
from vitdet.weights.formats.detectron2 import DETECTRON2
from vitdet.weights.formats.table import rename, to_ours


def evenly(candidates: Tensor, num: Tensor) -> Tensor:
    """Return keys that select the candidates at positions floor(i M / num) of M (i < num), not a draw.

    Candidate p of a row is selected if p = floor(i M / num) for i = ceil(p num / M) < num. `candidates`: (B, N) bool.
    """
    position = candidates.cumsum(dim=1) - 1
    total, num = candidates.sum(dim=1, keepdim=True).clamp(min=1), num[:, None]
    number = (position * num + total - 1) // total
    chosen = (number < num) & (number * total // num.clamp(min=1) == position)
    return torch.where(chosen, 1 - number / (num + 1), 0.0)


def build(config: dict) -> Detector:
    """Build the detector of a case's config.json; the class frequencies are part of its weights."""
    stages = 3 if config["cascade"] else 1
    classes, channels, depth = config["num_classes"], config["out_channels"], config["depth"]
    backbone = parts.vit(
        dim=config["embed_dim"],
        depth=depth,
        heads=config["num_heads"],
        patch_size=config["patch_size"],
        global_blocks=[i for i in range(depth) if i not in config["window_block_indexes"]],
        window_size=config["window_size"],
        pos_embed_grid=config["pretrain_img_size"] // config["patch_size"],
        rel_pos_size=config["img_size"],
        residual_blocks=config["residual_block_indexes"],
    )
    pyramid = parts.pyramid(backbone.out_channels, channels, backbone.stride)
    classification: nn.Module = SoftmaxClassification(num_classes=classes)
    if config["lvis"]:
        num, odds = config.get("fed_loss_num_classes", 50), torch.ones(classes)
        classification = FederatedClassification(class_weights=odds, num=num, draw=False)
    scale = config["anchor_sizes"][0][0] / pyramid.strides[0]
    sizes = {"channels": channels, "num_convs": 4, "num_classes": classes}
    box = {**sizes, "fc_dim": config["fc_dim"], "class_agnostic": stages > 1}
    return Detector(
        backbone=backbone,
        pyramid=pyramid,
        rpn=parts.rpn(
            channels=channels,
            strides=pyramid.strides,
            anchor_scale=scale,
            samples=config.get("rpn_batch", 256),
            pre_nms_train=config["pre_nms_topk"][0],
            pre_nms_test=config["pre_nms_topk"][1],
            post_nms_train=config["post_nms_topk"][0],
            post_nms_test=config["post_nms_topk"][1],
            choose=evenly,
        ),
        roi_heads=parts.roi_heads(
            BitmapRoIHeads,
            stages=[parts.box_head(**box) for _ in range(stages)],
            mask=parts.mask_head(**sizes),
            classification=classification,
            strides=pyramid.strides[:4],
            ious=(0.5, 0.6, 0.7)[:stages],
            samples=config.get("roi_batch", 512),
            score_threshold=config["score_thresh"],
            max_detections=config["test_topk"],
            choose=evenly,
        ),
    )


@dataclass
class Case:
    """The detector with its weights, images on the canvas, and ground truth as bitmaps and as polygons.

    `bitmaps` or `polygons` is empty if the case does not have that form. `outputs` are the sizes
    (height, width) of the final detections, by default those of the images.
    """

    config: dict
    weights: dict[str, np.ndarray]
    detector: Detector
    images: Tensor
    sizes: Tensor
    outputs: list[tuple[int, int]]
    bitmaps: list[Target]
    polygons: list[Target]
    truth: list[dict]
    inputs: dict[str, np.ndarray]

    @staticmethod
    def read(folder: Path) -> Case:
        """Read config.json, state_dict.npz, inputs.npz and ground_truth.json, and nothing else."""
        config = json.loads((folder / "config.json").read_text())
        path = folder / "ground_truth.json"
        truth = json.loads(path.read_text()) if path.exists() else []
        inputs, weights = load(folder / "inputs.npz"), load(folder / "state_dict.npz")
        detector = build(config)
        detector.load_state_dict(to_ours(as_tensors(weights), DETECTRON2))
        side, count = config["square_pad"], sum(name.startswith("image") for name in inputs)
        if truth and len(truth) != count:
            raise ValueError(f"{path}: expected {count} entries, one per image, got {len(truth)}")
        by_bitmap = any(name.startswith("gt_") for name in inputs)
        by_bitmap |= bool(truth) and all("classes" in entry for entry in truth)
        by_polygon = bool(truth) and all("polygons" in entry for entry in truth)
        images, sizes = torch.zeros(count, 3, side, side, dtype=torch.uint8), []
        bitmaps, polygons, outputs = [], [], []
        for i in range(count):
            pixels = torch.from_numpy(inputs[f"image{i}"]).permute(2, 0, 1)
            height, width = pixels.shape[1:]
            images[i, :, :height, :width] = pixels
            sizes.append((height, width))
            outputs.append(output_size(config, truth[i] if truth else {}, i, (height, width)))
            boxes, labels, masks = read_target(inputs, i, height, width)
            if by_bitmap:
                bitmaps.append(Target(boxes, labels, Bitmaps(masks)))
            if by_polygon:
                outlines = map(torch.from_numpy, edges_of(truth[i]["polygons"], height, width))
                polygons.append(Target(boxes, labels, Polygons.of(*outlines)))
        return Case(
            config=config,
            weights=weights,
            detector=detector,
            images=images,
            sizes=torch.tensor(sizes),
            outputs=outputs,
            bitmaps=bitmaps,
            polygons=polygons,
            truth=truth,
            inputs=inputs,
        )

    def their_names(self) -> dict[str, str]:
        """Return {our name: their name} of every parameter."""
        ours = {rename(name, DETECTRON2): name for name in reversed(self.weights)}
        return {name: ours[name] for name, _ in self.detector.named_parameters()}


def output_size(config: dict, truth: dict, i: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of image i's final detections: from the ground truth, the config, or the image."""
    if "out_height" in truth:
        return truth["out_height"], truth["out_width"]
    return tuple(config["outputs"][i]) if "outputs" in config else size


def read_target(
    inputs: dict[str, np.ndarray], i: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (G, 4), labels (G,), masks (G, height, width) of image i; without objects, arrays may be missing."""
    boxes = inputs.get(f"gt_boxes{i}", np.zeros((0, 4), np.float32))
    labels = inputs.get(f"gt_classes{i}", np.zeros(0, np.int64))
    masks = inputs.get(f"gt_masks{i}", np.zeros((0, height, width), bool))
    shapes = (boxes.reshape(-1, 4), labels.reshape(-1), masks.reshape(-1, height, width))
    boxes, labels, masks = (torch.from_numpy(array) for array in shapes)
    return boxes.float(), labels.long(), masks.bool()


def as_tensors(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Tensor]:
    """Return the arrays as tensors, with a prefix to their names."""
    return {prefix + name: torch.from_numpy(array) for name, array in arrays.items()}


def load(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file whose names are wanted; others are not read."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files if wanted(name)}
