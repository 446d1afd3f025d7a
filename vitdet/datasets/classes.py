"""The classes of a converted data set: those of the source, renamed and selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from vitdet.data.header import is_text
from vitdet.data.segmentation import show


def read_names(path: Path) -> dict[str, str]:
    """Read a YAML or JSON file with a map old: new. Raises FileNotFoundError, ValueError for other
    content.
    """
    try:
        # scalars stay text: a class may be named "no"
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
    """Return the classes to write, and for each class of the source its new class (None: dropped).

    rename: old name -> new name; classes with the same new name are merged. keep: the new names to
    write, in this order; default: all, in the order of the source. Raises ValueError for unknown
    names.
    """
    for option, given, known in (
        ("--rename", rename, names),
        ("--classes", keep, [rename.get(name, name) for name in names]),
    ):
        missing = [name for name in given if name not in known]
        if missing:
            raise ValueError(
                f"{source}: {option}: no class {show(missing[0])}; the classes are "
                f"{', '.join(dict.fromkeys(known))}"
            )
    renamed = [rename.get(name, name) for name in names]
    kept = tuple(dict.fromkeys(keep or renamed))
    return kept, [kept.index(name) if name in kept else None for name in renamed]
