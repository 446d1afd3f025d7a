"""Renaming and selection of classes during the conversion of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vitdet.data.header import is_text
from vitdet.data.segmentation import show
from vitdet.files import read_yaml


def read_names(path: Path) -> dict[str, str]:
    """Read a map from old to new names (YAML or JSON). Raises FileNotFoundError or ValueError."""
    names = read_yaml(path, "YAML or JSON")
    texts = [name for pair in names.items() for name in pair] if isinstance(names, dict) else [""]
    if not all(name and is_text(name) for name in texts):
        raise ValueError(f"{path}: expected entries 'old name: new name', got {show(names)}")
    return names


def select_classes(
    source: Path, names: Sequence[str], keep: Sequence[str], rename: Mapping[str, str]
) -> tuple[tuple[str, ...], list[int | None]]:
    """Return the classes to write, and the new label (None if dropped) of each source class.

    `rename` maps old to new names; classes with the same new name are merged. `keep` lists the new
    names to write, in order; if empty, all classes are kept in source order. Raises ValueError for
    unknown names.
    """
    renamed = [rename.get(name, name) for name in names]
    for option, given, known in (("--rename", rename, names), ("--classes", keep, renamed)):
        missing = [name for name in given if name not in known]
        if missing:
            valid = ", ".join(dict.fromkeys(known))
            raise ValueError(f"{source}: {option}: no class {show(missing[0])}; available: {valid}")
    kept = tuple(dict.fromkeys(keep or renamed))
    return kept, [kept.index(name) if name in kept else None for name in renamed]
