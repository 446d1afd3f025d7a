"""An annotation file whose tables are decoded one entry at a time.

As Python objects the annotations of LVIS's training split take 15 GB. Here the file is mapped into memory, msgspec
marks where each entry begins and ends, and an entry is an object for as long as it is looked at.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

GZIP = b"\x1f\x8b"  # how its files begin


class _Layout(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


@dataclass(frozen=True)
class Broken:
    """In the place of an entry that is no JSON."""

    reason: str


class Entries:
    """A table of the file: each pass over it decodes the entries anew."""

    def __init__(self, marked: list[msgspec.Raw]) -> None:
        self._marked = marked

    def __len__(self) -> int:
        return len(self._marked)

    def __iter__(self) -> Iterator[object]:
        return map(_decode, self._marked)


def read_entries(path: Path, mapped: bool = True) -> object:
    """The content of a JSON file; of one in COCO's layout only the three tables, as `Entries`.

    mapped: the file is not to change for as long as the entries are used; else its bytes are read into memory. Of a
    key that comes twice the last counts, as everywhere in Python. Raises OSError, and ValueError in one line for what
    is no JSON.
    """
    if mapped:
        with open(path, "rb") as file:
            content = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if os.fstat(file.fileno()).st_size
                else b""
            )
    else:
        content = path.read_bytes()
    if content[:2] == GZIP:
        raise ValueError("the file is compressed by gzip; unpack it")
    try:
        found = msgspec.json.decode(content, type=_Layout)
    except (ValueError, RecursionError):  # json says better what is wrong, and takes NaN
        return parse(bytes(content))
    return {table: Entries(getattr(found, table)) for table in _Layout.__struct_fields__}


def parse(content: bytes) -> object:
    """The content of JSON in UTF-8, 16 or 32. Raises ValueError, in one line, for anything else."""
    if not content:
        raise ValueError("the file is empty")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _decode(marked: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(marked)
    except (ValueError, RecursionError):  # as above: a number beyond floats, half a surrogate pair
        try:
            return parse(bytes(marked))
        except ValueError as error:
            return Broken(str(error))
