"""From a folder in COCO's or LVIS's layout to batches: the training stream and the validation images.

The public names are resolved on first use: reading the layout of a folder needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdet.data.dataset import TrainData, ValData, read_split
    from vitdet.data.loader import train_loader, val_loader

_HOMES = {
    "TrainData": "vitdet.data.dataset",
    "ValData": "vitdet.data.dataset",
    "read_split": "vitdet.data.dataset",
    "train_loader": "vitdet.data.loader",
    "val_loader": "vitdet.data.loader",
}
__all__ = ["TrainData", "ValData", "read_split", "train_loader", "val_loader"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitdet.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
