"""Names of the two hierarchical Mask R-CNNs that the ViTAE papers compare with, and of their pre-training.

SWIN_MMDET: Swin-T as mmdet 2.18 stores it. SWIN: Microsoft's own names (Swin-Transformer, on ImageNet, and
Swin-Transformer-Object-Detection). VITAEV2: ViTAE-Transformer/ViTAE-Transformer (Image-Classification and
Object-Detection). Necks and heads have mmdet's names in all three. Classifiers stand without the prefix `backbone.`.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from vitdet.weights.mmdet import HEADS
from vitdet.weights.table import Change, Format, Row

_DETECTOR = (
    Row("neck.lateral_convs.{}.conv.{}", "pyramid.lateral.{}.{}"),
    Row("neck.fpn_convs.{}.conv.{}", "pyramid.output.{}.{}"),
    Row("rpn_head.rpn_conv.{}", "rpn.convs.0.conv.{}"),
    *HEADS,
)


def slices_first(tensor: Tensor) -> Tensor:
    """Each pixel of a 2 x 2 neighbourhood after the other, columns first, (..., 2 2 C), of mmdet's (..., C 2 2)."""
    return rearrange(tensor, "... (c h w) -> ... (w h c)", h=2, w=2)


def channels_first(tensor: Tensor) -> Tensor:
    """The inverse of `slices_first`."""
    return rearrange(tensor, "... (w h c) -> ... (c h w)", h=2, w=2)


def _swin(prefix: str, stages: str, proj: str, block: dict[str, str]) -> tuple[Row, ...]:
    """A stage ends with the halving of its map there; here the next one begins with it."""
    return (
        Row(f"{prefix}patch_embed.{proj}.{{}}", "backbone.patch_embed.proj.{}"),
        Row(f"{prefix}patch_embed.norm.{{}}", "backbone.patch_embed.norm.{}"),
        *(Row(f"{prefix}{stages}.{s}.downsample.{{*}}", f"backbone.layers.{s + 1}.downsample.{{*}}") for s in range(3)),
        *(Row(f"{prefix}{stages}.{{}}.blocks.{{}}.{theirs}", f"backbone.layers.{{}}.blocks.{{}}.{ours}")
          for theirs, ours in block.items()),
        *(Row(f"{prefix}norm{s}.{{}}", f"backbone.norms.{s}.{{}}") for s in range(4)),
    )


_SWIN_BLOCK = {
    "norm1.{}": "norm1.{}", "norm2.{}": "norm2.{}", "mlp.{*}": "mlp.{*}", "attn.qkv.{}": "attn.qkv.{}",
    "attn.proj.{}": "attn.proj.{}", "attn.relative_position_bias_table": "attn.relative_position_bias_table",
}
_SWIN_MMDET_BLOCK = {
    "norm1.{}": "norm1.{}", "norm2.{}": "norm2.{}", "ffn.layers.0.0.{}": "mlp.fc1.{}", "ffn.layers.1.{}": "mlp.fc2.{}",
    "attn.w_msa.qkv.{}": "attn.qkv.{}", "attn.w_msa.proj.{}": "attn.proj.{}",
    "attn.w_msa.relative_position_bias_table": "attn.relative_position_bias_table",
}

# In both, relative_position_index and attn_mask are made from the window's size.
SWIN_MMDET = Format(
    rows=(*_swin("backbone.", "stages", "projection", _SWIN_MMDET_BLOCK), *_DETECTOR),
    changes={"backbone.layers.{}.downsample.{*}": Change(slices_first, channels_first)},
    dropped=("backbone.stages.{}.blocks.{}.attn.w_msa.relative_position_index",),
)
SWIN = Format(
    rows=(*_swin("backbone.", "layers", "proj", _SWIN_BLOCK), *_swin("", "layers", "proj", _SWIN_BLOCK), *_DETECTOR),
    dropped=(
        "backbone.layers.{}.blocks.{}.attn.relative_position_index",
        "layers.{}.blocks.{}.attn.relative_position_index", "layers.{}.blocks.{}.attn_mask",
        "norm.{}", "head.{}",  # of the classifier
    ),
)


def _vitaev2(prefix: str) -> tuple[Row, ...]:
    reduction, cell = f"{prefix}layers.{{}}.RC", f"{prefix}layers.{{}}.NC.{{}}"
    ours, our_cell = "backbone.stages.{}.reduction", "backbone.stages.{}.cells.{}"
    return (
        Row(f"{reduction}.PRM.convs.{{}}.0.{{}}", f"{ours}.prm.{{}}.{{}}"),
        Row(f"{reduction}.PCM.{{*}}", f"{ours}.pcm.{{*}}"),
        Row(f"{reduction}.attn.{{*}}", f"{ours}.{{*}}"),
        Row(f"{cell}.PCM.{{*}}", f"{our_cell}.pcm.{{*}}"),
        Row(f"{cell}.{{*}}", f"{our_cell}.{{*}}"),
    )


VITAEV2 = Format(
    rows=(*_vitaev2("backbone."), *_vitaev2(""), *_DETECTOR),
    dropped=("head.{}",),  # of the classifier
)
