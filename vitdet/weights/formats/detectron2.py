"""Detectron2's parameter names of ViTDet detectors for COCO and LVIS (projects/ViTDet, .pkl)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.table import Change, Format, Row, Weights, rows

_CLASS_WEIGHTS = "roi_heads.box_predictor.{}fed_loss_cls_weights"
_CASCADE = "roi_heads.stages.1."
_FROM_ONE = [(n, n - 1) for n in range(1, 5)]  # Detectron2 counts convolutions from 1


def drop_class_token(pos_embed: Tensor) -> Tensor:
    """Convert a position embedding (1, 1 + n * n, C), class token first, to (1, n, n, C)."""
    side = round(max(pos_embed.shape[1] - 1, 0) ** 0.5) if pos_embed.dim() == 3 else 0
    if side == 0 or side * side + 1 != pos_embed.shape[1]:
        shape = tuple(pos_embed.shape)
        raise ValueError(f"position embedding: expected (1, 1 + n * n, C), got {shape}")
    return rearrange(pos_embed[:, 1:], "b (h w) c -> b h w c", h=side)


def add_class_token(pos_embed: Tensor) -> Tensor:
    """Convert a position embedding (1, n, n, C) to (1, 1 + n * n, C), zero for the class token."""
    tokens = rearrange(pos_embed, "b h w c -> b (h w) c")
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)


def _repeat_class_weights(weights: Weights) -> Weights:
    """Copy the federated loss's class weights from the first to the other stages of a cascade."""
    first = _CLASS_WEIGHTS.format("0.")
    stages = (1, 2) if first in weights else ()
    return {**weights, **{_CLASS_WEIGHTS.format(f"{stage}."): weights[first] for stage in stages}}


def _convs(
    theirs: str, ours: str, numbers: Iterable[tuple[int, int]], given: str = ""
) -> list[Row]:
    """Return the rows of convolutions with norms. numbers: index pairs (Detectron2's, vitdet's)."""
    return [
        Row(f"{theirs}{there}.{left}", f"{ours}{here}.{right}", given)
        for there, here in numbers
        for left, right in (("norm.{}", "norm.{}"), ("weight", "conv.weight"))
    ]


def _box_stage(theirs: str, ours: str, given: str = "") -> list[Row]:
    text = f"""
        box_head.{theirs}fc1.{{}}                   fcs.0.{{}}
        box_head.{theirs}fc2.{{}}                   fcs.1.{{}}
        box_predictor.{theirs}cls_score.{{}}        logits.{{}}
        box_predictor.{theirs}bbox_pred.{{}}        deltas.{{}}
    """
    convs = _convs(f"roi_heads.box_head.{theirs}conv", f"{ours}.convs.", _FROM_ONE, given)
    return [*convs, *rows(text, "roi_heads.", f"{ours}.", given)]


def _level(level: int, convs: tuple[int, ...], plain: tuple[int, ...]) -> list[Row]:
    """Return a level's rows. convs: indices of convolutions with norms; plain: other indices."""
    theirs, ours = f"backbone.simfp_{level + 2}.", f"pyramid.levels.{level}."
    others = [Row(f"{theirs}{i}.{{}}", f"{ours}{i}.{{}}") for i in plain]
    return _convs(theirs, ours, zip(convs, convs, strict=True)) + others


_BACKBONE = rows(
    """
    blocks.{}.residual.conv{}.weight    blocks.{}.residual.conv{}.conv.weight
    blocks.{}.residual.norm{}.{}        blocks.{}.residual.conv{}.norm.{}
    blocks.{}.norm1.{*}                 blocks.{}.norm1.{*}
    blocks.{}.attn.{*}                  blocks.{}.attn.{*}
    blocks.{}.norm2.{*}                 blocks.{}.norm2.{*}
    blocks.{}.mlp.{*}                   blocks.{}.mlp.{*}
    patch_embed.{*}                     patch_embed.{*}
    pos_embed                           pos_embed
    """,
    "backbone.net.",
    "backbone.",
)
_OTHERS = rows("""
    proposal_generator.rpn_head.conv.conv{}.{}          rpn.convs.{}.conv.{}
    proposal_generator.rpn_head.objectness_logits.{}    rpn.objectness.{}
    proposal_generator.rpn_head.anchor_deltas.{}        rpn.deltas.{}
    roi_heads.mask_head.deconv.{}                       roi_heads.mask.deconv.{}
    roi_heads.mask_head.predictor.{}                    roi_heads.mask.logits.{}
""")

DETECTRON2 = Format(
    rows=(
        *_BACKBONE,
        *_level(0, convs=(4, 5), plain=(0, 1, 3)),
        *_level(1, convs=(1, 2), plain=(0,)),
        *_level(2, convs=(0, 1), plain=()),
        *_level(3, convs=(1, 2), plain=()),
        *_box_stage("0.", "roi_heads.stages.0", _CASCADE),
        *_box_stage("1.", "roi_heads.stages.1", _CASCADE),
        *_box_stage("2.", "roi_heads.stages.2", _CASCADE),
        *_box_stage("", "roi_heads.stages.0"),
        Row(_CLASS_WEIGHTS.format("0."), "roi_heads.classification.class_weights", _CASCADE),
        Row(_CLASS_WEIGHTS.format(""), "roi_heads.classification.class_weights"),
        *_convs("roi_heads.mask_head.mask_fcn", "roi_heads.mask.convs.", _FROM_ONE),
        *_OTHERS,
    ),
    changes={"backbone.pos_embed": Change(drop_class_token, add_class_token)},
    # copies of the class weights in later stages, and buffers that the config determines
    dropped=(
        _CLASS_WEIGHTS.format("1."),
        _CLASS_WEIGHTS.format("2."),
        "pixel_mean",
        "pixel_std",
        "proposal_generator.anchor_generator.cell_anchors.{}",
    ),
    after=_repeat_class_weights,
    wrappers=("model",),
    scaled=False,
)
