"""Parameter names of pre-trained ViTAE backbones (ViTAE-Transformer/ViTAE-Transformer)."""

from __future__ import annotations

from vitdet.weights.formats.mae import FRESH, HEADS, MAE, NORM, PARTS, POSITIONS, WRAPPERS
from vitdet.weights.formats.mmdet import join_bias
from vitdet.weights.formats.table import Format, rows

VITAE = MAE._replace(before=join_bias, wrappers=WRAPPERS)
# ImageNet classifiers. In ViTAE-B, `layers.0.RC` is the patch embedding and `layers.2.NC` contains
# the blocks; ViTAE-S has three reduction cells. Both classifiers have a norm after the pooling, not
# after the last block.
VITAE_CLS = Format(
    rows=rows("""
        layers.0.RC.pos_embed               backbone.pos_embed
        layers.0.RC.PRM.proj.{}             backbone.patch_embed.proj.{}
        layers.{}.RC.PRM.convs.{}.0.{}      backbone.reductions.{}.prm.{}.{}
        layers.{}.RC.PCM.{*}                backbone.reductions.{}.pcm.{*}
        layers.{}.RC.attn.{*}               backbone.reductions.{}.attn.{*}
        layers.2.NC.{}.PCM.{*}              backbone.blocks.{}.pcm.{*}
        layers.2.NC.{}.{*}                  backbone.blocks.{}.{*}
    """),
    changes=POSITIONS,
    dropped=("layers.0.RC.cls_token",),
    heads=HEADS,
    before=join_bias,
    wrappers=WRAPPERS,
    parts=PARTS,
    fresh=(*FRESH, *NORM),
)
