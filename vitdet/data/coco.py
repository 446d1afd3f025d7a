"""A COCO or LVIS annotation file as records: one an image, with the objects that training can use.

Lin et al. 2014, https://cocodataset.org/#format-data; Gupta et al. 2019, https://www.lvisdataset.org/dataset, whose
images are COCO's, found by their coco_url. Crowd regions and boxes of zero size are real but cannot be learnt from:
they are left out and counted. Anything else that is wrong stops the reading, in one line.
Letters: G usable objects of an image.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitdet.data.images import open_image
from vitdet.data.values import segmentation_problem


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line, also after it crossed a worker process.

    A DataLoader re-raises a worker's error with the whole traceback as its message: only the last line is ours.
    """

    def __init__(self, message: str) -> None:
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


@dataclass(frozen=True)
class Record:
    """One image: boxes (G, 4) float32 xyxy in its pixels, labels (G,) int64 contiguous, a segmentation an object."""

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list  # COCO's polygons (a list of flat x, y lists) or an RLE dict

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class CocoSplit:
    """The records in order of image id; label k is class_names[k] and category_ids[k] of the file.

    image_counts[k]: images that hold class k, as the file's categories say (LVIS) or else counted.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: list[Record]
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
    content = read_tree(path) if tree is None else tree
    try:
        return _split(content, Path(images), by_url)
    except KeyError as error:
        raise ValueError(f"{path}: the field {error} is missing; `vitdet data check` lists all problems") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not COCO's layout ({error}); `vitdet data check` lists all problems") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; `vitdet data check {path.parent.parent}` lists all problems") from error


def image_name(head: dict, by_url: bool) -> str:
    """Where an image lies in its folder: file_name, or as its coco_url ends, as in train2017/000000000139.jpg."""
    url = head.get("coco_url") if by_url else None
    return "/".join(url.split("/")[-2:]) if url else head["file_name"]


def image_counts(categories: list[dict], records: list[Record]) -> tuple[int, ...]:
    """How many images hold each category: what every one of them states as image_count, else counted."""
    stated = [category.get("image_count") for category in categories]
    if all(type(count) is int and count >= 0 for count in stated):
        return tuple(stated)
    counts = Counter(label for record in records for label in set(record.labels.tolist()))
    return tuple(counts[label] for label in range(len(categories)))


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The file as an upright RGB image of (height, width) `size`.

    Raises ImageError for a file that is missing, no image, truncated or of another size.
    """
    try:
        image = open_image(path)
    except (FileNotFoundError, ValueError) as error:
        raise ImageError(f"{error}; `vitdet data check` lists all such files") from error
    if size is not None and (image.height, image.width) != size:
        raise ImageError(f"{path}: {image.width} x {image.height} pixels, but the annotations say {size[1]} x "
                         f"{size[0]}; `vitdet data check` lists all such files")
    return image


def read_tree(path: Path) -> dict:
    """The content of an annotation file. Raises FileNotFoundError or ValueError with one line that names it."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file; expected ROOT/annotations/instances_SPLIT.json "
                                "(data.dataset=lvis: lvis_v1_SPLIT.json), see data.root and data.*_split") from None
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}); write or download the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with images, annotations and categories, "
                         f"got a {type(content).__name__}")
    return content


def _split(content: dict, images: Path, by_url: bool) -> CocoSplit:
    categories = _by_id(content["categories"], "category")
    heads = _by_id(content["images"], "image")
    _by_id(content["annotations"], "annotation")
    for head in content["images"]:
        _check_size(head)
    category_ids = tuple(sorted(categories))
    label_of = {category: label for label, category in enumerate(category_ids)}
    found: dict[int, list[dict]] = {image_id: [] for image_id in heads}
    dropped: Counter[str] = Counter()
    for annotation in content["annotations"]:
        reason = _judge(annotation, heads, label_of)
        if reason:
            dropped[reason] += 1
        else:
            found[annotation["image_id"]].append(annotation)
    records = [_record(heads[image_id], found[image_id], label_of, images / image_name(heads[image_id], by_url))
               for image_id in sorted(heads)]
    ordered = [categories[category] for category in category_ids]
    names = tuple(str(category["name"]) for category in ordered)
    return CocoSplit(names, category_ids, records, image_counts(ordered, records), dict(dropped))


def _by_id(items: list[dict], kind: str) -> dict[int, dict]:
    table = {item["id"]: item for item in items}
    if len(table) < len(items):
        twice = next(key for key, count in Counter(item["id"] for item in items).items() if count > 1)
        raise ValueError(f"{kind} id {twice} comes twice")
    return table


def _check_size(head: dict) -> None:
    height, width = head["height"], head["width"]
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"image {head['id']}: height and width must be positive whole numbers, got {height}, {width}")


def _judge(annotation: dict, heads: dict[int, dict], label_of: dict[int, int]) -> str:
    """Why training leaves the object out ('': it does not); ValueError for what no annotation may be."""
    name = f"annotation {annotation['id']}"
    if annotation["image_id"] not in heads:
        raise ValueError(f"{name}: image {annotation['image_id']} does not exist")
    if annotation["category_id"] not in label_of:
        raise ValueError(f"{name}: category {annotation['category_id']} does not exist")
    x, y, width, height = annotation["bbox"]
    if not math.isfinite(x + y + width + height):
        raise ValueError(f"{name}: bbox must hold four finite numbers, got {annotation['bbox']}")
    if annotation.get("iscrowd", 0):
        return "crowd"
    if width <= 0 or height <= 0:
        return "of zero size"
    head = heads[annotation["image_id"]]
    if x >= head["width"] or y >= head["height"] or x + width <= 0 or y + height <= 0:
        raise ValueError(f"{name}: bbox {annotation['bbox']} lies outside the image of "
                         f"{head['width']} x {head['height']} pixels")
    problem = segmentation_problem(annotation["segmentation"], (head["height"], head["width"]))
    if problem:
        raise ValueError(f"{name}: {problem[0]}: {problem[1]}")
    return ""


def _record(head: dict, annotations: list[dict], label_of: dict[int, int], path: Path) -> Record:
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([label_of[annotation["category_id"]] for annotation in annotations], np.int64)
    outlines = [annotation["segmentation"] for annotation in annotations]
    return Record(head["id"], path, head["height"], head["width"], boxes, labels, outlines)
