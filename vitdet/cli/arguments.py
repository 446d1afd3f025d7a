"""Functions that add subcommands and path arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

CHECKPOINT = (
    "checkpoint of a detector, or output folder of a training run (best.pt with train.keep_best, "
    "otherwise model.pt)"
)


def add_kind(kinds: Any, name: str, help: str, text: str = "") -> argparse.ArgumentParser:
    """Add a command or subcommand. text: its description (default: the help text)."""
    return kinds.add_parser(name, help=help, description=text or f"{help[0].upper()}{help[1:]}.")


def add_file(verb: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add an argument or option whose value is the path of a file."""
    verb.add_argument(name, type=given_path, metavar="FILE", help=help)


def add_folder(verb: argparse.ArgumentParser, name: str, help: str) -> None:
    """Add an argument or option whose value is the path of a folder."""
    verb.add_argument(name, type=given_path, metavar="DIR", help=help)


def given_path(text: str) -> Path:
    """Return a path given on the command line. Raises FileNotFoundError for a blank string.

    pathlib treats "" as the current folder, but "" is usually caused by an unset shell variable.
    """
    if not text.strip():
        raise FileNotFoundError(
            f"empty path on the command line: {text!r}; expected a file or folder (`.` is "
            "the current folder)"
        )
    return Path(text)
