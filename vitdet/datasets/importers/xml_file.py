"""Reading of untrusted XML files."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers.expat import ExpatError, ParserCreate

from vitdet.datasets.importers.dataset import BROKEN, Unusable


def read_xml(path: Path, largest: int) -> Element:
    """Return the root element of a file. Raises Unusable if invalid or larger than `largest` bytes.

    A DOCTYPE is rejected, since it could define entities that expand to huge strings.
    """

    def refuse(*_: object) -> None:
        raise ValueError("a DOCTYPE is not allowed")

    size = path.stat().st_size
    if size > largest:
        raise Unusable(BROKEN, f"{path}: {size:,} bytes, expected at most {largest:,}")
    builder, parser = TreeBuilder(), ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except (ExpatError, LookupError, ValueError) as error:
        raise Unusable(BROKEN, f"{path}: invalid XML: {error}") from error
    return builder.close()


def has_root(path: Path, name: str) -> bool:
    """Return whether a file's root element has this name; reads only the first 4096 bytes."""
    return re.search(rf"<{name}[\s>]".encode(), start_of(path)) is not None


def start_of(path: Path) -> bytes:
    """Return the first 4096 bytes of a file, which usually include the root element's tag."""
    with open(path, "rb") as file:
        return file.read(4096)
