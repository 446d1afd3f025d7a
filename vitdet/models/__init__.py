"""`build_detector`: the only place where settings become constructor arguments."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from vitdet.config import BackboneConfig, EvalConfig, ModelConfig
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

# model.low_quality -> how ground truths are assigned to boxes in the RPN and in the RoI heads
MATCHES = {"own": (match_keeping_own, match), "best": (match_keeping_best, match_keeping_best)}


def build_backbone(settings: ModelConfig) -> Plain | Hierarchical:
    """Build the backbone. Raises ValueError for settings that it does not support."""
    backbone = settings.backbone
    if backbone.name in swin.SIZES | vitaev2.SIZES:
        return _hierarchical(backbone)
    size = (vit.SIZES | vitae.SIZES | vitae.SMALL_SIZES)[backbone.name]
    plain = {
        **size._asdict(),
        "global_blocks": size.global_blocks if backbone.global_attention else (),
        "window_size": backbone.window_size,
        "drop_path": backbone.drop_path,
        "rel_pos_size": backbone.rel_pos_size,
        "residual_blocks": backbone.residual_blocks,
        "scaled_rel_pos": backbone.scaled_rel_pos,
        "final_norm": backbone.final_norm,
    }
    if backbone.name in vitae.SMALL_SIZES:
        if backbone.patch_size != 16:
            raise ValueError(
                f"model.backbone.patch_size must be 16 with {backbone.name}, whose cells reduce "
                f"4 * 2 * 2 times, got {backbone.patch_size}"
            )
        return ViTAESmall(**plain)
    branch = None
    if backbone.name in vitae.SIZES:
        branch = partial(wide_branch, size.dim, int(size.mlp_ratio * size.dim))
    return ViT(
        **plain,
        patch_size=backbone.patch_size,
        pos_embed_grid=backbone.pos_embed_grid,
        branch=branch,
    )


def _hierarchical(backbone: BackboneConfig) -> Hierarchical:
    for name in ("residual_blocks", "scaled_rel_pos", "final_norm"):
        if getattr(backbone, name):
            raise ValueError(
                f"model.backbone.{name} applies to plain backbones only, not to {backbone.name}"
            )
    if backbone.name in swin.SIZES:
        return Swin(
            **swin.SIZES[backbone.name]._asdict(),
            window_size=backbone.window_size,
            drop_path=backbone.drop_path,
        )
    return ViTAEv2(
        **vitaev2.SIZES[backbone.name]._asdict(),
        window_size=backbone.window_size,
        drop_path=backbone.drop_path,
    )


def build_pyramid(
    settings: ModelConfig, backbone: Plain | Hierarchical
) -> SimpleFeaturePyramid | FPN:
    """Build the pyramid for the backbone. Raises ValueError if it is of the other kind."""
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
        scales=pyramid.scales,
        halve_channels=pyramid.halve_channels,
        eps=settings.norm_eps,
    )


def build_detector(
    model: ModelConfig, evaluate: EvalConfig | None = None, class_weights: Tensor | None = None
) -> Detector:
    """Build a detector with newly initialized weights.

    class_weights (K,): weights for sampling classes in the federated loss; default: uniform.
    """
    backbone = build_backbone(model)
    pyramid = build_pyramid(model, backbone)
    return Detector(
        backbone=backbone,
        pyramid=pyramid,
        rpn=_rpn(model, pyramid),
        roi_heads=_roi_heads(model, evaluate or EvalConfig(), class_weights, pyramid),
    )


def _rpn(model: ModelConfig, pyramid: SimpleFeaturePyramid | FPN) -> RPN:
    rpn = model.rpn
    return RPN(
        channels=pyramid.out_channels,
        strides=pyramid.strides,
        anchor_scale=rpn.anchor_scale,
        aspect_ratios=rpn.aspect_ratios,
        num_convs=rpn.num_convs,
        norm=rpn.norm,
        eps=model.norm_eps,
        samples=rpn.samples,
        positive_fraction=rpn.positive_fraction,
        iou_low=rpn.iou_low,
        iou_high=rpn.iou_high,
        nms_iou=rpn.nms_iou,
        pre_nms_train=rpn.pre_nms_train,
        pre_nms_test=rpn.pre_nms_test,
        post_nms_train=rpn.post_nms_train,
        post_nms_test=rpn.post_nms_test,
        divide_by_sampled=rpn.divide_by_sampled,
        min_log_scale=_min_log_scale(model),
        match=MATCHES[model.low_quality][0],
    )


def _roi_heads(
    model: ModelConfig,
    evaluate: EvalConfig,
    class_weights: Tensor | None,
    pyramid: SimpleFeaturePyramid | FPN,
) -> RoIHeads:
    roi, channels, eps = model.roi_heads, pyramid.out_channels, model.norm_eps
    stages = [
        BoxHead(
            channels=channels,
            num_convs=roi.num_convs,
            num_fcs=roi.num_fcs,
            fc_dim=roi.fc_dim,
            num_classes=roi.num_classes,
            class_agnostic=len(roi.ious) > 1,
            norm=roi.norm,
            eps=eps,
        )
        for _ in roi.ious
    ]
    classification: Classification
    if roi.loss == "federated":
        odds = torch.ones(roi.num_classes) if class_weights is None else class_weights
        classification = FederatedClassification(class_weights=odds, num=roi.federated_classes)
    else:
        classification = SoftmaxClassification(num_classes=roi.num_classes)
    return RoIHeads(
        stages=stages,
        mask=_mask_head(model, channels) if model.mask.enabled else None,
        classification=classification,
        strides=pyramid.strides[:4],
        ious=roi.ious,
        samples=roi.samples,
        positive_fraction=roi.positive_fraction,
        mask_samples=model.mask.samples,
        sampling_ratio=roi.sampling_ratio,
        score_threshold=evaluate.score_threshold,
        nms_iou=evaluate.nms_iou,
        max_detections=evaluate.max_detections,
        min_log_scale=_min_log_scale(model),
        match=MATCHES[model.low_quality][1],
    )


def _mask_head(model: ModelConfig, channels: int) -> MaskHead:
    return MaskHead(
        channels=channels,
        num_convs=model.mask.num_convs,
        num_classes=model.roi_heads.num_classes,
        norm=model.mask.norm,
        eps=model.norm_eps,
    )


def _min_log_scale(model: ModelConfig) -> float:
    return -MAX_LOG_SCALE if model.clamp_shrinking else -math.inf
