"""Plain Vision Transformer detectors.

The public names are imported on first use, so that `import vitdet` and the command line are fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdet.config import Config, load_config
    from vitdet.evaluation import evaluate
    from vitdet.models import build_detector
    from vitdet.predictor import Predictor
    from vitdet.training import train

__version__ = "0.2.0"
_MODULES = {
    "Config": "vitdet.config",
    "load_config": "vitdet.config",
    "build_detector": "vitdet.models",
    "Predictor": "vitdet.predictor",
    "train": "vitdet.training",
    "evaluate": "vitdet.evaluation",
}
__all__ = ["Config", "Predictor", "build_detector", "evaluate", "load_config", "train"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'vitdet' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
