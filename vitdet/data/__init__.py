"""Data sets in COCO's or LVIS's layout: validation, data loaders, augmentation.

Names are imported on first use, so that importing `vitdet.data.layout` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "TrainData": "vitdet.data.dataset",
    "ValData": "vitdet.data.dataset",
    "read_split": "vitdet.data.dataset",
    "train_loader": "vitdet.data.loader",
    "val_loader": "vitdet.data.loader",
}
__all__ = ["TrainData", "ValData", "read_split", "train_loader", "val_loader"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vitdet.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
