"""Detectron2's names of a ViTDet detector (projects/ViTDet, .pkl): Mask and Cascade R-CNN, COCO
and LVIS.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.table import Change, Format, Row, Weights

_ODDS = "roi_heads.box_predictor.{}fed_loss_cls_weights"


def drop_class_token(pos_embed: Tensor) -> Tensor:
    """Convert (1, 1 + n n, C), class token first, to (1, n, n, C)."""
    side = round(max(pos_embed.shape[1] - 1, 0) ** 0.5) if pos_embed.dim() == 3 else 0
    if side == 0 or side * side + 1 != pos_embed.shape[1]:
        raise ValueError(
            f"position embedding: expected (1, 1 + n * n, C), got {tuple(pos_embed.shape)}"
        )
    return rearrange(pos_embed[:, 1:], "b (h w) c -> b h w c", h=side)


def add_class_token(pos_embed: Tensor) -> Tensor:
    """Convert (1, n, n, C) to (1, 1 + n n, C); the row of the class token is zero (unused)."""
    return torch.cat(
        [torch.zeros_like(pos_embed[:, 0, :1]), rearrange(pos_embed, "b h w c -> b (h w) c")], dim=1
    )


def _repeat_odds(weights: Weights) -> Weights:
    """Copy the class frequencies of the federated loss to each stage of a cascade."""
    first = _ODDS.format("0.")
    copies = (
        {_ODDS.format(f"{stage}."): weights[first] for stage in (1, 2)} if first in weights else {}
    )
    return {**weights, **copies}


def _box_stage(theirs: str, ours: str, given: str) -> tuple[Row, ...]:
    head, predictor = f"roi_heads.box_head.{theirs}", f"roi_heads.box_predictor.{theirs}"
    return (
        *(
            row
            for n in range(1, 5)
            for row in (
                Row(f"{head}conv{n}.norm.{{}}", f"{ours}.convs.{n - 1}.norm.{{}}", given),
                Row(f"{head}conv{n}.weight", f"{ours}.convs.{n - 1}.conv.weight", given),
            )
        ),
        *(Row(f"{head}fc{n}.{{}}", f"{ours}.fcs.{n - 1}.{{}}", given) for n in (1, 2)),
        Row(f"{predictor}cls_score.{{}}", f"{ours}.logits.{{}}", given),
        Row(f"{predictor}bbox_pred.{{}}", f"{ours}.deltas.{{}}", given),
    )


_CASCADE = "roi_heads.stages.1."
_PYRAMID = tuple(
    row
    for level, (plain, convs) in enumerate(
        [((0, 1, 3), (4, 5)), ((0,), (1, 2)), ((), (0, 1)), ((), (1, 2))]
    )
    for row in (
        *(
            Row(
                f"backbone.simfp_{level + 2}.{i}.norm.{{}}", f"pyramid.levels.{level}.{i}.norm.{{}}"
            )
            for i in convs
        ),
        *(
            Row(f"backbone.simfp_{level + 2}.{i}.weight", f"pyramid.levels.{level}.{i}.conv.weight")
            for i in convs
        ),
        *(
            Row(f"backbone.simfp_{level + 2}.{i}.{{}}", f"pyramid.levels.{level}.{i}.{{}}")
            for i in plain
        ),
    )
)

DETECTRON2 = Format(
    rows=(
        Row(
            "backbone.net.blocks.{}.residual.conv{}.weight",
            "backbone.blocks.{}.residual.conv{}.conv.weight",
        ),
        Row(
            "backbone.net.blocks.{}.residual.norm{}.{}",
            "backbone.blocks.{}.residual.conv{}.norm.{}",
        ),
        *(
            Row(f"backbone.net.blocks.{{}}.{part}.{{*}}", f"backbone.blocks.{{}}.{part}.{{*}}")
            for part in ("norm1", "attn", "norm2", "mlp")
        ),
        Row("backbone.net.patch_embed.{*}", "backbone.patch_embed.{*}"),
        Row("backbone.net.pos_embed", "backbone.pos_embed"),
        *_PYRAMID,
        Row("proposal_generator.rpn_head.conv.conv{}.{}", "rpn.convs.{}.conv.{}"),
        Row("proposal_generator.rpn_head.objectness_logits.{}", "rpn.objectness.{}"),
        Row("proposal_generator.rpn_head.anchor_deltas.{}", "rpn.deltas.{}"),
        *(
            row
            for stage in range(3)
            for row in _box_stage(f"{stage}.", f"roi_heads.stages.{stage}", _CASCADE)
        ),
        *_box_stage("", "roi_heads.stages.0", ""),
        Row(_ODDS.format("0."), "roi_heads.classification.class_weights", _CASCADE),
        Row(_ODDS.format(""), "roi_heads.classification.class_weights"),
        *(
            row
            for n in range(1, 5)
            for row in (
                Row(
                    f"roi_heads.mask_head.mask_fcn{n}.norm.{{}}",
                    f"roi_heads.mask.convs.{n - 1}.norm.{{}}",
                ),
                Row(
                    f"roi_heads.mask_head.mask_fcn{n}.weight",
                    f"roi_heads.mask.convs.{n - 1}.conv.weight",
                ),
            )
        ),
        Row("roi_heads.mask_head.deconv.{}", "roi_heads.mask.deconv.{}"),
        Row("roi_heads.mask_head.predictor.{}", "roi_heads.mask.logits.{}"),
    ),
    changes={"backbone.pos_embed": Change(drop_class_token, add_class_token)},
    # Copies of the same buffer per stage; buffers of old files that are computed from the config
    dropped=(
        _ODDS.format("1."),
        _ODDS.format("2."),
        "pixel_mean",
        "pixel_std",
        "proposal_generator.anchor_generator.cell_anchors.{}",
    ),
    after=_repeat_odds,
    wrappers=("model",),
    scaled=False,
)
