"""ViTAE-Transformer's parameter names of ViTAEv2-S: classifier, and Mask R-CNN with FPN."""

from __future__ import annotations

from vitdet.weights.formats.mae import HEADS, PARTS, WRAPPERS
from vitdet.weights.formats.mmdet import FPN_DETECTOR, join_bias
from vitdet.weights.formats.table import Format, rows

_TEXT = """
    layers.{}.RC.PRM.convs.{}.0.{}      backbone.stages.{}.reduction.prm.{}.{}
    layers.{}.RC.PCM.{*}                backbone.stages.{}.reduction.pcm.{*}
    layers.{}.RC.attn.{*}               backbone.stages.{}.reduction.{*}
    layers.{}.NC.{}.PCM.{*}             backbone.stages.{}.cells.{}.pcm.{*}
    layers.{}.NC.{}.{*}                 backbone.stages.{}.cells.{}.{*}
"""
VITAEV2 = Format(rows=(*rows(_TEXT, "backbone."), *FPN_DETECTOR), wrappers=("state_dict",))
VITAEV2_CLS = Format(
    rows=rows(_TEXT), heads=HEADS, before=join_bias, wrappers=WRAPPERS, parts=PARTS
)
