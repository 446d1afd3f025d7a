"""Annotation files whose tables are decoded entry by entry.

As Python objects, the annotations of LVIS's training split take 15 GB. Therefore the file is
memory-mapped, msgspec locates the entries, and each is decoded on access.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vitdet.data.segmentation import show, whole_number

GZIP = b"\x1f\x8b"  # magic number
UNKNOWN = -(2**63)  # replaces an id that is not a number; never a valid id


class Annotation(msgspec.Struct, gc=False):
    """An annotation. `bbox`: left, top, width, height in pixels; `segmentation`: as in the file."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Any = None
    area: float | None = None  # None: not stated
    iscrowd: int | None = None  # None: not stated


class PolygonAnnotation(Annotation, gc=False):
    """An annotation whose segmentation is a list of polygons."""

    segmentation: list[list[float]] = []


ANY = msgspec.json.Decoder(Annotation)
POLYGONS = msgspec.json.Decoder(PolygonAnnotation)


class _Layout(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


@dataclass(frozen=True)
class InvalidEntry:
    """Replaces an entry that is not valid JSON."""

    reason: str


class Entries:
    """A table of the file; each iteration decodes the entries again."""

    def __init__(self, marked: list[msgspec.Raw]) -> None:
        self._marked = marked

    def __len__(self) -> int:
        return len(self._marked)

    def __iter__(self) -> Iterator[object]:
        return map(_decode, self._marked)

    def annotations(self, start: int = 0, stop: int | None = None) -> Iterator[object]:
        """Yield entries start..stop-1 as `Annotation` if their values have its types, else as
        dict.
        """
        decode = ANY.decode
        for marked in self._marked[start:stop]:
            try:
                yield decode(marked)
            except (ValueError, RecursionError):
                yield _decode(marked)

    def polygon_annotations(self, start: int, stop: int) -> Iterator[object]:
        """Yield entries as `annotations`, but those with polygons as `PolygonAnnotation`."""
        decode = POLYGONS.decode
        for place, marked in enumerate(self._marked[start:stop], start):
            try:
                yield decode(marked)
            except (ValueError, RecursionError):
                yield from self.annotations(place, place + 1)


def read_entries(path: Path, mapped: bool = True) -> object:
    """Read a JSON file; of a file in COCO's layout, return the three tables as `Entries`.

    mapped: memory-map the file, which must not change while the entries are used. Of duplicate keys
    the last one counts, as in Python's json. Raises OSError, and ValueError for invalid JSON.
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
        raise ValueError("the file is compressed with gzip; decompress it")
    try:
        found = msgspec.json.decode(content, type=_Layout)
    except (ValueError, RecursionError):  # json has better error messages and accepts NaN
        return parse(bytes(content))
    return {table: Entries(getattr(found, table)) for table in _Layout.__struct_fields__}


def parse(content: bytes) -> object:
    """Decode JSON in UTF-8, 16 or 32. Raises ValueError with a one-line message."""
    if not content:
        raise ValueError("the file is empty")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _decode(marked: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(marked)
    except (ValueError, RecursionError):  # e.g. a number beyond floats, a lone surrogate
        try:
            return parse(bytes(marked))
        except ValueError as error:
            return InvalidEntry(str(error))


def annotations_of(table: Iterable[object]) -> Iterator[object]:
    """Yield each entry of a table as `Annotation` if its values have its types, else unchanged."""
    if isinstance(table, Entries):
        yield from table.annotations()
        return
    for item in table:
        try:
            yield msgspec.convert(item, Annotation)
        except (ValueError, RecursionError):
            yield item


def convert_annotation(item: dict) -> tuple[Annotation | None, list[tuple[str, str]], str]:
    """Convert an entry whose values have other types.

    Returns:
        The annotation, None after an error; the errors (kind, text); a text with the converted
        values, such as 96.0 or "96" for a whole number, which pycocotools and Detectron2 accept.
    """
    errors: list[tuple[str, str]] = []
    converted: list[str] = []
    values: dict[str, Any] = {}
    for key in ("id", "image_id", "category_id"):
        number = whole_number(item.get(key))
        values[key] = UNKNOWN if number is None else number
        if key not in item:
            errors.append((f"annotation without {key!r}", ""))
        elif number is not None and type(item[key]) is not int:
            converted.append(f"{key} {show(item[key])}")
    crowd = item.get("iscrowd")
    values["iscrowd"] = int(crowd) if isinstance(crowd, bool) else whole_number(crowd)
    if crowd is not None and values["iscrowd"] not in (0, 1):
        errors.append(("iscrowd that is neither 0 nor 1", show(crowd)))
    elif crowd is not None and type(crowd) not in (int, bool):
        converted.append(f"iscrowd {show(crowd)}")
    values["area"] = item.get("area")
    if values["area"] is not None and type(values["area"]) not in (int, float):
        errors.append(("area that is not a number of pixels", show(values["area"])))
    values["bbox"] = item.get("bbox")
    if "bbox" not in item:
        errors.append(("annotation without 'bbox'", ""))
    elif not is_box(values["bbox"]):
        errors.append(("bbox that is not four finite numbers", show(values["bbox"])))
    values["segmentation"] = item.get("segmentation")
    try:
        found = None if errors else msgspec.convert(values, Annotation)
    except (ValueError, RecursionError):
        found = None
    return found, errors, ", ".join(converted)


def is_box(value: object) -> bool:
    """Return whether a value is a list of four finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    try:
        return {int, float}.issuperset(map(type, value)) and math.isfinite(sum(value))
    except OverflowError:  # beyond any float
        return False
