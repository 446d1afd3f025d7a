"""Construction of a detector from its settings; other modules of this package read no settings."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitdet.config import EvalConfig, ModelConfig
from vitdet.models import vit, vitae
from vitdet.models.assign import match, match_keeping_best, match_keeping_own
from vitdet.models.baselines import swin, vitaev2
from vitdet.models.baselines.fpn import FPN
from vitdet.models.baselines.swin import Swin
from vitdet.models.baselines.vitaev2 import ViTAEv2
from vitdet.models.box_head import BoxHead
from vitdet.models.boxes import MAX_LOG_SCALE
from vitdet.models.detector import Detector, Hierarchical, Plain
from vitdet.models.losses import FederatedClassification, SoftmaxClassification
from vitdet.models.mask_head import MaskHead
from vitdet.models.pyramid import SimpleFeaturePyramid
from vitdet.models.roi_heads import Classification, RoIHeads
from vitdet.models.rpn import RPN
from vitdet.models.vit import ViT
from vitdet.models.vitae import ViTAESmall, wide_branch

# match functions of the RPN and of the RoI heads, for each value of model.low_quality
MATCHES = {"own": (match_keeping_own, match), "best": (match_keeping_best, match_keeping_best)}


def build_backbone(settings: ModelConfig) -> Plain | Hierarchical:
    """Build the backbone. Raises ValueError for settings that the backbone does not support."""
    backbone = settings.backbone
    name = backbone.name
    shared = _select(backbone, "window_size", "drop_path")
    plain_only = _select(backbone, "residual_blocks", "scaled_rel_pos", "final_norm")
    if name in swin.SIZES | vitaev2.SIZES:
        for option, value in plain_only.items():
            if value:
                raise ValueError(
                    f"model.backbone.{option} applies to plain backbones only, not to {name}"
                )
        if name in swin.SIZES:
            return Swin(**swin.SIZES[name]._asdict(), **shared)
        return ViTAEv2(**vitaev2.SIZES[name]._asdict(), **shared)
    size = (vit.SIZES | vitae.SIZES | vitae.SMALL_SIZES)[name]
    plain = {**size._asdict(), **shared, **plain_only, "rel_pos_size": backbone.rel_pos_size}
    if not backbone.global_attention:
        plain["global_blocks"] = ()
    if name in vitae.SMALL_SIZES:
        if backbone.patch_size != 16:
            raise ValueError(
                f"model.backbone.patch_size must be 16 with {name}, which downsamples by "
                f"4 * 2 * 2, got {backbone.patch_size}"
            )
        return ViTAESmall(**plain)
    hidden = int(size.mlp_ratio * size.dim)
    branch = partial(wide_branch, size.dim, hidden) if name in vitae.SIZES else None
    return ViT(**plain, **_select(backbone, "patch_size", "pos_embed_grid"), branch=branch)


def build_pyramid(
    settings: ModelConfig, backbone: Plain | Hierarchical
) -> SimpleFeaturePyramid | FPN:
    """Build the pyramid. Raises ValueError if `pyramid.kind` does not fit the backbone."""
    pyramid = settings.pyramid
    kind = "fpn" if isinstance(backbone, Hierarchical) else "simple"
    if kind != pyramid.kind:
        raise ValueError(
            f"model.pyramid.kind must be {kind} with {settings.backbone.name}, got {pyramid.kind}"
        )
    if isinstance(backbone, Hierarchical):
        return FPN(
            in_channels=backbone.out_channels,
            out_channels=pyramid.channels,
            strides=backbone.strides,
        )
    return SimpleFeaturePyramid(
        in_channels=backbone.out_channels,
        out_channels=pyramid.channels,
        stride=backbone.stride,
        eps=settings.norm_eps,
        **_select(pyramid, "scales", "halve_channels"),
    )


def build_detector(
    model: ModelConfig, evaluate: EvalConfig | None = None, class_weights: Tensor | None = None
) -> Detector:
    """Build a detector with newly initialized weights.

    `class_weights` (K,) are the sampling weights of the K classes in the federated loss; the
    default is uniform.
    """
    backbone = build_backbone(model)
    pyramid = build_pyramid(model, backbone)
    match_anchors, match_boxes = MATCHES[model.low_quality]
    layers: dict[str, Any] = {"channels": pyramid.out_channels, "eps": model.norm_eps}
    min_log_scale = -MAX_LOG_SCALE if model.clamp_shrinking else -math.inf
    return Detector(
        backbone=backbone,
        pyramid=pyramid,
        rpn=RPN(
            strides=pyramid.strides,
            min_log_scale=min_log_scale,
            match=match_anchors,
            **layers,
            **asdict(model.rpn),
        ),
        roi_heads=RoIHeads(
            stages=[_box_head(model, layers) for _ in model.roi_heads.ious],
            mask=_mask_head(model, layers),
            classification=_classification(model, class_weights),
            strides=pyramid.strides[:4],
            mask_samples=model.mask.samples,
            min_log_scale=min_log_scale,
            match=match_boxes,
            **_select(model.roi_heads, "ious", "samples", "positive_fraction", "sampling_ratio"),
            **_select(evaluate or EvalConfig(), "score_threshold", "nms_iou", "max_detections"),
        ),
    )


def _box_head(model: ModelConfig, layers: dict[str, Any]) -> BoxHead:
    roi = model.roi_heads
    sizes = _select(roi, "num_convs", "num_fcs", "fc_dim", "num_classes", "norm")
    return BoxHead(class_agnostic=len(roi.ious) > 1, **sizes, **layers)


def _mask_head(model: ModelConfig, layers: dict[str, Any]) -> MaskHead | None:
    if not model.mask.enabled:
        return None
    sizes = _select(model.mask, "num_convs", "norm")
    return MaskHead(num_classes=model.roi_heads.num_classes, **sizes, **layers)


def _classification(model: ModelConfig, class_weights: Tensor | None) -> Classification:
    roi = model.roi_heads
    if roi.loss == "softmax":
        return SoftmaxClassification(num_classes=roi.num_classes)
    weights = torch.ones(roi.num_classes) if class_weights is None else class_weights
    return FederatedClassification(class_weights=weights, num=roi.federated_classes)


def _select(settings: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}
