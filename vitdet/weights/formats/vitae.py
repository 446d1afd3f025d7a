"""Names of the ViTAE pre-trained backbones (ViTAE-Transformer/ViTAE-Transformer): MAE and
classifiers.
"""

from __future__ import annotations

from vitdet.weights.formats.mae import BLOCKS, FRESH, HEADS, NORM, PARTS, POSITIONS, WRAPPERS
from vitdet.weights.formats.mmdet import join_bias
from vitdet.weights.formats.table import Format, Row

VITAE = Format(
    rows=BLOCKS,
    changes=POSITIONS,
    dropped=("cls_token", "mask_token", "decoder_{*}"),
    heads=HEADS,
    before=join_bias,
    wrappers=WRAPPERS,
    parts=PARTS,
    fresh=FRESH,
    spare=NORM,
)
# ViTAE-B: `layers.0.RC` is the patch embedding, `layers.2.NC` are the blocks. ViTAE-S: three
# reduction cells. Both were trained with a norm after pooling instead of one after the last block.
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
    changes=POSITIONS,
    dropped=("layers.0.RC.cls_token",),
    heads=HEADS,
    before=join_bias,
    wrappers=WRAPPERS,
    parts=PARTS,
    fresh=(*FRESH, *NORM),
)
