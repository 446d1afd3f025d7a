"""An annotation file whose tables are decoded one entry at a time.

As Python objects the annotations of LVIS's training split take 15 GB. Here the file is mapped into memory, msgspec
marks where each entry begins and ends, and an entry is an object for as long as it is looked at.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec


class _Layout(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class Entries:
    """A table of the file: each pass over it decodes the entries anew."""

    def __init__(self, marked: list[msgspec.Raw]) -> None:
        self._marked = marked

    def __len__(self) -> int:
        return len(self._marked)

    def __iter__(self) -> Iterator[object]:
        return map(_decode, self._marked)


def read_entries(path: Path) -> object:
    """The content of a JSON file; of one in COCO's layout only the three tables, as `Entries`.

    Raises OSError, and ValueError or RecursionError for broken JSON.
    """
    with open(path, "rb") as file:
        try:
            found = msgspec.json.decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), type=_Layout)
        except (ValueError, RecursionError):  # json says better what is wrong, and takes NaN
            return json.loads(file.read())
    return {table: Entries(getattr(found, table)) for table in _Layout.__struct_fields__}


def _decode(marked: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(marked)
    except (ValueError, RecursionError):  # as above: a number beyond floats, half a surrogate pair
        return json.loads(bytes(marked))
