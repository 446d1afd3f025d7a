"""Read and check the inputs of an evaluation: an annotation file, and COCO results.

Results are a list of {image_id, category_id, score, bbox: [x, y, width, height] and/or
segmentation: RLE or polygons}. Errors in the files are reported in one line.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from vitdet.data.annotation_file import Annotation, annotations_of, convert_annotation, parse
from vitdet.data.coco import read_tree, validate_tree
from vitdet.data.segmentation import read_outline, show, whole_number

# kind of comparison -> result key that is compared
KINDS = {"bbox": "bbox", "segm": "segmentation"}
WHOLE = {"id", "height", "width"}  # keys of images and categories whose values are whole numbers
BBOX = "4 finite numbers x, y, width, height"


@dataclass(frozen=True)
class Truth:
    """An annotation file: images and categories by id, in ascending order, and the objects.

    `objects` may include objects of unknown images or categories, which are not evaluated.
    """

    path: Path
    images: dict[int, dict]
    categories: dict[int, dict]
    # decoded from JSON in each pass: as Python objects, the annotations of LVIS would take 3 GB
    objects: Iterable[Annotation]

    def sides(self, image_id: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        image = self.images[image_id]
        return image["height"], image["width"]


def read_truth(path: Path | str, lvis: bool = False) -> Truth:
    """Read an annotation file in the format of COCO or LVIS.

    Raises FileNotFoundError, and ValueError with a one-line message if the file is invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    tree = read_tree(path)
    validate_tree(path, tree, lvis)
    return truth_of(path, tree)


def truth_of(path: Path | str, tree: dict) -> Truth:
    """Return the content of an annotation file that `validate_tree` has accepted."""
    images, categories = (_by_id(tree[key]) for key in ("images", "categories"))
    return Truth(Path(path), images, categories, _Objects(tree["annotations"]))


def _by_id(table: Iterable[dict]) -> dict[int, dict]:
    """Return the entries by id in ascending order; ids and image sizes are converted to int."""
    items: Iterable[dict[str, Any]] = (
        {key: whole_number(value) if key in WHOLE else value for key, value in item.items()}
        for item in table
    )
    return {item["id"]: item for item in sorted(items, key=lambda item: item["id"])}


@dataclass(frozen=True)
class _Objects(Iterable[Annotation]):
    """The annotations of a validated table, converted to `Annotation` in each iteration."""

    table: Iterable[object]

    def __iter__(self) -> Iterator[Annotation]:
        for item in annotations_of(self.table):
            if not isinstance(item, Annotation):
                item, *_ = convert_annotation(cast("dict", item))
            if item is not None:
                yield item


def read_results(path: Path | str) -> list[dict]:
    """Return the content of a results file.

    Raises FileNotFoundError, and ValueError if the file is not a JSON list of at least one result.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such results file")
    try:
        with uncollected():
            results = parse(path.read_bytes())
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(
            f"{path}: not readable as JSON ({error}); write or download the file again"
        ) from error
    if not isinstance(results, list):
        raise ValueError(f"{path}: expected a list of results, got {type(results).__name__}")
    if not results:
        raise ValueError(f"{path}: the list of results is empty; there is nothing to evaluate")
    return results


@contextmanager
def uncollected() -> Iterator[None]:
    """Suspend garbage collection, which would take a quarter of the run time with 500,000 dicts."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def kinds_of(results: Sequence[dict]) -> list[str]:
    """Return the kinds to compare, "bbox" and/or "segm", according to the first result's keys.

    Raises ValueError if the first result has neither a box nor a mask.
    """
    first = results[0]
    kinds = [kind for kind, key in KINDS.items() if isinstance(first, dict) and key in first]
    if not kinds:
        raise ValueError("result 1: expected a bbox and/or a segmentation")
    return kinds


def check_results(truth: Truth, results: Sequence[dict], kinds: Iterable[str]) -> None:
    """Raise ValueError with a one-line message if a result cannot be compared."""
    for number, item in enumerate(results, start=1):
        if not isinstance(item, dict):
            raise ValueError(f"result {number}: expected a JSON object, got {type(item).__name__}")
    for key in ("image_id", "category_id", "score", *(KINDS[kind] for kind in kinds)):
        for number, item in enumerate(results, start=1):
            if key not in item:
                raise ValueError(f"result {number}: {key} is missing")
    for key, name, names, known in (
        ("image_id", "image", "images", truth.images),
        ("category_id", "category", "categories", truth.categories),
    ):
        try:
            unknown = sorted({item[key] for item in results} - known.keys(), key=str)
        except TypeError as error:
            raise ValueError(f"{key}: expected a number for each result ({error})") from error
        if unknown:
            raise ValueError(
                f"{truth.path}: contains no {name} {show(unknown[0])}, for which there are results "
                f"(unknown {names}: {len(unknown)}); expected results for the same data set"
            )
    boxes = [("bbox", (4,), BBOX)] if "bbox" in kinds else []
    for key, shape, expected in [("score", (), "a finite number"), *boxes]:
        values = [item[key] for item in results]
        if not values or _finite(values, (len(values), *shape)):
            continue
        for number, value in enumerate(values, start=1):
            if not _finite(value, shape):
                raise ValueError(f"result {number}: {key} must be {expected}, got {show(value)}")


def _finite(values: object, shape: tuple[int, ...]) -> bool:
    """Return whether the values form an array of finite numbers with this shape."""
    try:
        array = np.array(values)
    except ValueError:  # the values have different lengths
        return False
    return array.shape == shape and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def check_code(item: dict, size: tuple[int, int]) -> list | dict:
    """Return the outline of a result: an RLE, or the polygons that have at least 3 points.

    size: (height, width) of the image. Raises ValueError for a segmentation that is not a valid
    mask in an image of this size.
    """
    outline = read_outline(item["segmentation"], size)
    # the position in the file is unknown, because results that are not compared were removed
    name = f"result for image {item['image_id']}, category {item['category_id']}"
    if outline.problem:
        raise ValueError(f"{name}: invalid segmentation ({': '.join(outline.problem)})")
    if outline.shape is None:
        shown = show(item["segmentation"])
        raise ValueError(f"{name}: expected an RLE or polygons of at least 3 points, got {shown}")
    return outline.shape
