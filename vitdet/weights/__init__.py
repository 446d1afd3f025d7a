"""Where initial weights come from, and how they are loaded: exactly, or with a declared set of missing names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vitdet.typed import nearest

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
                         "(a .safetensors file can be given too; '' trains from scratch)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file (train.init)")
    return path


def load_pretrained(detector: nn.Module, name_or_path: str | Path) -> list[str]:
    """Loads a pre-trained backbone into a detector and gives the names that keep their fresh values.

    Every tensor of the file must have a place of its shape, and every parameter of the backbone but the relative
    positions must be in the file; else ValueError with the names.
    """
    path = resolve(str(name_or_path))
    if path is None:
        return list(detector.state_dict())
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    own = detector.state_dict()
    surplus = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    undeclared = [name for name in missing
                  if name.startswith("backbone.") and not any(part in name for part in NOT_PRETRAINED)]
    other = [f"{name} {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
             for name in weights if name in own and weights[name].shape != own[name].shape]
    if surplus or undeclared or other:
        raise ValueError(f"{path}: does not fit this backbone: {_few('no place for', surplus)}"
                         f"{_few('lacks', undeclared)}{_few('other shape:', other)}".rstrip("; "))
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return missing


def _few(what: str, names: list[str]) -> str:
    return f"{len(names)} tensors: {what} {', '.join(names[:3])}; " if names else ""
