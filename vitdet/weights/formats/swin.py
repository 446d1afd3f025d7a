"""Names of Swin-T, as a backbone and in a Mask R-CNN with FPN.

As mmdet 2.18 has it; as Microsoft has it (Swin-Transformer-Object-Detection), and its ImageNet classifier
(Swin-Transformer). The FPN and the heads have mmdet's names in both detectors.
"""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.classifier import HEADS, PARTS, WRAPPERS
from vitdet.weights.formats.mmdet import FPN_DETECTOR
from vitdet.weights.formats.table import Change, Format, Row, without_prefix


def slices_first(tensor: Tensor) -> Tensor:
    """A halving's weights (..., C 2 2) -> (..., 2 2 C): mmdet unfolds a 2 x 2 neighbourhood channel by channel, ours
    (and Microsoft's) takes its pixels one after the other, columns first.
    """
    return rearrange(tensor, "... (c h w) -> ... (w h c)", h=2, w=2)


def channels_first(tensor: Tensor) -> Tensor:
    """The inverse of `slices_first`."""
    return rearrange(tensor, "... (w h c) -> ... (c h w)", h=2, w=2)


def _swin(stages: str, patches: str, inside: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of the backbone: the names of its stages, of its patches' convolution and of a block's parts."""
    return (
        Row(f"backbone.patch_embed.{patches}.{{}}", "backbone.patch_embed.proj.{}"),
        Row("backbone.patch_embed.norm.{}", "backbone.patch_embed.norm.{}"),
        # Their stages end with the halving with which the next of ours begins.
        *(
            Row(
                f"backbone.{stages}.{s}.downsample.{{*}}",
                f"backbone.layers.{s + 1}.downsample.{{*}}",
            )
            for s in range(3)
        ),
        *(
            Row(
                f"backbone.{stages}.{{}}.blocks.{{}}.{theirs}",
                f"backbone.layers.{{}}.blocks.{{}}.{ours}",
            )
            for theirs, ours in inside.items()
        ),
        *(Row(f"backbone.norm{s}.{{}}", f"backbone.norms.{s}.{{}}") for s in range(4)),
    )


_MMDET_BLOCK = {
    "norm1.{}": "norm1.{}",
    "norm2.{}": "norm2.{}",
    "attn.w_msa.{*}": "attn.{*}",
    "ffn.layers.0.0.{}": "mlp.fc1.{}",
    "ffn.layers.1.{}": "mlp.fc2.{}",
}
_MICROSOFT = _swin("layers", "proj", {"{*}": "{*}"})

# Dropped besides the classifiers: what is made from the size of a window.
SWIN_MMDET = Format(
    rows=(*_swin("stages", "projection", _MMDET_BLOCK), *FPN_DETECTOR),
    changes={"backbone.layers.{}.downsample.{*}": Change(slices_first, channels_first)},
    dropped=("backbone.stages.{}.blocks.{}.attn.w_msa.relative_position_index",),
    wrappers=("state_dict",),
)
SWIN = Format(
    rows=(*_MICROSOFT, *FPN_DETECTOR),
    dropped=("backbone.layers.{}.blocks.{}.attn.relative_position_index",),
    wrappers=("state_dict",),
)
SWIN_CLS = Format(
    rows=without_prefix(_MICROSOFT),
    dropped=(
        "layers.{}.blocks.{}.attn.relative_position_index",
        "layers.{}.blocks.{}.attn_mask",
        "norm.{}",
    ),
    heads=HEADS,
    wrappers=WRAPPERS,
    parts=PARTS,
    # a classifier has one norm, behind its last map, and of another use
    fresh=("backbone.norms.{}.{}",),
)
