"""Arguments that are paths."""

from __future__ import annotations

import argparse
from pathlib import Path

# what `vitdet evaluate` and `vitdet register` take
CHECKPOINT = (
    "checkpoint of a detector, or output folder of a training run (its best.pt, or else its "
    "model.pt)"
)


def add_file(verb: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add an argument or option that is the path of a file."""
    verb.add_argument(name, type=given_path, metavar="FILE", help=help)


def add_folder(verb: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add an argument or option that is the path of a folder."""
    verb.add_argument(name, type=given_path, metavar="DIR", help=help)


def given_path(text: str) -> Path:
    """Return a path on the command line. Raises FileNotFoundError for an empty string.

    pathlib treats "" as the current folder, but "" usually comes from an unset shell variable.
    """
    if not text.strip():
        raise FileNotFoundError(
            f"empty path on the command line: {text!r}; expected a file or folder (`.` is "
            "the current folder)"
        )
    return Path(text)
