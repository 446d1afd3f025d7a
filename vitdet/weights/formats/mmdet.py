"""Parameter names of ViTAE-Transformer/ViTDet (fork of mmdet 2.18, .pth): ViT-B, ViTAE-B, ViTAE-S.

Relative positions apply to the scaled query, in contrast to Detectron2. For a model without
`scaled_rel_pos`, the positions are rescaled (`vitdet.weights.resize.rescale_relative_positions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.table import Change, Format, Weights, rows


def to_grid(pos_embed: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Convert a position embedding (1, h * w, C) to (1, h, w, C). grid: (h, w); None: h = w."""
    side = round(pos_embed.shape[1] ** 0.5) if pos_embed.dim() == 3 else 0
    height, width = grid or (side, side)
    if pos_embed.dim() != 3 or height * width != pos_embed.shape[1]:
        expected = f"expected (1, {'h * w' if grid else 'n * n'}, C) without a class token"
        place = f" for a grid of {height} x {width}" if grid else ""
        shape = tuple(pos_embed.shape)
        raise ValueError(f"position embedding: {expected}, got {shape}{place}")
    return rearrange(pos_embed, "b (h w) c -> b h w c", h=height)


def to_tokens(pos_embed: Tensor) -> Tensor:
    """Convert a position embedding (1, h, w, C) to (1, h * w, C)."""
    return rearrange(pos_embed, "b h w c -> b (h w) c")


def join_bias(weights: Weights) -> dict[str, Tensor]:
    """Concatenate q_bias (C), zeros for the keys, and v_bias (C) to qkv.bias (3 C)."""
    joined = {}
    for name, tensor in weights.items():
        stem, _, part = name.rpartition(".")
        query, value, whole = (f"{stem}.{key}" for key in ("q_bias", "v_bias", "qkv.bias"))
        if part not in ("q_bias", "v_bias"):
            joined[name] = tensor
            continue
        for other in (query, value):
            if other not in weights:
                raise ValueError(f"contains {name}, but not {other}")
        if whole in weights:
            raise ValueError(f"contains both {name} and {whole}")
        if part == "q_bias":
            joined[whole] = torch.cat([tensor, torch.zeros_like(tensor), weights[value]])
    return joined


def split_bias(weights: Weights, stems: Sequence[str]) -> dict[str, Tensor]:
    """Invert `join_bias` for the blocks named `stems`.

    The bias of the keys is dropped, as it shifts all logits of a query equally before the softmax.
    """
    split = dict(weights)
    for stem in stems:
        query, _, value = split.pop(f"{stem}.attn.qkv.bias").chunk(3)
        split[f"{stem}.attn.q_bias"], split[f"{stem}.attn.v_bias"] = query, value
    return split


# The blocks of ViTAE-S are the normal cells (NC) of the last stage
_CELLS = """
    backbone.layers.2.NC.{}.PCM.{*}             backbone.blocks.{}.pcm.{*}
    backbone.layers.2.NC.{}.{*}                 backbone.blocks.{}.{*}
"""
_BACKBONE = rows(_CELLS, given="backbone.reductions.") + rows("""
    backbone.layers.{}.RC.PRM.convs.{}.0.{}     backbone.reductions.{}.prm.{}.{}
    backbone.layers.{}.RC.PCM.{*}               backbone.reductions.{}.pcm.{*}
    backbone.layers.{}.RC.attn.{*}              backbone.reductions.{}.attn.{*}
    backbone.blocks.{}.PCM.{*}                  backbone.blocks.{}.pcm.{*}
    backbone.blocks.{}.{*}                      backbone.blocks.{}.{*}
    backbone.patch_embed.{*}                    backbone.patch_embed.{*}
    backbone.pos_embed                          backbone.pos_embed
    backbone.norm.{}                            backbone.norm.{}
""")
_PYRAMID = rows("""
    backbone.fpn1.0.{}                  pyramid.levels.0.0.{}
    backbone.fpn1.1.ln.{}               pyramid.levels.0.1.{}
    backbone.fpn1.3.{}                  pyramid.levels.0.3.{}
    backbone.fpn2.0.{}                  pyramid.levels.1.0.{}
    neck.lateral_convs.0.conv.{}        pyramid.levels.0.4.conv.{}
    neck.lateral_convs.0.ln.{}          pyramid.levels.0.4.norm.{}
    neck.lateral_convs.1.conv.{}        pyramid.levels.1.1.conv.{}
    neck.lateral_convs.1.ln.{}          pyramid.levels.1.1.norm.{}
    neck.lateral_convs.2.conv.{}        pyramid.levels.2.0.conv.{}
    neck.lateral_convs.2.ln.{}          pyramid.levels.2.0.norm.{}
    neck.lateral_convs.3.conv.{}        pyramid.levels.3.1.conv.{}
    neck.lateral_convs.3.ln.{}          pyramid.levels.3.1.norm.{}
    neck.fpn_convs.0.conv.{}            pyramid.levels.0.5.conv.{}
    neck.fpn_convs.0.ln.{}              pyramid.levels.0.5.norm.{}
    neck.fpn_convs.1.conv.{}            pyramid.levels.1.2.conv.{}
    neck.fpn_convs.1.ln.{}              pyramid.levels.1.2.norm.{}
    neck.fpn_convs.2.conv.{}            pyramid.levels.2.1.conv.{}
    neck.fpn_convs.2.ln.{}              pyramid.levels.2.1.norm.{}
    neck.fpn_convs.3.conv.{}            pyramid.levels.3.2.conv.{}
    neck.fpn_convs.3.ln.{}              pyramid.levels.3.2.norm.{}
""")
# RPN convolutions with a norm, and therefore without biases
_NORMED_RPN = rows("""
    rpn_head.rpn_conv.{}.conv.weight    rpn.convs.{}.conv.weight
    rpn_head.rpn_conv.{}.ln.{}          rpn.convs.{}.norm.{}
""")
HEADS = rows("""
    rpn_head.rpn_cls.{}                             rpn.objectness.{}
    rpn_head.rpn_reg.{}                             rpn.deltas.{}
    roi_head.bbox_head.shared_convs.{}.conv.{}      roi_heads.stages.0.convs.{}.conv.{}
    roi_head.bbox_head.shared_convs.{}.ln.{}        roi_heads.stages.0.convs.{}.norm.{}
    roi_head.bbox_head.shared_fcs.{}.{}             roi_heads.stages.0.fcs.{}.{}
    roi_head.bbox_head.fc_cls.{}                    roi_heads.stages.0.logits.{}
    roi_head.bbox_head.fc_reg.{}                    roi_heads.stages.0.deltas.{}
    roi_head.mask_head.convs.{}.conv.{}             roi_heads.mask.convs.{}.conv.{}
    roi_head.mask_head.convs.{}.ln.{}               roi_heads.mask.convs.{}.norm.{}
    roi_head.mask_head.upsample.{}                  roi_heads.mask.deconv.{}
    roi_head.mask_head.conv_logits.{}               roi_heads.mask.logits.{}
""")
# Neck and heads of detectors with a Swin or ViTAEv2 backbone
FPN_DETECTOR = HEADS + rows("""
    neck.lateral_convs.{}.conv.{}       pyramid.lateral.{}.{}
    neck.fpn_convs.{}.conv.{}           pyramid.output.{}.{}
    rpn_head.rpn_conv.{}                rpn.convs.0.conv.{}
""")


def mmdet_format(
    grid: tuple[int, int] | None = None, wide: Sequence[int] = (), split: Sequence[int] = ()
) -> Format:
    """Return the format of checkpoints of ViTAE-Transformer/ViTDet.

    Args:
        grid: (h, w) token grid of a model for non-square images; None: h = w.
        wide: indices of the model's global blocks. The original implementation sizes both position
            tables of these blocks by h. If w < h, the unused end of rel_pos_w is removed.
        split: indices of the blocks with separate q_bias and v_bias (ViTAE-B's global blocks); used
            only by `to_theirs`.
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
