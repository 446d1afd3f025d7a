"""Names of foreign checkpoints and ours: one table per format, read in both directions.

A row is (their name, our name); `{}` stands for any piece between dots and `{*}` for any rest, filled in from left to
right. Weights whose layout differs have a pair of functions beside the table. A name that no row knows is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from einops import rearrange
from torch import Tensor


class Format(NamedTuple):
    """A foreign layout: names, and per (our) name how a tensor is turned into ours."""

    rows: tuple[tuple[str, str], ...]
    tensors: Mapping[str, Callable[[Tensor], Tensor]]
    dropped: tuple[str, ...] = ()  # their names that have no place in our models


def drop_class_token(pos_embed: Tensor) -> Tensor:
    """(1, 1 + n n, C), class token first -> (1, n, n, C)."""
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if side * side + 1 != pos_embed.shape[1]:
        raise ValueError(f"position embedding: expected (1, 1 + n * n, C), got {tuple(pos_embed.shape)}")
    return rearrange(pos_embed[:, 1:], "b (h w) c -> b h w c", h=side)


def _box_stage(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    convs = tuple(
        row for n in range(1, 5)
        for row in (
            (f"roi_heads.box_head.{theirs}conv{n}.norm.{{}}", f"{ours}.convs.{n - 1}.norm.{{}}"),
            (f"roi_heads.box_head.{theirs}conv{n}.{{}}", f"{ours}.convs.{n - 1}.conv.{{}}"),
        )
    )
    return (
        *convs,
        *((f"roi_heads.box_head.{theirs}fc{n}.{{}}", f"{ours}.fcs.{n - 1}.{{}}") for n in range(1, 3)),
        (f"roi_heads.box_predictor.{theirs}cls_score.{{}}", f"{ours}.logits.{{}}"),
        (f"roi_heads.box_predictor.{theirs}bbox_pred.{{}}", f"{ours}.deltas.{{}}"),
    )


_PYRAMID = tuple(
    row
    for level, (plain, convs) in enumerate([((0, 1, 3), (4, 5)), ((0,), (1, 2)), ((), (0, 1)), ((), (1, 2))])
    for row in (
        *((f"backbone.simfp_{level + 2}.{i}.norm.{{}}", f"pyramid.levels.{level}.{i}.norm.{{}}") for i in convs),
        *((f"backbone.simfp_{level + 2}.{i}.weight", f"pyramid.levels.{level}.{i}.conv.weight") for i in convs),
        *((f"backbone.simfp_{level + 2}.{i}.{{}}", f"pyramid.levels.{level}.{i}.{{}}") for i in plain),
    )
)

DETECTRON2 = Format(
    rows=(
        ("backbone.net.blocks.{}.residual.conv{}.weight", "backbone.blocks.{}.residual.conv{}.conv.weight"),
        ("backbone.net.blocks.{}.residual.norm{}.{}", "backbone.blocks.{}.residual.conv{}.norm.{}"),
        ("backbone.net.{*}", "backbone.{*}"),
        *_PYRAMID,
        ("proposal_generator.rpn_head.conv.conv{}.{}", "rpn.convs.{}.conv.{}"),
        ("proposal_generator.rpn_head.objectness_logits.{}", "rpn.objectness.{}"),
        ("proposal_generator.rpn_head.anchor_deltas.{}", "rpn.deltas.{}"),
        *_box_stage("", "roi_heads.stages.0"),
        *(row for stage in range(3) for row in _box_stage(f"{stage}.", f"roi_heads.stages.{stage}")),
        ("roi_heads.box_predictor.fed_loss_cls_weights", "roi_heads.classification.class_weights"),
        ("roi_heads.box_predictor.0.fed_loss_cls_weights", "roi_heads.classification.class_weights"),
        *(
            row for n in range(1, 5)
            for row in (
                (f"roi_heads.mask_head.mask_fcn{n}.norm.{{}}", f"roi_heads.mask.convs.{n - 1}.norm.{{}}"),
                (f"roi_heads.mask_head.mask_fcn{n}.{{}}", f"roi_heads.mask.convs.{n - 1}.conv.{{}}"),
            )
        ),
        ("roi_heads.mask_head.deconv.{}", "roi_heads.mask.deconv.{}"),
        ("roi_heads.mask_head.predictor.{}", "roi_heads.mask.logits.{}"),
    ),
    tensors={"backbone.pos_embed": drop_class_token},
    # The same buffer once a stage; and buffers of old files that are made from the config.
    dropped=(
        "roi_heads.box_predictor.1.fed_loss_cls_weights", "roi_heads.box_predictor.2.fed_loss_cls_weights",
        "pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.{}",
    ),
)


def to_ours(weights: Mapping[str, Tensor], layout: Format) -> dict[str, Tensor]:
    """Their state dict under our names. Raises ValueError naming what no row of the table knows."""
    ours, unknown = {}, []
    for name, tensor in weights.items():
        if any(_pattern(row).fullmatch(name) for row in layout.dropped):
            continue
        renamed = rename(name, layout)
        if renamed is None:
            unknown.append(name)
        else:
            ours[renamed] = layout.tensors[renamed](tensor) if renamed in layout.tensors else tensor
    if unknown:
        raise ValueError(f"{len(unknown)} tensors that this format does not know, such as {', '.join(unknown[:3])}")
    return ours


def rename(name: str, layout: Format) -> str | None:
    """Our name of their tensor, or None if the table has no row for it."""
    for theirs, ours in layout.rows:
        found = _pattern(theirs).fullmatch(name)
        if found:
            pieces = iter(found.groups())
            return re.sub(r"\{\*?\}", lambda _: next(pieces), ours)  # noqa: B023 - called at once
    return None


def _pattern(row: str) -> re.Pattern[str]:
    return re.compile(re.escape(row).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)"))
