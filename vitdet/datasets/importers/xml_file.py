"""Reading untrusted XML files of annotations."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers.expat import ExpatError, ParserCreate

from vitdet.datasets.importers.dataset import BROKEN, Unusable


def read_xml(path: Path, largest: int) -> Element:
    """Return the root of a file of at most `largest` bytes. Raises Unusable.

    A DOCTYPE is rejected: it could define entities that expand to huge strings.
    """

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE, which is not allowed")

    size = path.stat().st_size
    if size > largest:
        text = f"{path}: {size:,} bytes are too many for the annotations of one image"
        raise Unusable(BROKEN, text)
    builder, parser = TreeBuilder(), ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except (ExpatError, LookupError, ValueError) as error:
        raise Unusable(BROKEN, f"{path}: invalid XML: {error}") from error
    return builder.close()


def has_root(path: Path, name: str) -> bool:
    """Return whether the root element of a file has this name, from its first bytes."""
    return re.search(rf"<{name}[\s>]".encode(), start_of(path)) is not None


def start_of(path: Path) -> bytes:
    """Return the first bytes of a file, up to its root element."""
    with open(path, "rb") as file:
        return file.read(4096)
