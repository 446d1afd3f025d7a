"""Reader of the format "CVAT for images": annotations.xml, with images in images/ or next to it.

https://docs.cvat.ai/docs/dataset_management/formats/xml_format/: <image name width height> contains
<box label xtl ytl xbr ybr>, with an optional `rotation` in degrees about its center; <polygon
label points="x,y;x,y;...">; and <mask label rle left top width height>, whose rle lists row-major
run lengths in the rectangle. Pixel coordinates are 0-based. The attribute `subset` of an image is
its split; the image may be in images/SUBSET/ or SUBSET/. The frames of a video are stored as PNG
files, but their names lack ".PNG". Other elements (polyline, points, ellipse, cuboid, skeleton,
tag) are counted and ignored. Files of "CVAT for video" are rejected.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    BROKEN,
    THIN,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    Size,
    Unusable,
    find_image,
    object_from_box,
    object_from_mask,
    object_from_outline,
    pixels_of,
    split_of,
)
from vitdet.datasets.importers.xml_file import has_root, read_xml

LARGEST = 1 << 30  # maximum size of an XML file in bytes; one file describes all images of a task
SHAPES = ("box", "polygon", "mask")


def annotation_files(source: Path) -> list[Path]:
    """Return the annotation files in a folder, or `source` if it is an annotation file."""
    paths = [source] if source.is_file() else sorted(source.glob("*.xml"))
    return [path for path in paths if path.suffix == ".xml" and has_root(path, "annotations")]


def read_cvat(dataset: ImportedDataset) -> None:
    """Read a folder or file. Classes: the labels in <meta>, then other labels alphabetically."""
    splits: dict[str, list[tuple[Path, Element]]] = defaultdict(list)
    names: dict[str, None] = {}
    for path in annotation_files(dataset.source):
        with dataset.problems.collect(BROKEN):
            root = read_xml(path, LARGEST)
            if root.find("track") is not None:
                raise ValueError(f"{path}: contains tracks; export the task as 'CVAT for images'")
            for label in root.iterfind("meta//label"):
                names[label.findtext("name") or ""] = None
            for element in root.findall("image"):
                splits[split_of(element.get("subset") or "train")].append((path, element))
    dataset.problems.raise_if_any(dataset.source)
    items: dict[str, list[tuple[Path, Element, Path]]] = {}
    folders: set[Path] = set()
    for split, pairs in dataset.select(splits).items():
        items[split] = []
        for path, element in pairs:
            with dataset.problems.collect("missing image file"):
                name, parents = element.get("name") or "", _folders(path, element)
                frames = [parent / f"{name}.PNG" for parent in parents if not Path(name).suffix]
                if any(frame.is_file() for frame in frames):
                    name += ".PNG"  # a frame of a video
                folder, image = find_image(path, parents, name)
                folders.add(folder)
                items[split].append((path, element, image))
            for shape in element:
                dataset.notes[f"elements <{shape.tag}> skipped"] += shape.tag not in SHAPES
    shapes = [shape for pairs in splits.values() for _, element in pairs for shape in element]
    used = {shape.get("label") or "" for shape in shapes if shape.tag in SHAPES}
    dataset.define([*filter(None, [*names, *sorted(used - names.keys())])], items, _read_image)
    dataset.count_unnamed(folders, [image for listed in items.values() for _, _, image in listed])


def _folders(path: Path, element: Element) -> list[Path]:
    """Return the folders that may contain an image."""
    subset = element.get("subset") or "default"
    below = (f"images/{subset}", "images", subset, "")
    return [folder for name in below if (folder := path.parent / name).is_dir()]


def _read_image(
    item: tuple[Path, Element, Path], label_of: Mapping[str, int], dataset: ImportedDataset
) -> ImportedImage:
    path, element, image = item
    where = f"{path}: image {show(element.get('name'))}"
    size = dataset.check_size(where, image, (element.get("height"), element.get("width")))
    objects: list[ImportedObject] = []
    for shape in (child for child in element if child.tag in SHAPES):
        with dataset.problems.collect("shape that cannot be used"):
            label = label_of.get(shape.get("label") or "")
            if label is None:
                raise Unusable("shape without a label", f"{where}: a {shape.tag} without a label")
            objects += _shape(f"{where}: {shape.tag}", shape, label, size, dataset)
    return ImportedImage(image, *size, tuple(objects))


def _shape(
    where: str, shape: Element, label: int, size: Size, dataset: ImportedDataset
) -> tuple[ImportedObject, ...]:
    if shape.tag == "mask":
        return dataset.keep(_mask(where, shape, label, size))
    if shape.tag == "polygon":
        words = re.split("[,;]", shape.get("points", ""))
        if len(words) < 6 or len(words) % 2:
            dataset.notes[THIN] += 1
            return ()
        return dataset.keep(object_from_outline(label, [pixels_of(where, words, size)], size))
    sides = [shape.get(side) for side in ("xtl", "ytl", "xbr", "ybr")]
    x0, y0, x1, y1 = pixels_of(where, sides, size)
    (angle,) = pixels_of(where, [shape.get("rotation", "0")], (360, 360))
    if angle:
        dataset.notes["rotated boxes replaced by their axis-aligned bounding boxes"] += 1
        cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
        wide, high = (x1 - x0) * cos + (y1 - y0) * sin, (x1 - x0) * sin + (y1 - y0) * cos
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        x0, y0, x1, y1 = x - wide / 2, y - high / 2, x + wide / 2, y + high / 2
    return dataset.keep(object_from_box(label, (x0, y0, x1, y1), size))


def _mask(where: str, shape: Element, label: int, size: Size) -> ImportedObject | None:
    kind = "mask with invalid run lengths"
    try:
        sides = [int(shape.get(key, "")) for key in ("left", "top", "width", "height")]
        runs = [int(run) for run in shape.get("rle", "").split(",")]
    except ValueError:
        expected = "expected whole numbers in left, top, width, height and rle"
        raise Unusable(kind, f"{where}: {expected}") from None
    left, top, width, height = sides
    fits = 0 <= left <= left + width <= size[1] and 0 <= top <= top + height <= size[0]
    if not fits or min(runs) < 0 or sum(runs) != width * height:
        rectangle = f"{width} x {height} pixels at {left}, {top}"
        image = f"an image of {size[1]} x {size[0]}"
        text = f"run lengths that sum to {sum(runs)} do not fit {rectangle} in {image}"
        raise Unusable(kind, f"{where}: {text}")
    pixels = np.zeros(size, bool)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    pixels[top : top + height, left : left + width] = inside
    return object_from_mask(label, pixels)
