"""From plain data to a tree of frozen dataclasses: a field's type converts its value, and every error names the field.

A key is the path of a setting in the tree, as in `optim.lr`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

Tree = TypeVar("Tree")


def build(kind: type[Tree], tree: object) -> Tree:
    """The dataclass of a tree of dicts; what is absent takes its default. Raises ValueError with one line."""
    return _build(kind, tree, "", kind)


def overridden(kind: type[Tree], tree: dict, overrides: Sequence[str]) -> Tree:
    """As `build`, after overrides `section.key=value` have changed the tree, in order."""
    for one in overrides:
        key, separator, text = one.partition("=")
        if not separator or not key:
            raise ValueError(f"override {one!r}: expected section.key=value, as in optim.lr=2e-4")
        node = tree
        *parents, leaf = key.strip().split(".")
        for depth, parent in enumerate(parents):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(
                    f"{key}: {'.'.join(parents[: depth + 1])} is a setting, not a section"
                )
        node[leaf] = _parse(kind, key.strip(), text)
    return build(kind, tree)


def _parse(kind: type, key: str, text: str) -> object:
    """The value of a setting from text: as in YAML, but a setting that is text stays as it is."""
    if settings(kind).get(key) is str and not text.strip().startswith(("'", '"')):
        return (
            text.strip()
        )  # YAML would make a number of a folder called 2017, and a comment of its #
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {text!r} is not readable as a value") from error


@cache
def settings(kind: type) -> dict[str, type]:
    """The type of every setting of a tree by its key."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                yield from walk(hint, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", hint

    return dict(walk(kind, ""))


FEW = 16  # names that a message can list


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for somebody who wrote a name that is not known: of many names the three that are nearest."""
    inside = [one for one in known if name and name in one] if len(known) > FEW else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close and not inside:
        return f"did you mean '{close[0]}'?"
    if len(known) <= FEW:
        return f"known: {', '.join(known)}"
    like = difflib.get_close_matches(name, inside or known, n=3, cutoff=0)
    return f"of {len(known)} the nearest are {', '.join(like)}"


def _build(kind: type, tree: object, prefix: str, root: type):  # noqa: ANN202 - an instance of `kind`
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        inside = ", ".join(field.name for field in fields(kind))
        raise ValueError(f"{prefix.rstrip('.')}: is a section ({inside}), got {tree!r}")
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            elsewhere = [
                name for name in settings(root) if name.endswith(f".{key}")
            ]  # right name, wrong section
            hint = (
                f"did you mean '{elsewhere[0]}'?" if elsewhere else nearest(str(key), list(hints))
            )
            raise ValueError(f"{prefix}{key}: no such setting; {hint}")
        hint = hints[key]
        values[key] = (
            _build(hint, value, f"{prefix}{key}.", root)
            if is_dataclass(hint)
            else _convert(hint, value, f"{prefix}{key}")
        )
    return kind(**values)


def _convert(hint: type, value: object, key: str) -> object:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(
                f"{key}: expected one of {', '.join(map(str, get_args(hint)))}, got {value!r}"
            )
        return value
    wrong = ValueError(f"{key}: expected {_describe(hint)}, got {value!r}")
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        if not isinstance(value, list | tuple) or (
            rest != [Ellipsis] and len(value) != 1 + len(rest)
        ):
            raise wrong
        return tuple(_convert(item, element, key) for element in value)
    if hint is str:
        if value is not None and not isinstance(value, str | int | float):
            raise wrong
        return "" if value is None else str(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool):
        raise wrong
    if hint is int and isinstance(value, int):
        return value  # as a float it could be rounded
    try:
        number = float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise wrong
    return hint(number)


def _describe(hint: type) -> str:
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        count = "values" if rest == [Ellipsis] else f"{1 + len(rest)} values"
        return f"a list of {count}, each {_describe(item)}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
