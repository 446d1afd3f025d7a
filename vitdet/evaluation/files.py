"""What an evaluation reads: an annotation file, and a file of results; what is wrong with them is said in one line.

Results are COCO's: a list of {image_id, category_id, score, bbox: [x, y, width, height] and/or segmentation: RLE}.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitdet.data.values import segmentation_problem

KINDS = {"bbox": "bbox", "segm": "segmentation"}  # of comparisons, and the key of a result that each looks at
CHECK = "`vitdet data check` lists all problems"


@dataclass(frozen=True)
class Truth:
    """An annotation file: images and categories by id in the order of their ids, objects as they stand in the file."""

    path: Path
    images: dict[int, dict]
    categories: dict[int, dict]
    objects: list[dict]

    def sides(self, image_id: int) -> tuple[int, int]:
        """Height and width of an image."""
        image = self.images[image_id]
        return image["height"], image["width"]


def read_truth(path: Path | str) -> Truth:
    """An annotation file of COCO or LVIS.

    Raises FileNotFoundError without the file and ValueError for what is not such a file, in one line that names it.
    """
    return truth_of(path, read_json(path, "annotation"))


def truth_of(path: Path | str, tree: object) -> Truth:
    """The content of the annotation file `path`. Raises ValueError as `read_truth` does."""
    path = Path(path)
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(tree, dict) or key not in tree]
    if missing:
        raise ValueError(f"{path}: expected COCO annotations, but {', '.join(missing)} is missing")
    try:
        images, categories = ({item["id"]: item for item in sorted(tree[key], key=lambda item: item["id"])}
                              for key in ("images", "categories"))
        for image in images.values():
            _ = image["height"], image["width"]
        for category in categories.values():
            _ = category["name"]
        for item in tree["annotations"]:
            _ = item["bbox"], images[item["image_id"]], categories[item["category_id"]]
    except KeyError as error:
        raise ValueError(f"{path}: {error} is neither a field nor an id that is there; {CHECK}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not COCO's layout ({error}); {CHECK}") from error
    return Truth(path, images, categories, tree["annotations"])


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
    """Without garbage collection: it looks at half a million small dicts again and again, a quarter of the time."""
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
        return json.loads(path.read_bytes())
    except ValueError as error:  # JSON, or not UTF-8
        raise ValueError(f"{path}: not readable as JSON ({error}); write or download the file again") from error


def kinds_of(results: Sequence[dict]) -> list[str]:
    """The comparisons that results allow: 'bbox' and/or 'segm', by what the first of them holds.

    Raises ValueError if it holds neither.
    """
    first = results[0]
    kinds = [kind for kind, key in KINDS.items() if isinstance(first, dict) and key in first]
    if not kinds:
        raise ValueError("result 1: expected a bbox and/or a segmentation")
    return kinds


def check_results(truth: Truth, results: Sequence[dict], kinds: Iterable[str], image_ids: Collection[int]) -> None:
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
        raise ValueError(f"{truth.path}: holds no image {strangers[0]}, which has results ({len(strangers)} such "
                         "images); are the results of another data set?")
    strangers = _strangers(results, "category_id", truth.categories)
    if strangers:
        raise ValueError(f"{truth.path}: holds no category {strangers[0]}, which has results ({len(strangers)} such "
                         "categories); are the results of another data set?")
    _check_numbers([item["score"] for item in results], (), "score", "a finite number")
    if "bbox" in kinds:
        _check_numbers([item["bbox"] for item in results], (4,), "bbox", "4 finite numbers x, y, width, height")


def _strangers(results: Sequence[dict], key: str, known: dict[int, dict]) -> list:
    try:
        return sorted({item[key] for item in results} - known.keys(), key=str)
    except TypeError as error:
        raise ValueError(f"{key} of a result must be a number ({error})") from error


def _check_numbers(values: list, shape: tuple[int, ...], key: str, expected: str) -> None:
    try:
        array = np.array(values)
        good = array.shape == (len(values), *shape) and array.dtype.kind in "iuf" and np.isfinite(array).all()
    except ValueError:  # of different lengths
        good = False
    if good or not values:
        return
    for number, value in enumerate(values, start=1):
        try:
            array = np.array(value)
            fits = array.shape == shape and array.dtype.kind in "iuf" and np.isfinite(array).all()
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"result {number}: {key} must be {expected}, got {value!r}")


def check_code(item: dict, name: str, size: tuple[int, int]) -> None:
    """Raises ValueError, with `name` in front, for a segmentation that is no mask of an image of `size`."""
    problem = segmentation_problem(item["segmentation"], size)
    if problem:
        raise ValueError(f"{name}: {problem[0]}: {problem[1]}")
