"""A foreign layout of weights as one table, read in both directions.

A row is (their name, our name); `{}` stands for any piece between dots and `{*}` for any rest, filled in from left to
right. What is more than a name (another shape, two tensors for one) is a pair of functions beside the rows. A name
that no row knows is an error, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor

Weights = Mapping[str, Tensor]


class Row(NamedTuple):
    """One kind of tensor. On the way back it counts only if a name of ours begins with `given`: layouts give the same
    part other names in other systems, such as the first of three stages and the only one.
    """

    theirs: str
    ours: str
    given: str = ""


class Change(NamedTuple):
    """How a tensor of theirs becomes ours, and back."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def same(weights: Weights) -> Weights:
    """Nothing to do before or after the renaming."""
    return weights


class Format(NamedTuple):
    """A foreign layout: rows, changes by our name, and what concerns several tensors at once."""

    rows: tuple[Row, ...]
    changes: Mapping[str, Change] = {}
    dropped: tuple[str, ...] = ()  # their names that have no place in our models
    # the same of layers that were trained for a task: reported when ignored
    heads: tuple[str, ...] = ()
    before: Callable[[Weights], Weights] = same  # on their names, ahead of the rows
    after: Callable[[Weights], Weights] = same  # its inverse, on the way back
    # where its own trainer keeps the weights; the first that is there
    wrappers: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()  # prefixes of what it describes in a file that holds more
    # Declared differences of a pre-trained backbone, by our names: what it lacks and starts afresh, and what it may
    # have without a place. A whole detector has none.
    fresh: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    # whether relative positions meet the scaled query; None: it has none, or says so itself
    scaled: bool | None = None


def without_prefix(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a detector's backbone, for a file that holds only the backbone."""
    return tuple(row._replace(theirs=row.theirs.removeprefix("backbone.")) for row in rows)


def to_ours(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Their state dict under our names.

    Raises ValueError naming what no row of the table knows, and what two of their tensors claim.
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
            f"{len(unknown)} tensors that this format does not know, such as {', '.join(unknown[:3])}"
        )
    return ours


def to_theirs(weights: Weights, layout: Format) -> dict[str, Tensor]:
    """Our state dict under their names. Raises ValueError naming what no row of the table knows."""
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
            f"{len(unknown)} tensors that this format has no name for, such as {', '.join(unknown[:3])}"
        )
    return dict(layout.after(theirs))


def rename(name: str, layout: Format) -> str | None:
    """Our name of their tensor, or None if the table has no row for it."""
    for row in layout.rows:
        renamed = fill(name, row.theirs, row.ours)
        if renamed is not None:
            return renamed
    return None


def fill(name: str, source: str, target: str) -> str | None:
    """The name written as `target` if it reads as `source`, else None."""
    found = pattern(source).fullmatch(name)
    if found is None:
        return None
    pieces = iter(found.groups())
    return re.sub(r"\{\*?\}", lambda _: next(pieces), target)


def known(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits the name."""
    return any(pattern(one).fullmatch(name) for one in patterns)


@cache
def pattern(row: str) -> re.Pattern[str]:
    """The regular expression of one side of a row."""
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
