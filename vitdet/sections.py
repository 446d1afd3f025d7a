"""Groups of settings, as frozen dataclasses that may hold others: what they check, and their values from a file."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any, get_type_hints

from msgspec import convert

from vitdet.ranges import bare, check


def operational(reason: str, *unless: str) -> dict[str, Any]:
    """Metadata of what does not affect the trained weights, and why: a training can resume with
    another value, and the names of run and checkpoint folders do not depend on it.

    unless: keys of settings, as `optim.scale_lr`; it does affect them if any of these is on.
    """
    return {"operational": reason, "unless": unless}


class Section:
    """A group of settings. Types, choices and ranges are checked whenever an instance is made."""

    prefix = ""  # of its settings' keys, as `optim.` of `optim.lr`
    hints = dict[str, Any]()  # field -> type and range

    def __init_subclass__(cls, prefix: str | None = None) -> None:
        cls.prefix = cls.prefix if prefix is None else prefix
        cls.hints = get_type_hints(cls, include_extras=True)

    def __post_init__(self) -> None:
        for name, hint in self.hints.items():
            if not is_dataclass(hint):
                check(self.prefix + name, hint, getattr(self, name))


def list_settings(
    section: Any, operational: bool = False, root: Any = None
) -> dict[str, tuple[Any, bool]]:
    """{key: (value, whether it is operational)} of all settings of a section.

    root: the section of all sections, to which the keys of `unless` refer; default: `section`.
    """
    found: dict[str, tuple[Any, bool]] = {}
    root = section if root is None else root
    for one in fields(section):
        value, key = getattr(section, one.name), section.prefix + one.name
        active = any(attrgetter(key)(root) for key in one.metadata.get("unless", ()))
        harmless = operational or ("operational" in one.metadata and not active)
        if is_dataclass(value):
            found |= list_settings(value, harmless, root)
        else:
            found[key] = (value, harmless)
    return found


def merge(tree: dict, kind: Any, changes: Mapping) -> None:
    """Set values in the tree of a section of this kind; a mapping is merged into a section that is there.

    Raises ValueError where a section would become something else.
    """
    for name, value in changes.items():
        section, current = kind.hints.get(name), tree.get(name)
        if not is_dataclass(section):
            tree[name] = value
            continue
        tree[name] = {} if current is None else current
        # null stands for the defaults in a file, but here settings of the file would be lost
        for one in (value, tree[name]):
            if not isinstance(one, dict):
                raise section_error(section, one)
        merge(tree[name], section, value)


def convert_section(kind: Any, value: Any) -> Any:
    """A value from YAML as its setting's type, if possible; the section refuses it otherwise."""
    if hints := getattr(kind, "hints", None):  # a section
        return kind(
            **{name: convert_section(hints[name], one) for name, one in (value or {}).items()}
        )
    hint = bare(kind)
    if hint is str and isinstance(value, int | float | None):
        return "" if value is None else str(value)
    with suppress(ValueError):  # also ValidationError
        # YAML reads 1e-4 as text; a whole number may be 1e3, but true is not 1
        number = float(value) if hint in (int, float) and isinstance(value, str) else value
        if not isinstance(number, float) or math.isfinite(number):
            return convert(number, hint, strict=hint is bool)
    return value


def section_error(kind: Any, value: object) -> ValueError:
    """The error of a value in the place of a section."""
    got = "null" if value is None else repr(value)
    return ValueError(f"{kind.prefix[:-1]}: is a section ({', '.join(kind.hints)}), got {got}")
