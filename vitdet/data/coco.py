"""A COCO or LVIS annotation file as records: one an image, with the objects that training can use.

Lin et al. 2014, https://cocodataset.org/#format-data; Gupta et al. 2019, https://www.lvisdataset.org/dataset, whose
images are COCO's, found by their coco_url. Crowd regions and boxes of zero size are real but cannot be learnt from:
they are left out and counted. Anything else that is wrong stops the reading, in one line.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitdet.data.entries import read_entries
from vitdet.data.images import open_image
from vitdet.data.records import Objects, Records
from vitdet.data.values import segmentation_problem, show


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line, also after it crossed a worker process.

    A DataLoader re-raises a worker's error with the whole traceback as its message: only the last line is ours.
    """

    def __init__(self, message: str) -> None:
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


@dataclass(frozen=True)
class CocoSplit:
    """The records in order of image id; label k is class_names[k] and category_ids[k] of the file.

    image_counts[k]: images that hold class k, as the file's categories say (LVIS) or else counted.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Records
    image_counts: tuple[int, ...]
    dropped: dict[str, int]  # reason -> objects left out


def read_coco(annotations: Path | str, images: Path | str, by_url: bool = False, tree: dict | None = None) -> CocoSplit:
    """The records of an annotation file whose images lie in the folder `images` (no image is opened).

    by_url: under the last two parts of their coco_url where they have one, as LVIS's do; else under their file_name.
    tree: the content of the file, if it was read before.
    Raises FileNotFoundError without the file, and ValueError with its first problem: broken JSON, a missing field,
    an unknown image or category, an id that comes twice, a polygon under 3 points, a box outside its image.
    """
    path = Path(annotations)
    content = _read(path, read_entries) if tree is None else tree
    try:
        return _split(content, Path(images), by_url)
    except KeyError as error:
        raise ValueError(f"{path}: the field {error} is missing; `vitdet data check` lists all problems") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not COCO's layout ({error}); `vitdet data check` lists all problems") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; `vitdet data check {path.parent.parent}` lists all problems") from error


def image_name(head: dict, by_url: bool) -> str:
    """Where an image lies in its folder: file_name, or as its coco_url ends, as in train2017/000000000139.jpg."""
    url = head.get("coco_url") if by_url else None
    return "/".join(url.split("/")[-2:]) if url else head["file_name"]


def image_counts(categories: list[dict], records: Records) -> tuple[int, ...]:
    """How many images hold each category: what every one of them states as image_count, else counted."""
    stated = [category.get("image_count") for category in categories]
    if all(type(count) is int and count >= 0 for count in stated):
        return tuple(stated)
    counts = Counter(label for labels in records.labels() for label in set(labels.tolist()))
    return tuple(counts[label] for label in range(len(categories)))


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The file as an upright RGB image of (height, width) `size`.

    Raises ImageError for a file that is missing, no image, truncated or of another size.
    """
    try:
        image = open_image(path)
    except (FileNotFoundError, ValueError) as error:
        raise ImageError(f"{error}; `vitdet data check --images` lists all such files") from error
    if size is not None and (image.height, image.width) != size:
        raise ImageError(f"{path}: {image.width} x {image.height} pixels, but the annotations say {size[1]} x "
                         f"{size[0]}; `vitdet data check --images` lists all such files")
    return image


def read_tree(path: Path) -> dict:
    """The content of an annotation file. Raises FileNotFoundError or ValueError with one line that names it."""
    return _read(path, lambda file: json.loads(file.read_bytes()))


def _read(path: Path, read: Callable[[Path], object]) -> dict:
    try:
        content = read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file; expected ROOT/annotations/instances_SPLIT.json "
                                "(data.dataset=lvis: lvis_v1_SPLIT.json), see data.root and data.*_split") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); write or download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with images, annotations and categories, "
                         f"got a {type(content).__name__}")
    return content


def _split(content: dict, images: Path, by_url: bool) -> CocoSplit:
    categories: dict[int, dict] = {}
    for category in content["categories"]:
        _is_new(category["id"], categories, "category")
        categories[category["id"]] = category
    heads: dict[int, tuple[int, int, int]] = {}
    names = {}
    for head in content["images"]:
        _is_new(head["id"], heads, "image")
        heads[head["id"]] = _head(head)
        names[head["id"]] = image_name(head, by_url)
    row_of = {image_id: row for row, image_id in enumerate(sorted(heads))}
    category_ids = tuple(sorted(categories))
    label_of = {category: label for label, category in enumerate(category_ids)}
    objects, dropped = _objects(content["annotations"], heads, row_of, label_of)
    records = Records.of(images, [names[image_id] for image_id in row_of], [heads[image_id] for image_id in row_of],
                         objects)
    ordered = [categories[category] for category in category_ids]
    class_names = tuple(str(category["name"]) for category in ordered)
    return CocoSplit(class_names, category_ids, records, image_counts(ordered, records), dropped)


def _objects(annotations: Iterable[dict], heads: dict[int, tuple[int, int, int]], row_of: dict[int, int],
             label_of: dict[int, int]) -> tuple[Objects, dict[str, int]]:
    """What training can use, and how many for each reason it cannot."""
    objects, dropped, seen = Objects(), Counter(), set()
    for annotation in annotations:
        _is_new(annotation["id"], seen, "annotation")
        seen.add(annotation["id"])
        reason = _judge(annotation, heads, label_of)
        if reason:
            dropped[reason] += 1
        else:
            objects.append(row_of[annotation["image_id"]], label_of[annotation["category_id"]], annotation["bbox"],
                           annotation["segmentation"])
    return objects, dict(dropped)


def _is_new(number: int, seen: Container[int], kind: str) -> None:
    if number in seen:
        raise ValueError(f"{kind} id {number} comes twice")


def _head(head: dict) -> tuple[int, int, int]:
    """Image id, height, width."""
    image_id, height, width = head["id"], head["height"], head["width"]
    if type(image_id) is not int or not -(2**63) <= image_id < 2**63:
        raise ValueError(f"image id {show(image_id)}: expected a whole number")
    if not all(isinstance(side, int) and 0 < side < 2**31 for side in (height, width)):
        raise ValueError(f"image {image_id}: height and width must be positive whole numbers, got {show(height)}, "
                         f"{show(width)}")
    return image_id, int(height), int(width)


def _judge(annotation: dict, heads: dict[int, tuple[int, int, int]], label_of: dict[int, int]) -> str:
    """Why training leaves the object out ('': it does not); ValueError for what no annotation may be."""
    image_id = annotation["image_id"]
    if image_id not in heads:
        raise ValueError(f"annotation {annotation['id']}: image {image_id} does not exist")
    if annotation["category_id"] not in label_of:
        raise ValueError(f"annotation {annotation['id']}: category {annotation['category_id']} does not exist")
    x, y, width, height = annotation["bbox"]
    if not math.isfinite(x + y + width + height):
        raise ValueError(f"annotation {annotation['id']}: bbox must hold four finite numbers, got "
                         f"{annotation['bbox']}")
    if annotation.get("iscrowd", 0):
        return "crowd"
    if width <= 0 or height <= 0:
        return "of zero size"
    _, rows, columns = heads[image_id]
    if x >= columns or y >= rows or x + width <= 0 or y + height <= 0:
        raise ValueError(f"annotation {annotation['id']}: bbox {annotation['bbox']} lies outside the image of "
                         f"{columns} x {rows} pixels")
    problem = segmentation_problem(annotation["segmentation"], (rows, columns))
    if problem:
        raise ValueError(f"annotation {annotation['id']}: {problem[0]}: {problem[1]}")
    return ""
