"""A third-party format of weights as a table of names for both directions.

A row is (their name, our name); `{}` matches any part between dots and `{*}` any rest, in order.
Changes beyond the name (another shape, two tensors for one) are pairs of functions. A name that
matches no row is an error, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor

Weights = Mapping[str, Tensor]


class Row(NamedTuple):
    """One kind of tensor.

    given: in the conversion back, the row applies only if one of our names begins with this prefix:
    formats name the same part differently in different systems, e.g. the first of three stages and
    the only stage.
    """

    theirs: str
    ours: str
    given: str = ""


class Change(NamedTuple):
    """Conversion of one tensor, in both directions."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def same(weights: Weights) -> Weights:
    """Return the weights unchanged."""
    return weights


class Format(NamedTuple):
    """A format of weights."""

    rows: tuple[Row, ...]
    changes: Mapping[str, Change] = {}  # by our names
    dropped: tuple[str, ...] = ()  # their names that have no counterpart
    heads: tuple[str, ...] = ()  # their classifier heads: ignored, but reported
    before: Callable[[Weights], Weights] = same  # applied to their names, before the rows
    after: Callable[[Weights], Weights] = same  # its inverse, in the conversion back
    wrappers: tuple[str, ...] = ()  # keys of the weights in its own trainer's files, by precedence
    parts: tuple[str, ...] = ()  # prefixes of the described names in a larger file
    # Declared differences of a pre-trained backbone, by our names: parameters that it lacks and
    # that it has in excess. A complete detector has none.
    fresh: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    # whether relative positions are applied to the scaled query; None: none, or stored in the file
    scaled: bool | None = None


def without_prefix(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows of a detector's backbone for a file that contains only the backbone."""
    return tuple(row._replace(theirs=row.theirs.removeprefix("backbone.")) for row in rows)


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
            continue
        if renamed in ours:
            raise ValueError(f"two tensors for {renamed}; one is {name}")
        change = _change(renamed, layout)
        ours[renamed] = change.to_ours(tensor) if change else tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors unknown to this format, such as {', '.join(unknown[:3])}"
        )
    return ours


def to_theirs(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Convert our state dict to their names. Raises ValueError for names that match no row."""
    theirs, unknown = {}, []
    for name, tensor in weights.items():
        renamed = _name_back(name, layout, weights)
        if renamed is None:
            unknown.append(name)
            continue
        change = _change(name, layout)
        theirs[renamed] = change.to_theirs(tensor) if change else tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors without a name in this format, such as "
            f"{', '.join(unknown[:3])}"
        )
    return dict(layout.after(theirs))


def rename(name: str, layout: Format) -> str | None:
    """Return our name of their tensor, or None if it matches no row."""
    for row in layout.rows:
        renamed = fill(name, row.theirs, row.ours)
        if renamed is not None:
            return renamed
    return None


def fill(name: str, source: str, target: str) -> str | None:
    """Rewrite a name that matches the pattern `source` as `target`; None if it does not match."""
    found = pattern(source).fullmatch(name)
    if found is None:
        return None
    pieces = iter(found.groups())
    return re.sub(r"\{\*?\}", lambda _: next(pieces), target)


def known(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns matches the name."""
    return any(pattern(one).fullmatch(name) for one in patterns)


@cache
def pattern(row: str) -> re.Pattern[str]:
    """Return the regular expression of one side of a row."""
    return re.compile(re.escape(row).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+)"))


def _name_back(name: str, layout: Format, weights: Weights) -> str | None:
    for row in layout.rows:
        renamed = fill(name, row.ours, row.theirs)
        if renamed is not None and (
            not row.given or any(other.startswith(row.given) for other in weights)
        ):
            return renamed
    return None


def _change(name: str, layout: Format) -> Change | None:
    return next(
        (change for ours, change in layout.changes.items() if pattern(ours).fullmatch(name)), None
    )
