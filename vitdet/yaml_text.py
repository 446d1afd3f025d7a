"""YAML of users."""

from __future__ import annotations

import yaml


def parse_yaml(text: str) -> object:
    """The plain data in a YAML text. Raises ValueError, in one line, for all that is none."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("not readable as YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date, !!int abc and the like
        raise ValueError(f"not readable as YAML: {' '.join(str(error).split())}") from error
