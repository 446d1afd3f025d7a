"""Reader of LabelMe's format: a JSON file per image, with a relative `imagePath` and `shapes`.

https://github.com/wkentaro/labelme/blob/main/labelme/label_file.py: a shape has a label, a
shape_type, and points in pixel coordinates of the upright image. A polygon is an outline; polygons
with the same label and group_id are one object, as in LabelMe's
examples/instance_segmentation/labelme2coco.py. A rectangle has two opposite corners. Shapes of
other types are counted and ignored. The folders train/, valid/ and test/ are splits.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from vitdet.data.header import is_text
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    BROKEN,
    THIN,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    Unusable,
    files_below,
    find_image,
    object_from_box,
    object_from_outline,
    pixels_of,
    split_of,
)

MOST = 20  # maximum number of JSON files that are read to detect the format
LARGEST = 1 << 28  # maximum size in bytes of a JSON file that is read to detect the format


class Shape(msgspec.Struct):
    """An entry of `shapes`."""

    label: str
    points: list[tuple[float, float]]  # x and y
    shape_type: str | None = None  # missing in old files, where every shape is a polygon
    group_id: int | None = None


class LabelFile(msgspec.Struct):
    """The fields of a LabelMe file that are read; imageData, the image in base64, is not read."""

    shapes: list[msgspec.Raw]
    imagePath: str = ""  # noqa: N815
    imageHeight: int | None = None  # noqa: N815
    imageWidth: int | None = None  # noqa: N815


Item = tuple[Path, Path, LabelFile, list[Shape]]  # JSON file, image, content and shapes


def is_labelme(source: Path) -> bool:
    """Return whether a folder contains JSON files with `shapes`."""
    return source.is_dir() and any(map(_has_shapes, islice(source.rglob("[!.]*.json"), MOST)))


def _has_shapes(path: Path) -> bool:
    try:
        return path.stat().st_size <= LARGEST and _decode(path) is not None
    except (ValueError, OSError):
        return False


def read_labelme(dataset: ImportedDataset) -> None:
    """Read a folder in LabelMe's format; classes are in alphabetical order."""
    source, splits = dataset.source, defaultdict[str, list[Path]](list)
    for path in files_below(source, suffix=".json"):
        splits[split_of(path.relative_to(source).parts[0], "train")].append(path)
    items: dict[str, list[Item]] = {}
    for split, paths in dataset.select(splits).items():
        items[split] = []
        for path in paths:
            with dataset.problems.collect(BROKEN):
                content = _decode(path)
                if content is None:
                    dataset.notes["JSON files without shapes ignored"] += 1
                    continue
                image = _image(source, path, content.imagePath)
                items[split].append((path, image, content, _shapes(path, content, dataset)))
    names = {shape.label for listed in items.values() for *_, shapes in listed for shape in shapes}
    dataset.define(sorted(names), items, _read_image)
    images, others = dataset.images_below(source)
    used = {image for listed in items.values() for _, image, *_ in listed}
    dataset.notes["images without a JSON file skipped"] += len({*images} - used)
    dataset.count_left_out(others, lambda path: path.with_suffix(".json").is_file())


def _decode(path: Path) -> LabelFile | None:
    """Return the content of a JSON file; None if it is not a LabelMe file."""
    content = path.read_bytes().removeprefix(BOM_UTF8)
    try:
        return msgspec.json.decode(content, type=LabelFile)
    except (ValueError, RecursionError) as error:
        try:
            other: Any = msgspec.json.decode(content)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: invalid JSON: {error}") from error
        if isinstance(other, dict) and "shapes" in other:
            raise ValueError(f"{path}: {error}") from error
        return None


def _image(source: Path, path: Path, name: str) -> Path:
    """Return the image at imagePath; if missing or outside `source`, the one next to `path`."""
    slashed = name.replace("\\", "/")
    image = path.parent / slashed
    if slashed and image.is_file() and image.resolve().is_relative_to(source.resolve()):
        return image if ".." not in image.parts else image.resolve()
    return find_image(path, [path.parent], slashed.rpartition("/")[2])[1]


def _shapes(path: Path, content: LabelFile, dataset: ImportedDataset) -> list[Shape]:
    shapes = []
    for number, marked in enumerate(content.shapes, 1):
        with dataset.problems.collect("shape that cannot be used"):
            try:
                shape = msgspec.json.decode(marked, type=Shape)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: shape {number}: {error}") from error
            if not shape.label or not is_text(shape.label):
                text = f"{path}: shape {number}: expected a label, got {show(shape.label)}"
                raise ValueError(text)
            if shape.shape_type in ("polygon", "rectangle", None):
                shapes.append(shape)
            else:
                dataset.notes[f"shapes of type {show(shape.shape_type)} skipped"] += 1
    return shapes


def _read_image(item: Item, label_of: Mapping[str, int], dataset: ImportedDataset) -> ImportedImage:
    path, image, content, shapes = item
    size = dataset.check_size(path, image, (content.imageHeight, content.imageWidth))
    objects: list[ImportedObject] = []
    # (label, group id, 0) or, without a group id, (label, None, shape number) -> outlines
    outlines: dict[tuple[str, int | None, int], list[list[float]]] = defaultdict(list)
    for number, shape in enumerate(shapes, 1):
        where = f"{path}: shape {number}"
        with dataset.problems.collect("shape that cannot be used"):
            points = pixels_of(where, [value for point in shape.points for value in point], size)
            if shape.shape_type == "rectangle":
                if len(points) < 4:
                    text = f"{where}: expected two corners, got {show(points)}"
                    raise Unusable("rectangle without two corners", text)
                x, y = points[0::2], points[1::2]
                corners = (min(x), min(y), max(x), max(y))
                objects += dataset.keep(object_from_box(label_of[shape.label], corners, size))
            elif len(points) < 6:
                dataset.notes[THIN] += 1
            else:
                single = shape.group_id is None
                outlines[shape.label, shape.group_id, number if single else 0].append(points)
    for (label, _, _), parts in outlines.items():
        objects += dataset.keep(object_from_outline(label_of[label], parts, size))
    return ImportedImage(image, *size, tuple(objects))
