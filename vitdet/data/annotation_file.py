"""Annotation files whose tables are decoded entry by entry.

As Python objects, the annotations of LVIS's training split would occupy 15 GB. The file is
therefore memory-mapped, msgspec locates the entries, and each entry is decoded on access.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from vitdet.data.segmentation import Box, show, whole_number

GZIP = b"\x1f\x8b"  # magic number of gzip
UNKNOWN = -(2**63)  # replaces an id that is not a whole number


class Annotation(msgspec.Struct, gc=False):
    """Annotation as stored in the file; `bbox` is (left, top, width, height) in pixels."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: list[list[int | float]] | dict | None = None
    area: float | None = None  # None: not stated
    iscrowd: int | None = None  # None: not stated


_decode_annotation = msgspec.json.Decoder(Annotation).decode
_convert = partial(msgspec.convert, type=Annotation)


class _Layout(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


@dataclass(frozen=True)
class InvalidEntry:
    """Placeholder for an entry that is not valid JSON."""

    reason: str


class Entries:
    """Table of an annotation file; each iteration decodes the entries again."""

    def __init__(self, encoded: list[msgspec.Raw]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __iter__(self) -> Iterator[object]:
        return map(_decode, self.encoded)


def annotations_of(table: Iterable[object], rows: Iterable[int] | None = None) -> Iterator[Any]:
    """Yield each entry as `Annotation`; if it does not match, as decoded JSON or `InvalidEntry`.

    rows: indices of the entries (default: all); requires a table that is a list or `Entries`.
    """
    items: Any = table
    convert: Callable[[Any], object] = _convert
    otherwise: Callable[[Any], object] = _unchanged
    if isinstance(table, Entries):
        items, convert, otherwise = table.encoded, _decode_annotation, _decode
    for item in items if rows is None else map(items.__getitem__, rows):
        try:
            found = convert(item)
        except (ValueError, RecursionError):
            found = otherwise(item)
        yield found


def _unchanged(item: object) -> object:
    return item


def read_entries(path: Path, mapped: bool = True) -> object:
    """Read a JSON file; COCO's tables (images, annotations, categories) become `Entries`.

    A file with NaN or another layout is read by `parse`. If `mapped`, memory-maps the file, which
    must not change while the entries are used. Raises OSError, and ValueError for invalid JSON.
    """
    with open(path, "rb") as file:
        if mapped and os.fstat(file.fileno()).st_size:
            content: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            content = file.read()
    if content[:2] == GZIP:
        raise ValueError("the file is compressed with gzip; decompress it")
    try:
        found = msgspec.json.decode(content, type=_Layout)
    except (ValueError, RecursionError):  # e.g. NaN or another layout
        return parse(bytes(content))
    return {table: Entries(getattr(found, table)) for table in _Layout.__struct_fields__}


def parse(content: bytes) -> object:
    """Decode JSON in UTF-8, UTF-16 or UTF-32. Raises ValueError for invalid JSON."""
    if not content:
        raise ValueError("the file is empty")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _decode(encoded: Any) -> object:
    try:
        return msgspec.json.decode(encoded)
    except (ValueError, RecursionError):  # e.g. a number too large for a float, or a lone surrogate
        try:
            return parse(bytes(encoded))
        except ValueError as error:
            return InvalidEntry(str(error))


def convert_annotation(item: dict) -> tuple[Annotation | None, list[tuple[str, str]], str]:
    """Convert an entry whose values do not have the types declared in `Annotation`.

    Returns:
        The annotation, or None after an error; the errors as (kind, text); and a text that lists
        values converted to int, such as 96.0 or "96", which pycocotools and Detectron2 accept.
    """
    ids = {key: whole_number(item.get(key)) for key in ("id", "image_id", "category_id")}
    errors = [(f"annotation without {key!r}", "") for key in ids if key not in item]
    crowd, area, box = item.get("iscrowd"), None, (0.0, 0.0, 0.0, 0.0)
    iscrowd = int(crowd) if isinstance(crowd, bool) else whole_number(crowd)
    if crowd is not None and iscrowd not in (0, 1):
        errors.append(("iscrowd that is neither 0 nor 1", show(crowd)))
        iscrowd = None
    try:
        area = msgspec.convert(item.get("area"), float | None)
    except ValueError:
        errors.append(("area that is not a number of pixels", show(item["area"])))
    try:
        box = msgspec.convert(item["bbox"], Box)
        if not math.isfinite(sum(box)):
            raise ValueError
    except KeyError:
        errors.append(("annotation without 'bbox'", ""))
    except ValueError:
        errors.append(("bbox that is not four finite numbers", show(item["bbox"])))
    converted = ", ".join(
        f"{key} {show(item[key])}"
        for key, number in (ids | {"iscrowd": iscrowd}).items()
        if number is not None and type(item[key]) not in (int, bool)
    )
    if errors:
        return None, errors, converted
    numbers = (UNKNOWN if number is None else number for number in ids.values())
    annotation_id, image_id, category_id = numbers
    outline = item.get("segmentation")
    found = Annotation(annotation_id, image_id, category_id, box, outline, area, iscrowd)
    return found, errors, converted
