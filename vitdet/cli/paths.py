"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path

# what `vitdet evaluate` and `vitdet register` take
CHECKPOINT = (
    "checkpoint of a detector, or output folder of a training (its best.pt, or else its model.pt)"
)


def given_path(text: str) -> Path:
    """The type of an argument that is a file or folder. Raises FileNotFoundError for an empty text.

    pathlib takes it for the current folder, but it comes from a variable of a shell that is not set.
    """
    if not text.strip():
        raise FileNotFoundError(
            f"a path on the command line is empty, got {text!r}; expected a file or folder (`.` is the current folder)"
        )
    return Path(text)
