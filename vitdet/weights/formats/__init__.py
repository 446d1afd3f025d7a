"""The checkpoint formats, by the names that `train.init_format` and `--format` accept."""

from __future__ import annotations

from vitdet.weights.formats.detectron2 import DETECTRON2
from vitdet.weights.formats.mae import FRESH, MAE
from vitdet.weights.formats.mmdet import MMDET
from vitdet.weights.formats.swin import SWIN, SWIN_CLS, SWIN_MMDET
from vitdet.weights.formats.table import Format, Row
from vitdet.weights.formats.vitae import VITAE, VITAE_CLS
from vitdet.weights.formats.vitaev2 import VITAEV2, VITAEV2_CLS

FORMATS = {
    # vitdet's names: checkpoints, packaged pre-trained weights, converted files
    "vitdet": Format(rows=(Row("{*}", "{*}"),), wrappers=("model",), fresh=FRESH),
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
