"""The formats of foreign checkpoints, by name: one table each."""

from __future__ import annotations

from vitdet.weights.baselines import SWIN, SWIN_CLS, SWIN_MMDET, VITAEV2, VITAEV2_CLS
from vitdet.weights.detectron2 import DETECTRON2, drop_class_token
from vitdet.weights.mmdet import MMDET, mmdet
from vitdet.weights.pretraining import MAE, VITAE, VITAE_CLS, VITDET
from vitdet.weights.table import Format, rename, to_ours, to_theirs

__all__ = [
    "DETECTRON2",
    "FORMATS",
    "MAE",
    "MMDET",
    "SWIN",
    "SWIN_CLS",
    "SWIN_MMDET",
    "VITAE",
    "VITAEV2",
    "VITAEV2_CLS",
    "VITAE_CLS",
    "VITDET",
    "Format",
    "drop_class_token",
    "mmdet",
    "rename",
    "to_ours",
    "to_theirs",
]

FORMATS = {
    "vitdet": VITDET,
    "detectron2": DETECTRON2,
    "mmdet": MMDET,
    "mae": MAE,
    "vitae": VITAE,
    "vitae_cls": VITAE_CLS,
    "swin": SWIN,
    "swin_cls": SWIN_CLS,
    "swin_mmdet": SWIN_MMDET,
    "vitaev2": VITAEV2,
    "vitaev2_cls": VITAEV2_CLS,
}
