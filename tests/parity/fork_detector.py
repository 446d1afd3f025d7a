"""Run a golden detector of ViTAE-Transformer/ViTDet, a fork of mmdet 2.18: from config, weights, image and ground truth
to maps, proposals, detections, masks and training losses.

`compare_fork` then reads the stored results. The losses were computed without sampling: the number of
samples is `EVERYTHING`. A case without ground truth has no losses, and its config needs no training
settings.
Notation: K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import parts
from tests.parity.backbone import system_of
from tests.parity.bitmaps import BitmapRoIHeads, Bitmaps
from tests.parity.case import as_tensors, load
from tests.parity.device import CPU, moved
from vitdet.data.masks import paste
from vitdet.models import losses, mask_head
from vitdet.models.assign import BACKGROUND, Match, match, match_keeping_best
from vitdet.models.box_head import BoxHead
from vitdet.models.boxes import MAX_LOG_SCALE, encode
from vitdet.models.detector import Detector
from vitdet.models.losses import SoftmaxClassification
from vitdet.models.mask_head import MaskHead
from vitdet.models.roi_pool import pool
from vitdet.models.rpn import RPN, WEIGHTS
from vitdet.types import Target, Targets
from vitdet.weights.formats.table import to_ours

EPS = 1e-5  # LayerNorms in neck and heads
EVERYTHING = 1_000_000
# type -> numbers of convolutions and of fully connected layers
BOX_HEADS = {"Shared4Conv1FCBBoxHead": (4, 1), "Shared2FCBBoxHead": (0, 2)}
TRUTH = ("gt_boxes", "gt_labels", "gt_masks")
INPUTS = ("img", *TRUTH)
# Default train_cfg of a config for inference, which does not use its values.
INFERENCE = {
    "rpn": {"assigner": {"pos_iou_thr": 0.7, "neg_iou_thr": 0.3, "match_low_quality": False}},
    "rpn_proposal": {"nms_pre": 2000, "max_per_img": 1000},
    "rcnn": {"assigner": {"pos_iou_thr": 0.5, "match_low_quality": False}},
}


def match_of(assigner: dict) -> Match:
    """Return the matching function of an assigner. Raises ValueError for unsupported settings."""
    if not assigner["match_low_quality"]:
        return match
    if assigner["min_pos_iou"] != assigner["neg_iou_thr"]:
        raise ValueError(
            f"min_pos_iou: expected neg_iou_thr, {assigner['neg_iou_thr']}, got {assigner['min_pos_iou']}"
        )
    return match_keeping_best


def build(model: dict) -> Detector:
    """Build the detector that `model` of an mmdet config describes."""
    backbone = system_of(model["backbone"]).build(model["backbone"]).backbone
    channels, rpn, roi = model["neck"]["out_channels"], model["rpn_head"], model["roi_head"]
    box, mask, test = roi["bbox_head"], roi["mask_head"], model["test_cfg"]
    train = model.get("train_cfg") or INFERENCE
    pyramid = parts.pyramid(
        backbone.out_channels, channels, backbone.stride, halve_channels=False, eps=EPS
    )
    num_convs, num_fcs = BOX_HEADS[box["type"]]
    stage = BoxHead(
        channels=channels,
        num_convs=num_convs,
        num_fcs=num_fcs,
        fc_dim=box["fc_out_channels"],
        num_classes=box["num_classes"],
        class_agnostic=box["reg_class_agnostic"],
        norm="norm_cfg" in box,
        eps=EPS,
    )
    return Detector(
        backbone=backbone,
        pyramid=pyramid,
        rpn=RPN(
            channels=channels,
            strides=rpn["anchor_generator"]["strides"],
            anchor_scale=rpn["anchor_generator"]["scales"][0],
            aspect_ratios=rpn["anchor_generator"]["ratios"],
            num_convs=rpn["num_convs"],
            norm="norm_cfg" in rpn,
            eps=EPS,
            samples=EVERYTHING,
            positive_fraction=1.0,
            iou_low=train["rpn"]["assigner"]["neg_iou_thr"],
            iou_high=train["rpn"]["assigner"]["pos_iou_thr"],
            nms_iou=test["rpn"]["nms"]["iou_threshold"],
            pre_nms_train=train["rpn_proposal"]["nms_pre"],
            post_nms_train=train["rpn_proposal"]["max_per_img"],
            pre_nms_test=test["rpn"]["nms_pre"],
            post_nms_test=test["rpn"]["max_per_img"],
            divide_by_sampled=True,
            min_log_scale=-MAX_LOG_SCALE,
            match=match_of(train["rpn"]["assigner"]),
        ),
        roi_heads=BitmapRoIHeads(
            stages=[stage],
            classification=SoftmaxClassification(num_classes=box["num_classes"]),
            strides=pyramid.strides[:4],
            mask=MaskHead(
                channels=channels,
                num_convs=mask["num_convs"],
                num_classes=mask["num_classes"],
                norm="norm_cfg" in mask,
                eps=EPS,
            ),
            ious=[train["rcnn"]["assigner"]["pos_iou_thr"]],
            samples=EVERYTHING,
            positive_fraction=1.0,
            mask_samples=EVERYTHING,
            sampling_ratio=roi["bbox_roi_extractor"]["roi_layer"]["sampling_ratio"],
            score_threshold=test["rcnn"]["score_thr"],
            nms_iou=test["rcnn"]["nms"]["iou_threshold"],
            max_detections=test["rcnn"]["max_per_img"],
            min_log_scale=-MAX_LOG_SCALE,
            match=match_of(train["rcnn"]["assigner"]),
        ),
    )


@dataclass
class Computed:
    """Arrays named as in io.npz, the detections' bitmaps (N, H, W) on the original image, and the losses."""

    arrays: dict[str, Tensor]
    bitmaps: Tensor
    losses: dict[str, Sequence[float] | float]
    num_classes: int


def compute(folder: Path, device: torch.device = CPU) -> Computed:
    """Read only the settings, weights, image and ground truth; run the case."""
    config = json.loads((folder / "config.json").read_text())
    model, meta = config["model"], config["meta"]
    inputs = moved(as_tensors(load(folder / "io.npz", INPUTS.__contains__)), device)
    detector, layout = build(model), system_of(model["backbone"]).layout(model["backbone"])
    detector.load_state_dict(to_ours(as_tensors(load(folder / "weights.npz")), layout))
    detector.mean.zero_()  # the image is stored as the backbone's input
    detector.std.fill_(1)
    sizes = torch.tensor([meta["img_shape"][:2]], device=device)
    detector.to(device)
    with torch.no_grad():
        original = tuple(meta["ori_shape"][:2])
        arrays, bitmaps = run_test(detector.eval(), inputs["img"], sizes, original)
        found = {}
        if inputs.keys() >= set(TRUTH):
            boxes, labels, masks = (inputs[name] for name in TRUTH)
            target = Target(boxes, labels, Bitmaps(masks.bool()))
            found = run_losses(detector.train(), inputs["img"], sizes, target)
    return Computed(arrays, bitmaps, found, model["roi_head"]["bbox_head"]["num_classes"])


def run_test(
    detector: Detector, image: Tensor, sizes: Tensor, original: tuple[int, int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute every intermediate result of an image (1, 3, S, S), and detections in pixels of the original (H, W)."""
    heads, rpn = detector.roi_heads, detector.rpn
    features = detector.pyramid(detector.backbone(image))
    found = {f"neck{i}": feature for i, feature in enumerate(features)}
    for i, (logits, deltas) in enumerate(map(rpn.head, features)):
        found |= {f"rpn_cls{i}": logits, f"rpn_reg{i}": deltas}
    proposals = rpn.propose(rpn(features), sizes, rpn.top_test)
    filled = proposals.filled
    scores = proposals.logits[filled].sigmoid()
    found["proposals"] = torch.cat([proposals.boxes[filled], scores[:, None]], dim=1)
    logits, deltas = heads.run_stage(0, features, proposals.boxes, filled)
    found |= {"roi_cls_score": logits[filled], "roi_bbox_pred": deltas[filled].flatten(1)}
    (detections,) = detector(image, None, sizes)
    first, bins = torch.zeros_like(detections.labels), mask_head.BINS
    pooled = pool(features, detections.boxes, first, heads.strides, bins, heads.sampling_ratio)
    found["det_mask_logits"] = heads.mask(pooled, detections.labels)
    height, width = (one / two for one, two in zip(original, sizes[0].tolist(), strict=True))
    # empty boxes are kept, as in mmdet
    boxes = detections.boxes * torch.tensor([width, height, width, height], device=image.device)
    found |= {"det_boxes": boxes, "det_scores": detections.scores, "det_labels": detections.labels}
    return found, paste(detections.masks, boxes, original)


def run_losses(
    detector: Detector, image: Tensor, sizes: Tensor, target: Target
) -> dict[str, Sequence[float] | float]:
    """Return the losses by mmdet's names, those of the RPN per level, and the classification accuracy in percent."""
    heads, rpn = detector.roi_heads, detector.rpn
    features = detector.pyramid(detector.backbone(image))
    found = rpn(features)
    proposals, targets = rpn.propose(found, sizes, rpn.top_train), Targets.of([target])
    assigned = heads.sample(proposals.boxes, proposals.filled, targets)
    logits, _ = heads.run_stage(0, features, assigned.boxes, assigned.filled)
    right = (logits.argmax(dim=2) == heads.labels(assigned, targets))[assigned.filled]
    whole = detector(image, [target], sizes)
    outputs = ([x[0] for x in found.logits], [x[0] for x in found.deltas])
    levels = rpn_losses(rpn, *outputs, found.anchors, target)
    return {
        **levels,
        "loss_cls": float(whole["loss_cls"]),
        "loss_bbox": float(whole["loss_box_reg"]),
        "loss_mask": float(whole["loss_mask"]),
        "acc": 100 * float(right.float().mean()),
        "sum of loss_rpn_cls": float(whole["loss_rpn_cls"]),
        "sum of loss_rpn_bbox": float(whole["loss_rpn_loc"]),
        "total": float(sum(whole.values())),
    }


def rpn_losses(
    rpn: RPN,
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    target: Target,
) -> dict[str, list[float]]:
    """Return each level's part of one image's losses; per level: logits (N,), deltas (N, 4), anchors (N, 4)."""
    (matched,), sampled = rpn.sample(torch.cat(list(anchors)), Targets.of([target]))
    count = int(sampled.filled.sum())
    used = torch.zeros_like(matched, dtype=torch.bool)
    used[sampled.chosen[sampled.filled]] = True
    found: dict[str, list[float]] = {"loss_rpn_cls": [], "loss_rpn_bbox": []}
    sizes = [len(level) for level in anchors]
    parts = zip(logits, deltas, anchors, matched.split(sizes), used.split(sizes), strict=True)
    for level_logits, level_deltas, boxes, truth, chosen in parts:
        foreground = chosen & (truth > BACKGROUND)
        wanted = encode(boxes[foreground], target.boxes[truth[foreground]], WEIGHTS)
        classes = losses.objectness(level_logits[chosen], truth[chosen] > BACKGROUND, count)
        found["loss_rpn_cls"].append(float(classes))
        found["loss_rpn_bbox"].append(float(losses.box_l1(level_deltas[foreground], wanted, count)))
    return found
