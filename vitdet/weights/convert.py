"""The formats of foreign checkpoints, by name: one table each."""

from __future__ import annotations

from vitdet.weights.detectron2 import DETECTRON2, drop_class_token
from vitdet.weights.mmdet import MMDET, mmdet
from vitdet.weights.table import Format, rename, to_ours, to_theirs

__all__ = ["DETECTRON2", "FORMATS", "MMDET", "Format", "drop_class_token", "mmdet", "rename", "to_ours", "to_theirs"]

FORMATS = {"detectron2": DETECTRON2, "mmdet": MMDET}
