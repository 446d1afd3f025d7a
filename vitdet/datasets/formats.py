"""Data set formats that can be converted, and detection of a data set's format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vitdet.data.annotation_file import read_entries
from vitdet.data.segmentation import show
from vitdet.datasets.importers import coco, cvat, labelme, voc, yolo
from vitdet.datasets.importers.dataset import ImportedDataset, image_suffixes
from vitdet.datasets.importers.xml_file import start_of

SHOWN = 6  # maximum number of folder entries listed in a message


class Format(NamedTuple):
    """A data set format."""

    expected: str  # description of the expected files, for messages
    matches: Callable[[Path], object]  # whether a folder or file has this format
    read: Callable[[ImportedDataset], None]


FORMATS = {
    "yolo": Format("data.yaml", yolo.description, yolo.read_yolo),
    "voc": Format("Annotations/*.xml, or XML files next to the images", voc.is_voc, voc.read_voc),
    "coco": Format(
        "a JSON file with images, annotations, categories", coco.is_coco, coco.read_coco_folder
    ),
    "labelme": Format("JSON files with shapes", labelme.is_labelme, labelme.read_labelme),
    "cvat": Format("annotations.xml of CVAT for images", cvat.annotation_files, cvat.read_cvat),
}


def detect(source: Path) -> str:
    """Return the format of a folder or file. Raises ValueError unless exactly one matches."""
    kinds = [name for name, kind in FORMATS.items() if kind.matches(source)]
    if len(kinds) > 1:
        raise ValueError(f"{source}: could be {' or '.join(kinds)}; choose one with --format")
    if not kinds:
        expected = "; ".join(f"{name}: {kind.expected}" for name, kind in FORMATS.items())
        raise ValueError(
            f"{source}: matches none of {', '.join(FORMATS)}; found {_contents(source)}; "
            f"expected {expected}"
        )
    return kinds[0]


def _contents(source: Path) -> str:
    """Describe a file, or the entries of a folder."""
    if source.is_file():
        return _describe(source)
    entries = sorted(
        (path for path in source.iterdir() if path.name[0] != "."),
        key=lambda path: (path.suffix.lower() in image_suffixes(), path.name),
    )
    shown = [_describe(entry) for entry in entries[:SHOWN]]
    more = [f"{len(entries) - SHOWN:,} more"] if len(entries) > SHOWN else []
    return ", ".join(shown + more) or "nothing"


def _describe(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.is_dir():
        names = (name for _, _, names in os.walk(path) for name in names)
        kinds = Counter(Path(name).suffix.lower() or "without an extension" for name in names)
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds.most_common(3))
        return f"{path.name}/ ({counts or 'empty'})"
    if suffix == ".json":
        try:
            content = read_entries(path)
        except (OSError, ValueError):
            return f"{path.name} (invalid JSON)"
        inside = f"keys {show(list(content))}" if isinstance(content, dict) else "a list"
        return f"{path.name} (JSON, {inside})"
    if suffix == ".xml":
        return f"{path.name} (XML, {show(start_of(path).decode(errors='replace').strip())})"
    if suffix in (".zip", ".gz", ".tar", ".7z", ".rar"):
        return f"{path.name} (an archive; extract it)"
    return f"{path.name} (image)" if suffix in image_suffixes() else path.name
