"""Sections of the config: nested frozen dataclasses that validate their values."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any, get_type_hints

from msgspec import convert

from vitdet.config.ranges import check, without_ranges


def operational(reason: str, *unless: str) -> dict[str, Any]:
    """Return field metadata that marks a setting as not affecting the trained weights.

    A training run can resume with a different value, and the names of run and checkpoint folders do
    not depend on the setting. `reason` states why the setting does not affect the weights. If a
    setting in `unless` is enabled, e.g. `optim.scale_lr`, the marked setting affects the weights.
    """
    return {"operational": reason, "unless": unless}


class Section:
    """Group of settings. Creating an instance checks types, choices and ranges."""

    prefix = ""  # prefix of the setting keys, e.g. `optim.`
    hints = dict[str, Any]()  # setting -> type and range

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
    """Return {key: (value, is_operational)} for all settings of a section; see `operational`.

    operational: treat every setting as operational. root: the config that contains the settings
    named in `unless`; None: `section` is the config.
    """
    found: dict[str, tuple[Any, bool]] = {}
    root = section if root is None else root
    for item in fields(section):
        value, key = getattr(section, item.name), section.prefix + item.name
        active = any(attrgetter(key)(root) for key in item.metadata.get("unless", ()))
        harmless = operational or ("operational" in item.metadata and not active)
        if is_dataclass(value):
            found |= list_settings(value, harmless, root)
        else:
            found[key] = (value, harmless)
    return found


def merge(tree: dict, kind: Any, changes: Mapping) -> None:
    """Merge `changes` into `tree`, the dict of a section of type `kind`, including nested sections.

    Raises ValueError if the value of a section is not a mapping."""
    for name, value in changes.items():
        section, current = kind.hints.get(name), tree.get(name)
        if not is_dataclass(section):
            tree[name] = value
            continue
        tree[name] = {} if current is None else current
        # null selects the defaults in a file; in an override, it would discard the file's settings
        for content in (value, tree[name]):
            if not isinstance(content, dict):
                raise section_error(section, content)
        merge(tree[name], section, value)


def convert_section(kind: Any, value: Any) -> Any:
    """Convert a YAML value to the type of a setting or section.

    A value that cannot be converted stays unchanged; creating the section then rejects it."""
    if hints := getattr(kind, "hints", None):  # a section
        items = (value or {}).items()
        return kind(**{name: convert_section(hints[name], content) for name, content in items})
    hint = without_ranges(kind)
    if hint is str and isinstance(value, int | float | None):
        return "" if value is None else str(value)
    with suppress(ValueError):  # msgspec.ValidationError is a ValueError
        # PyYAML reads 1e-4 as text. 1e3 is accepted as an integer, but true is not accepted as 1.
        number = float(value) if hint in (int, float) and isinstance(value, str) else value
        if not isinstance(number, float) or math.isfinite(number):
            return convert(number, hint, strict=hint is bool)
    return value


def section_error(kind: Any, value: object) -> ValueError:
    """Return the error for a value where a section is expected."""
    got = "null" if value is None else repr(value)
    return ValueError(
        f"{kind.prefix[:-1]}: expected a section ({', '.join(kind.hints)}), got {got}"
    )
