"""Names of the two hierarchical Mask R-CNNs that the ViTAE papers compare with, and of their pre-trained backbones.

Swin-T: as mmdet 2.18 has it; as Microsoft has it (Swin-Transformer-Object-Detection), and its ImageNet classifier
(Swin-Transformer). ViTAEv2-S: ViTAE-Transformer/ViTAE-Transformer, Object-Detection and Image-Classification.
Necks and heads have mmdet's names in all detectors.
"""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from vitdet.weights.mmdet import HEADS
from vitdet.weights.pretraining import strip
from vitdet.weights.table import Change, Format, Row

_DETECTOR = (
    Row("neck.lateral_convs.{}.conv.{}", "pyramid.lateral.{}.{}"),
    Row("neck.fpn_convs.{}.conv.{}", "pyramid.output.{}.{}"),
    Row("rpn_head.rpn_conv.{}", "rpn.convs.0.conv.{}"),
    *HEADS,
)
_SAVED = ("state_dict", "")
_CLASSIFIER = ("state_dict_ema", "state_dict", "model", "")


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


def _without_prefix(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(row._replace(theirs=row.theirs.removeprefix("backbone.")) for row in rows)


_MMDET_BLOCK = {
    "norm1.{}": "norm1.{}",
    "norm2.{}": "norm2.{}",
    "attn.w_msa.{*}": "attn.{*}",
    "ffn.layers.0.0.{}": "mlp.fc1.{}",
    "ffn.layers.1.{}": "mlp.fc2.{}",
}
_MICROSOFT = _swin("layers", "proj", {"{*}": "{*}"})
_VITAEV2 = (
    Row("backbone.layers.{}.RC.PRM.convs.{}.0.{}", "backbone.stages.{}.reduction.prm.{}.{}"),
    Row("backbone.layers.{}.RC.PCM.{*}", "backbone.stages.{}.reduction.pcm.{*}"),
    Row("backbone.layers.{}.RC.attn.{*}", "backbone.stages.{}.reduction.{*}"),
    Row("backbone.layers.{}.NC.{}.PCM.{*}", "backbone.stages.{}.cells.{}.pcm.{*}"),
    Row("backbone.layers.{}.NC.{}.{*}", "backbone.stages.{}.cells.{}.{*}"),
)

# Dropped besides the classifiers: what is made from the size of a window.
SWIN_MMDET = Format(
    rows=(*_swin("stages", "projection", _MMDET_BLOCK), *_DETECTOR),
    changes={"backbone.layers.{}.downsample.{*}": Change(slices_first, channels_first)},
    dropped=("backbone.stages.{}.blocks.{}.attn.w_msa.relative_position_index",),
    wrappers=_SAVED,
)
SWIN = Format(
    rows=(*_MICROSOFT, *_DETECTOR),
    dropped=("backbone.layers.{}.blocks.{}.attn.relative_position_index",),
    wrappers=_SAVED,
)
SWIN_CLS = Format(
    rows=_without_prefix(_MICROSOFT),
    dropped=(
        "layers.{}.blocks.{}.attn.relative_position_index",
        "layers.{}.blocks.{}.attn_mask",
        "norm.{}",
        "head.{}",
    ),
    before=strip,
    wrappers=_CLASSIFIER,
    fresh=(
        "backbone.norms.{}.{}",
    ),  # a classifier has one norm, behind its last map, and of another use
)
VITAEV2 = Format(rows=(*_VITAEV2, *_DETECTOR), wrappers=_SAVED)
VITAEV2_CLS = Format(
    rows=_without_prefix(_VITAEV2), dropped=("head.{}",), before=strip, wrappers=_CLASSIFIER
)
