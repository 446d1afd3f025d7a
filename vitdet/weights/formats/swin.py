"""Parameter names of Swin-T, as a backbone and in a Mask R-CNN with FPN.

Covers mmdet 2.18, Microsoft's Swin-Transformer-Object-Detection, and Microsoft's ImageNet
classifier (Swin-Transformer). The FPN and the heads have mmdet's names in both detectors.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.mae import HEADS, PARTS, WRAPPERS
from vitdet.weights.formats.mmdet import FPN_DETECTOR
from vitdet.weights.formats.table import Change, Format, Row, rows


def slices_first(tensor: Tensor) -> Tensor:
    """Reorder the input channels of patch merging from (..., C 2 2) to (..., 2 2 C).

    mmdet unfolds a 2 x 2 neighborhood channel by channel, vitdet and Microsoft pixel by pixel in
    column order.
    """
    return rearrange(tensor, "... (c h w) -> ... (w h c)", h=2, w=2)


def channels_first(tensor: Tensor) -> Tensor:
    """Invert `slices_first`."""
    return rearrange(tensor, "... (w h c) -> ... (c h w)", h=2, w=2)


def _swin(stages: str, text: str, prefix: str = "backbone.") -> tuple[Row, ...]:
    """Return the backbone's rows. stages: name of the stages; text: rows that differ by format."""
    # Patch merging ends a stage in both third-party formats; in vitdet, it starts the next stage
    lines = [f"{stages}.{s}.downsample.{{*}} layers.{s + 1}.downsample.{{*}}" for s in range(3)]
    lines += [f"norm{s}.{{}} norms.{s}.{{}}" for s in range(4)]
    lines += ["patch_embed.norm.{} patch_embed.norm.{}"]
    return rows(text, prefix, "backbone.") + rows("\n".join(lines), prefix, "backbone.")


_MMDET = """
    patch_embed.projection.{}               patch_embed.proj.{}
    stages.{}.blocks.{}.norm1.{}            layers.{}.blocks.{}.norm1.{}
    stages.{}.blocks.{}.norm2.{}            layers.{}.blocks.{}.norm2.{}
    stages.{}.blocks.{}.attn.w_msa.{*}      layers.{}.blocks.{}.attn.{*}
    stages.{}.blocks.{}.ffn.layers.0.0.{}   layers.{}.blocks.{}.mlp.fc1.{}
    stages.{}.blocks.{}.ffn.layers.1.{}     layers.{}.blocks.{}.mlp.fc2.{}
"""
_MICROSOFT = """
    patch_embed.proj.{}                     patch_embed.proj.{}
    layers.{}.blocks.{}.{*}                 layers.{}.blocks.{}.{*}
"""

# dropped: buffers that the model computes, and a classifier's norm
SWIN_MMDET = Format(
    rows=(*_swin("stages", _MMDET), *FPN_DETECTOR),
    changes={"backbone.layers.{}.downsample.{*}": Change(slices_first, channels_first)},
    dropped=("backbone.stages.{}.blocks.{}.attn.w_msa.relative_position_index",),
    wrappers=("state_dict",),
)
SWIN = Format(
    rows=(*_swin("layers", _MICROSOFT), *FPN_DETECTOR),
    dropped=("backbone.layers.{}.blocks.{}.attn.relative_position_index",),
    wrappers=("state_dict",),
)
SWIN_CLS = Format(
    rows=_swin("layers", _MICROSOFT, prefix=""),
    dropped=(
        "layers.{}.blocks.{}.attn.relative_position_index",
        "layers.{}.blocks.{}.attn_mask",
        "norm.{}",
    ),
    heads=HEADS,
    wrappers=WRAPPERS,
    parts=PARTS,
    # a detector has a norm for each feature map, a classifier only one before its head
    fresh=("backbone.norms.{}.{}",),
)
