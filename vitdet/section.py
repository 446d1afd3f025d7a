"""The base class of the sections of a config."""

from dataclasses import is_dataclass
from typing import Any, get_type_hints

from vitdet.ranges import check


def operational(reason: str) -> dict[str, str]:
    """Metadata of what does not affect the trained weights, and why: a training can resume with
    another value, and the names of run and checkpoint folders do not depend on it.
    """
    return {"operational": reason}


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
