"""Names of ViTAE-Transformer/ViTDet, a fork of mmdet 2.18 (.pth): its ViT-B, ViTAE-B and ViTAE-S
Mask R-CNN.

Its relative positions are applied to the scaled query, Detectron2's to the unscaled one: they are
used unchanged only in a model with `scaled_rel_pos`, else rescaled
(`vitdet.weights.resize.rescale_relative_positions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.table import Change, Format, Row, Weights


def to_grid(pos_embed: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Convert (1, h w, C), without a class token, to (1, h, w, C). grid: (h, w); default: h = w."""
    side = round(pos_embed.shape[1] ** 0.5) if pos_embed.dim() == 3 else 0
    height, width = grid or (side, side)
    if pos_embed.dim() != 3 or height * width != pos_embed.shape[1]:
        raise ValueError(
            f"position embedding: expected (1, {'h * w' if grid else 'n * n'}, C) without a class "
            f"token, got {tuple(pos_embed.shape)}"
            f"{f' for a grid of {height} x {width}' if grid else ''}"
        )
    return rearrange(pos_embed, "b (h w) c -> b h w c", h=height)


def to_tokens(pos_embed: Tensor) -> Tensor:
    """Convert (1, h, w, C) to (1, h w, C)."""
    return rearrange(pos_embed, "b h w c -> b (h w) c")


def join_bias(weights: Weights) -> dict[str, Tensor]:
    """Join q_bias and v_bias (C) to qkv.bias (3 C), with zeros for the keys."""
    joined = {}
    for name, tensor in weights.items():
        stem, _, part = name.rpartition(".")
        if part == "q_bias":
            if f"{stem}.v_bias" not in weights:
                raise ValueError(f"{name} without {stem}.v_bias")
            if f"{stem}.qkv.bias" in weights:
                raise ValueError(f"both {name} and {stem}.qkv.bias")
            joined[f"{stem}.qkv.bias"] = torch.cat(
                [tensor, torch.zeros_like(tensor), weights[f"{stem}.v_bias"]]
            )
        elif part == "v_bias" and f"{stem}.q_bias" not in weights:
            raise ValueError(f"{name} without {stem}.q_bias")
        elif part != "v_bias":
            joined[name] = tensor
    return joined


def split_bias(weights: Weights, stems: Sequence[str]) -> dict[str, Tensor]:
    """Inverse of `join_bias` for the given blocks. The keys' part is dropped: it shifts all logits
    of a query equally, which does not change the softmax."""
    split = dict(weights)
    for stem in stems:
        split[f"{stem}.attn.q_bias"], _, split[f"{stem}.attn.v_bias"] = split.pop(
            f"{stem}.attn.qkv.bias"
        ).chunk(3)
    return split


# ViTAE-S, whose blocks are the last stage's cells
_REDUCTIONS = "backbone.reductions."
_BACKBONE = (
    Row("backbone.layers.{}.RC.PRM.convs.{}.0.{}", "backbone.reductions.{}.prm.{}.{}"),
    Row("backbone.layers.{}.RC.PCM.{*}", "backbone.reductions.{}.pcm.{*}"),
    Row("backbone.layers.{}.RC.attn.{*}", "backbone.reductions.{}.attn.{*}"),
    Row("backbone.layers.2.NC.{}.PCM.{*}", "backbone.blocks.{}.pcm.{*}", _REDUCTIONS),
    Row("backbone.layers.2.NC.{}.{*}", "backbone.blocks.{}.{*}", _REDUCTIONS),
    Row("backbone.blocks.{}.PCM.{*}", "backbone.blocks.{}.pcm.{*}"),
    Row("backbone.blocks.{}.{*}", "backbone.blocks.{}.{*}"),
    Row("backbone.patch_embed.{*}", "backbone.patch_embed.{*}"),
    Row("backbone.pos_embed", "backbone.pos_embed"),
    Row("backbone.norm.{}", "backbone.norm.{}"),
)
_PYRAMID = (
    Row("backbone.fpn1.0.{}", "pyramid.levels.0.0.{}"),
    Row("backbone.fpn1.1.ln.{}", "pyramid.levels.0.1.{}"),
    Row("backbone.fpn1.3.{}", "pyramid.levels.0.3.{}"),
    Row("backbone.fpn2.0.{}", "pyramid.levels.1.0.{}"),
    *(
        row
        for level, first in enumerate((4, 1, 0, 1))
        for theirs, ours in (
            (f"neck.lateral_convs.{level}", f"pyramid.levels.{level}.{first}"),
            (f"neck.fpn_convs.{level}", f"pyramid.levels.{level}.{first + 1}"),
        )
        for row in (
            Row(f"{theirs}.conv.{{}}", f"{ours}.conv.{{}}"),
            Row(f"{theirs}.ln.{{}}", f"{ours}.norm.{{}}"),
        )
    ),
)
# Without biases
_NORMED_RPN = (
    Row("rpn_head.rpn_conv.{}.conv.weight", "rpn.convs.{}.conv.weight"),
    Row("rpn_head.rpn_conv.{}.ln.{}", "rpn.convs.{}.norm.{}"),
)
HEADS = (
    Row("rpn_head.rpn_cls.{}", "rpn.objectness.{}"),
    Row("rpn_head.rpn_reg.{}", "rpn.deltas.{}"),
    Row("roi_head.bbox_head.shared_convs.{}.conv.{}", "roi_heads.stages.0.convs.{}.conv.{}"),
    Row("roi_head.bbox_head.shared_convs.{}.ln.{}", "roi_heads.stages.0.convs.{}.norm.{}"),
    Row("roi_head.bbox_head.shared_fcs.{}.{}", "roi_heads.stages.0.fcs.{}.{}"),
    Row("roi_head.bbox_head.fc_cls.{}", "roi_heads.stages.0.logits.{}"),
    Row("roi_head.bbox_head.fc_reg.{}", "roi_heads.stages.0.deltas.{}"),
    Row("roi_head.mask_head.convs.{}.conv.{}", "roi_heads.mask.convs.{}.conv.{}"),
    Row("roi_head.mask_head.convs.{}.ln.{}", "roi_heads.mask.convs.{}.norm.{}"),
    Row("roi_head.mask_head.upsample.{}", "roi_heads.mask.deconv.{}"),
    Row("roi_head.mask_head.conv_logits.{}", "roi_heads.mask.logits.{}"),
)
# The neck and heads of the hierarchical detectors
FPN_DETECTOR = (
    Row("neck.lateral_convs.{}.conv.{}", "pyramid.lateral.{}.{}"),
    Row("neck.fpn_convs.{}.conv.{}", "pyramid.output.{}.{}"),
    Row("rpn_head.rpn_conv.{}", "rpn.convs.0.conv.{}"),
    *HEADS,
)


def mmdet_format(
    grid: tuple[int, int] | None = None, wide: Sequence[int] = (), split: Sequence[int] = ()
) -> Format:
    """Create the format.

    Args:
        grid: (h, w) tokens of a model for non-square images.
        wide: its global blocks. The original sizes both position tables of these by the height, so
            that the tail of rel_pos_w is unused if w < h; it is cut off.
        split: blocks in which q_bias and v_bias are separate (ViTAE-B's global ones), for the
            conversion back.
    """
    height, width = grid or (0, 0)

    def cut(table: Tensor) -> Tensor:
        if len(table) != 2 * height - 1:
            raise ValueError(
                f"rel_pos_w of a global block: expected {2 * height - 1} rows, got {len(table)}"
            )
        return table[: 2 * width - 1]

    def fill_up(table: Tensor) -> Tensor:
        return torch.cat([table, table.new_zeros(2 * height - 1 - len(table), table.shape[1])])

    cuts = {
        f"backbone.blocks.{i}.attn.rel_pos_w": Change(cut, fill_up) for i in wide if height != width
    }
    return Format(
        rows=(*_BACKBONE, *_PYRAMID, *_NORMED_RPN, *HEADS),
        changes={"backbone.pos_embed": Change(partial(to_grid, grid=grid), to_tokens), **cuts},
        before=join_bias,
        after=partial(split_bias, stems=[f"backbone.blocks.{i}" for i in split]),
        wrappers=("state_dict",),
        scaled=True,
    )


MMDET = mmdet_format()
