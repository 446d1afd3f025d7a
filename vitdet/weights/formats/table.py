"""A third-party weights format as a table of names for both directions.

A row is (their name, our name); `{}` matches any part between dots, `{*}` any rest of a name.
Changes beyond the name (a different shape, two tensors instead of one) are pairs of functions. A
name that matches no row is an error, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor

Weights = Mapping[str, Tensor]


class Row(NamedTuple):
    """The names of one kind of tensor in the third-party format and in vitdet.

    When converting back, the row applies only if one of our names begins with `given`: a format
    may name the same part differently in different models, e.g. the first box stage with and
    without further stages.
    """

    theirs: str
    ours: str
    given: str = ""


class Change(NamedTuple):
    """Conversion of a tensor in both directions."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def same(weights: Weights) -> Weights:
    """Return the weights unchanged."""
    return weights


class Format(NamedTuple):
    """A weights format: names, and conversions beyond the names."""

    rows: tuple[Row, ...]
    changes: Mapping[str, Change] = {}  # by our names
    dropped: tuple[str, ...] = ()  # their names that have no counterpart
    heads: tuple[str, ...] = ()  # their classifier heads, which are ignored but reported
    before: Callable[[Weights], Weights] = same  # applied to their weights, before the rows
    after: Callable[[Weights], Weights] = same  # applied when converting back, after the rows
    wrappers: tuple[str, ...] = ()  # keys of the weights in the trainer's files, by precedence
    parts: tuple[str, ...] = ()  # prefixes of the backbone's names in a larger model
    # A pre-trained backbone may lack the parameters `fresh` and have the surplus parameters `spare`
    # (our names). For a complete detector, neither is allowed.
    fresh: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    # whether relative positions apply to the scaled query; None: no positions, or set in the file
    scaled: bool | None = None


def rows(text: str, theirs: str = "", ours: str = "", given: str = "") -> tuple[Row, ...]:
    """Parse rows from two columns of text, their names and ours, and add the prefixes."""
    pairs = (line.split() for line in text.strip().splitlines())
    return tuple(Row(theirs + left, ours + right, given) for left, right in pairs)


def to_ours(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Convert their state dict to our names.

    Raises ValueError for names that match no row, and for two tensors with the same new name.
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
            raise ValueError(f"two tensors map to {renamed}; one of them is {name}")
        else:
            change = _change(renamed, layout)
            ours[renamed] = change.to_ours(tensor) if change else tensor
    if unknown:
        few = ", ".join(unknown[:3])
        raise ValueError(f"tensors unknown to this format ({len(unknown)}): {few}")
    return ours


def to_theirs(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Convert our state dict to their names. Raises ValueError for names that match no row."""
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
    """Return our name of their tensor `name`, or None if the name matches no row."""
    names = (_fill(name, row.theirs, row.ours) for row in layout.rows)
    return next((ours for ours in names if ours is not None), None)


def known(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns matches the name."""
    return any(_pattern(pattern).fullmatch(name) for pattern in patterns)


def _fill(name: str, source: str, target: str) -> str | None:
    """Rewrite a name from pattern `source` to pattern `target`; None if it does not match."""
    found = _pattern(source).fullmatch(name)
    if found is None:
        return None
    pieces = iter(found.groups())
    return re.sub(r"\{\*?\}", lambda _: next(pieces), target)


@cache
def _pattern(row: str) -> re.Pattern[str]:
    """Return the regular expression of one side of a row."""
    return re.compile(re.escape(row).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)"))


def _name_back(name: str, layout: Format, weights: Weights) -> str | None:
    for row in layout.rows:
        renamed = _fill(name, row.ours, row.theirs)
        if renamed is not None and any(other.startswith(row.given) for other in weights):
            return renamed
    return None


def _change(name: str, layout: Format) -> Change | None:
    return next((change for ours, change in layout.changes.items() if known(name, [ours])), None)
