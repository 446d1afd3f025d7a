"""An annotation file whose tables are decoded one entry at a time.

As Python objects the annotations of LVIS's training split take 15 GB. Here the file is mapped into memory, msgspec
marks where each entry begins and ends, and an entry is an object for as long as it is looked at.
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

GZIP = b"\x1f\x8b"  # how its files begin
UNKNOWN = -(2**63)  # in place of an id that is not a number: no image and no category has it


class Annotation(msgspec.Struct, gc=False):
    """An object of the file. `bbox` is left, top, width, height in pixels; `segmentation` is as it stands in the file."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Any = None
    area: float | None = None  # None: not stated
    iscrowd: int | None = None  # None: not stated


class PolygonAnnotation(Annotation, gc=False):
    """An object with polygons, whose coordinates are numbers."""

    segmentation: list[list[float]] = []


ANY = msgspec.json.Decoder(Annotation)
POLYGONS = msgspec.json.Decoder(PolygonAnnotation)


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

    def annotations(self, start: int = 0, stop: int | None = None) -> Iterator[object]:
        """The entries start..stop-1, each as an `Annotation` if its values have these types, else as `__iter__` returns it."""
        decode = ANY.decode
        for marked in self._marked[start:stop]:
            try:
                yield decode(marked)
            except (ValueError, RecursionError):
                yield _decode(marked)

    def outlined(self, start: int, stop: int) -> Iterator[object]:
        """As `annotations`, but objects with polygons as `PolygonAnnotation`."""
        decode = POLYGONS.decode
        for place, marked in enumerate(self._marked[start:stop], start):
            try:
                yield decode(marked)
            except (ValueError, RecursionError):
                yield from self.annotations(place, place + 1)


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


def annotations_of(table: Iterable[object]) -> Iterator[object]:
    """Each entry of a table as an `Annotation` if its values have these types, else as it is."""
    if isinstance(table, Entries):
        yield from table.annotations()
        return
    for item in table:
        try:
            yield msgspec.convert(item, Annotation)
        except (ValueError, RecursionError):
            yield item


def loosely(item: dict) -> tuple[Annotation | None, list[tuple[str, str]], str]:
    """An entry whose values have other types: the annotation, None if it has an error; the errors (kind, text); and the
    values that were converted, such as 96.0 or "96" for a whole number ("": none). pycocotools and Detectron2 take these.
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
    """Whether it is a list of four finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    try:
        return {int, float}.issuperset(map(type, value)) and math.isfinite(sum(value))
    except OverflowError:  # beyond any float
        return False
