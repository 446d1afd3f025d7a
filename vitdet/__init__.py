"""Plain Vision Transformer detectors.

The public names are resolved when they are first used, so that `import vitdet` and the command line stay instant.
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
_HOMES = {
    "Config": "vitdet.config",
    "load_config": "vitdet.config",
    "build_detector": "vitdet.models",
    "Predictor": "vitdet.predictor",
    "train": "vitdet.training",
    "evaluate": "vitdet.evaluation",
}
__all__ = ["Config", "Predictor", "build_detector", "evaluate", "load_config", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitdet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
