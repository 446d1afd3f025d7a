"""Where initial weights come from, and how they are loaded: exactly, or with a declared set of missing names."""

from __future__ import annotations

from pathlib import Path

from vitdet.typed import nearest
from vitdet.weights.load import Loaded, load_pretrained

__all__ = ["CATALOGUE", "NOT_PRETRAINED", "PACKAGED", "Loaded", "load_pretrained", "resolve"]

PACKAGED = Path(__file__).parent
# name -> what it is. Files that ship with the package lie beside this one.
CATALOGUE = {
    "mae_vit_tiny": "MAE pre-training of vit_tiny on generated images without labels (vitdet weights pretrain)",
}
# A pre-training holds the backbone alone, without what its scattered patches have no use for.
NOT_PRETRAINED = ("rel_pos_h", "rel_pos_w", ".residual.")


def resolve(name_or_path: str, folder: Path | None = None) -> Path | None:
    """The file that `train.init` means, None for ''; a named one is looked for in `folder` if that is given.

    Raises ValueError or FileNotFoundError if there is none.
    """
    if not name_or_path:
        return None
    path = Path(name_or_path)
    if name_or_path in CATALOGUE:
        path = (folder or PACKAGED) / f"{name_or_path}.safetensors"
    elif not path.suffix:
        raise ValueError(f"train.init: no weights named {name_or_path!r}; {nearest(name_or_path, list(CATALOGUE))} "
                         "(a file of weights can be given too; '' trains from scratch)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file (train.init)")
    return path
