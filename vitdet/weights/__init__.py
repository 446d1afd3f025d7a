"""Initial weights: published files, conversion and loading.

Modules that need torch are imported on first use, so that `vitdet weights list` starts quickly.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config.suggestions import nearest
from vitdet.weights.catalogue import CATALOGUE, PACKAGED, fetched

if TYPE_CHECKING:
    from vitdet.weights.load import Loaded, load_pretrained

__all__ = ["CATALOGUE", "NOT_PRETRAINED", "PACKAGED", "Loaded", "load_pretrained", "resolve"]

# Substrings of the names of parameters that MAE pre-trained backbones do not contain
NOT_PRETRAINED = ("rel_pos_h", "rel_pos_w", ".residual.")


def __getattr__(name: str) -> object:
    if name not in ("Loaded", "load_pretrained"):
        raise AttributeError(f"module 'vitdet.weights' has no attribute {name!r}")
    return getattr(importlib.import_module("vitdet.weights.load"), name)


def resolve(name_or_path: str, folder: Path | None = None) -> Path | None:
    """Return the file that `train.init` refers to, or None for '' (no initial weights).

    A name in the catalog is looked up in `folder`, by default in the package or the cache. Raises
    ValueError for an unknown name, and FileNotFoundError for a missing file.
    """
    if not name_or_path:
        return None
    path = Path(name_or_path)
    if path.suffix:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weights file (train.init)")
        return path
    if name_or_path not in CATALOGUE:
        closest = nearest(name_or_path, list(CATALOGUE))
        raise ValueError(
            f"train.init: no weights named {name_or_path!r}; {closest} (or specify a weights "
            "file with a suffix, e.g. .pth; '' trains from scratch)"
        )
    return fetched(name_or_path, folder)
