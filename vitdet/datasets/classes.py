"""The classes of a converted data set: those of the source, renamed and selected as asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from vitdet.data.header import is_text
from vitdet.data.segmentation import show


def read_names(path: Path) -> dict[str, str]:
    """The map of a YAML or JSON file, old: new. Raises FileNotFoundError, and ValueError for anything else."""
    try:
        # scalars stay text: a class may be called "no"
        names = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(names, dict) or not all(
        is_text(name) and name for pair in names.items() for name in pair
    ):
        raise ValueError(f"{path}: expected class names as a map old: new, got {show(names)}")
    return names


def select_classes(
    source: Path, names: Sequence[str], keep: Sequence[str], rename: Mapping[str, str]
) -> tuple[tuple[str, ...], list[int | None]]:
    """The classes to write, and for each class of the source which of them it becomes (None: it is left out).

    rename: old name -> new name; two classes with one name become one. keep: the new names to write, in this order; all
    in the order of the source if empty. Raises ValueError for names that there are not.
    """
    for option, given, known in (
        ("--rename", rename, names),
        ("--classes", keep, [rename.get(name, name) for name in names]),
    ):
        missing = [name for name in given if name not in known]
        if missing:
            raise ValueError(
                f"{source}: {option}: no class {show(missing[0])}; the classes are {', '.join(dict.fromkeys(known))}"
            )
    renamed = [rename.get(name, name) for name in names]
    kept = tuple(dict.fromkeys(keep or renamed))
    return kept, [kept.index(name) if name in kept else None for name in renamed]
