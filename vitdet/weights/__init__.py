"""Where initial weights come from, and how they are loaded: exactly, or with a declared set of missing names.

What needs torch is imported when it is first used: the list of the published files answers at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.suggestions import nearest
from vitdet.weights.catalogue import CATALOGUE, PACKAGED, fetched

if TYPE_CHECKING:
    from vitdet.weights.load import Loaded, load_pretrained

__all__ = ["CATALOGUE", "NOT_PRETRAINED", "PACKAGED", "Loaded", "load_pretrained", "resolve"]

# A pre-training holds the backbone alone, without what its scattered patches have no use for.
NOT_PRETRAINED = ("rel_pos_h", "rel_pos_w", ".residual.")


def __getattr__(name: str) -> object:
    if name not in ("Loaded", "load_pretrained"):
        raise AttributeError(f"module 'vitdet.weights' has no attribute {name!r}")
    return getattr(importlib.import_module("vitdet.weights.load"), name)


def resolve(name_or_path: str, folder: Path | None = None) -> Path | None:
    """The file that `train.init` means, None for ''; a named one is looked for in `folder` if that is given, else with
    the package and in the cache.

    Raises ValueError, or FileNotFoundError that names the command which fetches it.
    """
    if not name_or_path:
        return None
    path = Path(name_or_path)
    if not path.suffix and name_or_path not in CATALOGUE:
        raise ValueError(
            f"train.init: no weights named {name_or_path!r}; {nearest(name_or_path, list(CATALOGUE))} "
            "(a file of weights can be given too; '' trains from scratch)"
        )
    if not path.suffix:
        return fetched(name_or_path, folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file (train.init)")
    return path
