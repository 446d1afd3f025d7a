"""A weights format: a table of third-party parameter names ("theirs") and vitdet's names ("ours").

In the names of a row, `{}` matches a component between dots and `{*}` any remainder. Conversions of
values, such as a different shape or two tensors instead of one, are pairs of functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor

Weights = Mapping[str, Tensor]


class Row(NamedTuple):
    """The names of a tensor in a third-party format and in vitdet, as patterns.

    In `to_theirs`, the row applies only if one of vitdet's names begins with `given`: for example,
    Detectron2 names the first box stage differently if there are more stages.
    """

    theirs: str
    ours: str
    given: str = ""


class Change(NamedTuple):
    """Functions that convert a tensor from a third-party format to vitdet's, and back."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def same(weights: Weights) -> Weights:
    """Return the weights unchanged."""
    return weights


class Format(NamedTuple):
    """A weights format: names of tensors, and conversions of their values."""

    rows: tuple[Row, ...]
    changes: Mapping[str, Change] = {}  # by vitdet's names
    dropped: tuple[str, ...] = ()  # third-party names without a counterpart in vitdet
    heads: tuple[str, ...] = ()  # third-party classifier heads, which are ignored and reported
    before: Callable[[Weights], Weights] = same  # applied before third-party tensors are renamed
    after: Callable[[Weights], Weights] = same  # applied after tensors get their third-party names
    wrappers: tuple[str, ...] = ()  # keys of the weights in a checkpoint, by precedence
    parts: tuple[str, ...] = ()  # prefixes of the backbone's names in a larger model
    # A pre-trained backbone may lack the parameters `fresh` and have the surplus parameters `spare`
    # (vitdet's names). For a complete detector, neither is allowed.
    fresh: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    # whether relative positions apply to the scaled query; None: not applicable, or set in the file
    scaled: bool | None = None


def rows(text: str, theirs: str = "", ours: str = "", given: str = "") -> tuple[Row, ...]:
    """Parse rows from two columns of names, and add the prefixes `theirs` and `ours`."""
    pairs = (line.split() for line in text.strip().splitlines())
    return tuple(Row(theirs + left, ours + right, given) for left, right in pairs)


def to_ours(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Convert a third-party state dict to vitdet's names.

    Raises ValueError for unknown names, and if two tensors get the same name.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in layout.before(weights).items():
        if known(name, (*layout.dropped, *layout.heads)):
            continue
        renamed = rename(name, layout)
        if renamed is None:
            unknown.append(name)
        elif renamed in ours:
            raise ValueError(f"two tensors map to {renamed}, including {name}")
        else:
            change = _change(renamed, layout)
            ours[renamed] = change.to_ours(tensor) if change else tensor
    if unknown:
        few = ", ".join(unknown[:3])
        raise ValueError(f"tensors unknown to this format ({len(unknown)}): {few}")
    return ours


def to_theirs(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Convert vitdet's state dict to third-party names. Raises ValueError for unknown names."""
    theirs, unknown = {}, []
    for name, tensor in weights.items():
        renamed = _name_back(name, layout, weights)
        if renamed is None:
            unknown.append(name)
        else:
            change = _change(name, layout)
            theirs[renamed] = change.to_theirs(tensor) if change else tensor
    if unknown:
        few = ", ".join(unknown[:3])
        raise ValueError(f"tensors without a name in this format ({len(unknown)}): {few}")
    return dict(layout.after(theirs))


def rename(name: str, layout: Format) -> str | None:
    """Return vitdet's name for a third-party name, or None if no row matches."""
    names = (_fill(name, row.theirs, row.ours) for row in layout.rows)
    return next((ours for ours in names if ours is not None), None)


def known(name: str, patterns: Iterable[str]) -> bool:
    """Return whether the name matches one of the patterns."""
    return any(_pattern(pattern).fullmatch(name) for pattern in patterns)


def _fill(name: str, source: str, target: str) -> str | None:
    """Rewrite a name from pattern `source` to `target`; return None if it does not match."""
    found = _pattern(source).fullmatch(name)
    if found is None:
        return None
    pieces = iter(found.groups())
    return re.sub(r"\{\*?\}", lambda _: next(pieces), target)


@cache
def _pattern(row: str) -> re.Pattern[str]:
    """Compile a name pattern with {} and {*} to a regular expression."""
    return re.compile(re.escape(row).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)"))


def _name_back(name: str, layout: Format, weights: Weights) -> str | None:
    for row in layout.rows:
        renamed = _fill(name, row.ours, row.theirs)
        if renamed is not None and any(other.startswith(row.given) for other in weights):
            return renamed
    return None


def _change(name: str, layout: Format) -> Change | None:
    return next((change for ours, change in layout.changes.items() if known(name, [ours])), None)
