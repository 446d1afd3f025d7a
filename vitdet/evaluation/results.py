"""The input of an evaluation: an annotation file and a file of results; errors in them are reported in one line.

Results are COCO's: a list of {image_id, category_id, score, bbox: [x, y, width, height] and/or segmentation: RLE}.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from vitdet.data.annotation_file import Annotation, annotations_of, loosely, parse
from vitdet.data.coco import read_tree, validate_tree
from vitdet.data.segmentation import read_outline, show, whole_number

# of comparisons, and the key of a result that each looks at
KINDS = {"bbox": "bbox", "segm": "segmentation"}
WHOLE = {"id", "height", "width"}  # keys of images and categories
BBOX = "4 finite numbers x, y, width, height"


@dataclass(frozen=True)
class Truth:
    """An annotation file: images and categories by id in the order of their ids, and the objects.

    Objects with unknown images or categories, which pycocotools passes over, may be among them.
    """

    path: Path
    images: dict[int, dict]
    categories: dict[int, dict]
    # from a file decoded anew in each pass: as objects those of LVIS would take 3 GB
    objects: Iterable[Annotation]

    def sides(self, image_id: int) -> tuple[int, int]:
        """Height and width of an image."""
        image = self.images[image_id]
        return image["height"], image["width"]


def read_truth(path: Path | str, lvis: bool = False) -> Truth:
    """An annotation file of COCO or LVIS.

    Raises FileNotFoundError without the file and ValueError, in one line, for what `vitdet data check` calls an error.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    tree = read_tree(path)
    validate_tree(path, tree, lvis)
    return truth_of(path, tree)


def truth_of(path: Path | str, tree: dict) -> Truth:
    """The content of the annotation file `path`, which was validated: `read_coco` and `read_truth` do."""
    images, categories = (_by_id(tree[key]) for key in ("images", "categories"))
    return Truth(Path(path), images, categories, _Objects(tree["annotations"]))


def _by_id(table: Iterable[dict]) -> dict[int, dict]:
    """The entries in the order of their ids, with ids and sides as whole numbers."""
    items: Iterable[dict[str, Any]] = (
        {key: whole_number(value) if key in WHOLE else value for key, value in item.items()}
        for item in table
    )
    return {item["id"]: item for item in sorted(items, key=lambda item: item["id"])}


class _Objects(Iterable[Annotation]):
    """The annotations of a validated table, decoded anew in each pass."""

    def __init__(self, table: Iterable[object]) -> None:
        self._table = table

    def __iter__(self) -> Iterator[Annotation]:
        for item in annotations_of(self._table):
            found = item if isinstance(item, Annotation) else loosely(cast("dict", item))[0]
            if found is not None:
                yield found


def read_results(path: Path | str) -> list[dict]:
    """A file of results. Raises FileNotFoundError, or ValueError for what is not a list of at least one result."""
    results = read_json(path, "results")
    if not isinstance(results, list):
        raise ValueError(f"{path}: expected a list of results, got a {type(results).__name__}")
    if not results:
        raise ValueError(f"{path}: the list of results is empty; there is nothing to score")
    return results


@contextmanager
def uncollected() -> Iterator[None]:
    """Suspend garbage collection, which repeatedly traverses half a million small dicts, a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def read_json(path: Path | str, what: str) -> object:
    """The content of a JSON file. Raises FileNotFoundError or ValueError with one line that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what} file")
    try:
        return parse(path.read_bytes())
    except ValueError as error:  # JSON, or not UTF-8
        raise ValueError(
            f"{path}: not readable as JSON ({error}); write or download the file again"
        ) from error


def kinds_of(results: Sequence[dict]) -> list[str]:
    """The comparisons that results allow: 'bbox' and/or 'segm', by the keys of the first one.

    Raises ValueError if it has neither.
    """
    first = results[0]
    kinds = [kind for kind, key in KINDS.items() if isinstance(first, dict) and key in first]
    if not kinds:
        raise ValueError("result 1: expected a bbox and/or a segmentation")
    return kinds


def check_results(
    truth: Truth, results: Sequence[dict], kinds: Iterable[str], image_ids: Collection[int]
) -> None:
    """Raises ValueError, in one line, for the first result that cannot be compared with the truth."""
    for number, item in enumerate(results, start=1):
        if not isinstance(item, dict):
            raise ValueError(f"result {number}: expected an object, got a {type(item).__name__}")
    for key in ("image_id", "category_id", "score", *(KINDS[kind] for kind in kinds)):
        for number, item in enumerate(results, start=1):
            if key not in item:
                raise ValueError(f"result {number}: {key} is missing")
    strangers = [one for one in image_ids if one not in truth.images]
    strangers += _strangers(results, "image_id", truth.images)
    if strangers:
        raise ValueError(
            f"{truth.path}: contains no image {show(strangers[0])}, which has results ({len(strangers)} such "
            "images); expected results of the same data set"
        )
    strangers = _strangers(results, "category_id", truth.categories)
    if strangers:
        raise ValueError(
            f"{truth.path}: contains no category {show(strangers[0])}, which has results ({len(strangers)} "
            "such categories); expected results of the same data set"
        )
    boxes = [("bbox", (4,), BBOX)] if "bbox" in kinds else []
    for key, shape, expected in [("score", (), "a finite number"), *boxes]:
        place = _first_bad([item[key] for item in results], shape)
        if place is not None:
            raise ValueError(
                f"result {place + 1}: {key} must be {expected}, got {show(results[place][key])}"
            )


def _strangers(results: Sequence[dict], key: str, known: dict[int, dict]) -> list:
    try:
        return sorted({item[key] for item in results} - known.keys(), key=str)
    except TypeError as error:
        raise ValueError(f"{key} of a result must be a number ({error})") from error


def _first_bad(values: list, shape: tuple[int, ...]) -> int | None:
    """The index of the first value that is not finite numbers of this shape, None if all are."""
    if not values or _finite(values, (len(values), *shape)):
        return None
    return next((place for place, value in enumerate(values) if not _finite(value, shape)), None)


def _finite(values: object, shape: tuple[int, ...]) -> bool:
    try:
        array = np.array(values)
    except ValueError:  # of different lengths
        return False
    return array.shape == shape and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def check_code(item: dict, name: str, size: tuple[int, int]) -> list | dict:
    """Return a result's usable outline for an image of `size`: polygons without their broken parts, or RLE.

    Raises ValueError, with `name` in front, for a segmentation that is no mask of such an image.
    """
    outline = read_outline(item["segmentation"], size)
    if outline.problem:
        raise ValueError(f"{name}: {outline.problem[0]}: {outline.problem[1]}")
    if outline.shape is None:
        shown = show(item["segmentation"])
        raise ValueError(f"{name}: segmentation that is neither polygons nor RLE: {shown}")
    return outline.shape
