"""Parameter names of MAE pre-trained backbones (He et al., arXiv:2111.06377; facebookresearch/mae).

The files contain no relative positions, which are initialized to zero, and no detector layers.
"""

from __future__ import annotations

from vitdet.weights.formats.detectron2 import add_class_token, drop_class_token
from vitdet.weights.formats.table import Change, Format, rows

# Classifier heads of fine-tuned backbones, including those of timm and DINO
HEADS = ("head.{*}", "head_dist.{*}", "fc_norm.{*}", "fc.{*}", "classifier.{*}", "dino_head.{*}")
PARTS = ("teacher.", "encoder.", "backbone.")
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # keys in timm's and Swin's checkpoints
POSITIONS = {"backbone.pos_embed": Change(drop_class_token, add_class_token)}
FRESH = (
    "backbone.blocks.{}.attn.rel_pos_h",
    "backbone.blocks.{}.attn.rel_pos_w",
    "backbone.blocks.{}.residual.{*}",
)
NORM = ("backbone.norm.{}",)
# Parameters of a masked autoencoder that a detector does not have
DROPPED = ("cls_token", "mask_token", "decoder_{*}")
BLOCKS = rows("""
    blocks.{}.PCM.{*}       backbone.blocks.{}.pcm.{*}
    blocks.{}.{*}           backbone.blocks.{}.{*}
    patch_embed.proj.{}     backbone.patch_embed.proj.{}
    pos_embed               backbone.pos_embed
    norm.{}                 backbone.norm.{}
""")

MAE = Format(
    rows=BLOCKS,
    changes=POSITIONS,
    dropped=DROPPED,
    heads=HEADS,
    wrappers=("model",),
    parts=PARTS,
    fresh=FRESH,
    spare=NORM,  # Detectron2's models have no norm after the last block
)
