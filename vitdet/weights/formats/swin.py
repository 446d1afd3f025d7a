"""Names of Swin-T, as a backbone and in a Mask R-CNN with FPN.

Of mmdet 2.18; of Microsoft's Swin-Transformer-Object-Detection; and of its ImageNet classifier
(Swin-Transformer). The FPN and the heads have mmdet's names in both detectors.
"""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from vitdet.weights.formats.mae import HEADS, PARTS, WRAPPERS
from vitdet.weights.formats.mmdet import FPN_DETECTOR
from vitdet.weights.formats.table import Change, Format, Row, without_prefix


def slices_first(tensor: Tensor) -> Tensor:
    """Reorder the input of patch merging, (..., C 2 2) to (..., 2 2 C).

    mmdet unfolds a 2 x 2 neighbourhood channel by channel; vitdet and Microsoft pixel by pixel,
    columns first.
    """
    return rearrange(tensor, "... (c h w) -> ... (w h c)", h=2, w=2)


def channels_first(tensor: Tensor) -> Tensor:
    """Inverse of `slices_first`."""
    return rearrange(tensor, "... (w h c) -> ... (c h w)", h=2, w=2)


def _swin(stages: str, patches: str, inside: Mapping[str, str]) -> tuple[Row, ...]:
    """Return the rows of the backbone, given the names of stages, patch embedding and block
    parts.
    """
    return (
        Row(f"backbone.patch_embed.{patches}.{{}}", "backbone.patch_embed.proj.{}"),
        Row("backbone.patch_embed.norm.{}", "backbone.patch_embed.norm.{}"),
        # Patch merging is at the end of a stage there, at the start of the next one here
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

# Dropped: buffers that are computed from the window size
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
    # a classifier has one norm, after its last map, with another purpose
    fresh=("backbone.norms.{}.{}",),
)
