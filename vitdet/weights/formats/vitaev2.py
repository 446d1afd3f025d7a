"""Names of ViTAEv2-S (ViTAE-Transformer/ViTAE-Transformer): ImageNet classifier, Mask R-CNN with
FPN.
"""

from __future__ import annotations

from vitdet.weights.formats.mae import HEADS, PARTS, WRAPPERS
from vitdet.weights.formats.mmdet import FPN_DETECTOR, join_bias
from vitdet.weights.formats.table import Format, Row, without_prefix

_VITAEV2 = (
    Row("backbone.layers.{}.RC.PRM.convs.{}.0.{}", "backbone.stages.{}.reduction.prm.{}.{}"),
    Row("backbone.layers.{}.RC.PCM.{*}", "backbone.stages.{}.reduction.pcm.{*}"),
    Row("backbone.layers.{}.RC.attn.{*}", "backbone.stages.{}.reduction.{*}"),
    Row("backbone.layers.{}.NC.{}.PCM.{*}", "backbone.stages.{}.cells.{}.pcm.{*}"),
    Row("backbone.layers.{}.NC.{}.{*}", "backbone.stages.{}.cells.{}.{*}"),
)

VITAEV2 = Format(rows=(*_VITAEV2, *FPN_DETECTOR), wrappers=("state_dict",))
VITAEV2_CLS = Format(
    rows=without_prefix(_VITAEV2), heads=HEADS, before=join_bias, wrappers=WRAPPERS, parts=PARTS
)
