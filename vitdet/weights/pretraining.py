"""Names of pre-trained backbones: MAE, ViTAE in MAE's naming, and ViTAE's classifiers.

He et al. (2111.06377), facebookresearch/mae; ViTAE-Transformer/ViTAE-Transformer. None of them has relative positions,
which start at zero, nor anything of a detector.
"""

from __future__ import annotations

from torch import Tensor

from vitdet.weights.detectron2 import add_class_token, drop_class_token
from vitdet.weights.mmdet import join_bias
from vitdet.weights.table import Change, Format, Row, Weights

_POSITIONS = {"backbone.pos_embed": Change(drop_class_token, add_class_token)}
_FRESH = (
    "backbone.blocks.{}.attn.rel_pos_h",
    "backbone.blocks.{}.attn.rel_pos_w",
    "backbone.blocks.{}.residual.{*}",
)
_NORM = ("backbone.norm.{}",)
_BLOCKS = (
    Row("blocks.{}.PCM.{*}", "backbone.blocks.{}.pcm.{*}"),
    Row("blocks.{}.{*}", "backbone.blocks.{}.{*}"),
    Row("patch_embed.proj.{}", "backbone.patch_embed.proj.{}"),
    Row("pos_embed", "backbone.pos_embed"),
    Row("norm.{}", "backbone.norm.{}"),
)


def strip(weights: Weights) -> dict[str, Tensor]:
    """Names without what a training put before them: `module.` of parallel ones, `encoder.` of an autoencoder, whose
    other parts are left out.
    """
    plain = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if len(plain) < len(weights):
        raise ValueError("the same names with and without module.")
    inside = {
        name.removeprefix("encoder."): tensor
        for name, tensor in plain.items()
        if name.startswith("encoder.")
    }
    return join_bias(inside or plain)


# Our own names: the pre-training that ships with the package, and what was converted.
VITDET = Format(rows=(Row("{*}", "{*}"),), wrappers=("model", ""), fresh=_FRESH)
MAE = Format(
    rows=_BLOCKS,
    changes=_POSITIONS,
    # What the detector has no place for: the class token, and the decoder of a whole autoencoder's file.
    dropped=("cls_token", "mask_token", "decoder_{*}"),
    wrappers=("model", ""),
    fresh=_FRESH,
    spare=_NORM,  # Detectron2's systems have no norm after the last block
)
VITAE = Format(
    rows=_BLOCKS,
    changes=_POSITIONS,
    dropped=("cls_token", "mask_token", "decoder_{*}", "head.{}"),
    before=strip,
    wrappers=("state_dict_ema", "state_dict", "model", ""),
    fresh=_FRESH,
    spare=_NORM,
)
# ViTAE-B: `layers.0.RC` holds the patches, `layers.2.NC` the blocks. ViTAE-S: three reduction cells. Both were trained
# with a norm after the pooling instead of the last block's, which starts afresh.
VITAE_CLS = Format(
    rows=(
        Row("layers.0.RC.pos_embed", "backbone.pos_embed"),
        Row("layers.0.RC.PRM.proj.{}", "backbone.patch_embed.proj.{}"),
        Row("layers.{}.RC.PRM.convs.{}.0.{}", "backbone.reductions.{}.prm.{}.{}"),
        Row("layers.{}.RC.PCM.{*}", "backbone.reductions.{}.pcm.{*}"),
        Row("layers.{}.RC.attn.{*}", "backbone.reductions.{}.attn.{*}"),
        Row("layers.2.NC.{}.PCM.{*}", "backbone.blocks.{}.pcm.{*}"),
        Row("layers.2.NC.{}.{*}", "backbone.blocks.{}.{*}"),
    ),
    changes=_POSITIONS,
    dropped=("layers.0.RC.cls_token", "fc_norm.{}", "head.{}"),
    before=strip,
    wrappers=("state_dict_ema", "state_dict", "model", ""),
    fresh=(*_FRESH, *_NORM),
)
