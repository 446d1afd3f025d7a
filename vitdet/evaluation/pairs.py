"""Ground truth and detections of some images, each drawn on the image, for the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vitdet.data.coco_layouts import existing_name, find_splits, image_name, root_of
from vitdet.data.images import DEFAULT, Reading, read_image
from vitdet.data.segmentation import read_outline
from vitdet.evaluation.pictures import enlarged
from vitdet.evaluation.results import Truth
from vitdet.visualize import paint

SIDE = 520  # pixels of a picture's longer side


@dataclass(frozen=True)
class Images:
    """Where the images of `Truth` are: the folder that their names are relative to, how they are named and read."""

    folder: Path
    lvis: bool
    reading: Reading = DEFAULT


class _Item(NamedTuple):
    """An object or a detection; box: x, y, width, height in pixels of the image, None if only a mask is known."""

    category_id: int
    box: Sequence[float] | None
    segmentation: list | dict | None
    caption: str


def images_of(annotations: Path, dataset: str) -> Images | None:
    """The images of an annotation file ('coco' or 'lvis') that is in one of the usual layouts, else None."""
    for files in find_splits(root_of(annotations), dataset).values():
        if files.annotations.resolve() == annotations.resolve() and files.images.is_dir():
            return Images(files.images, dataset == "lvis")
    return None


def draw_pairs(
    truth: Truth,
    results: Sequence[dict],
    image_ids: Collection[int],
    threshold: float,
    images: Images,
) -> dict[int, tuple[Image.Image, Image.Image]]:
    """Return (image with its objects, image with its detections) by image id.

    results: COCO results that were checked against the truth; those with a score of at least
    `threshold` are drawn. Images that cannot be read are left out.
    """
    pictures = {}
    objects, found = _objects(truth, image_ids), _detections(truth, results, image_ids, threshold)
    for image_id in image_ids:
        try:
            name = existing_name(images.folder, image_name(truth.images[image_id], images.lvis))
            picture = read_image(images.folder / name, images.reading)
        except (
            OSError,
            ValueError,
            KeyError,
        ):  # KeyError: results can be scored without file names
            continue
        if (picture.height, picture.width) == truth.sides(image_id):
            pictures[image_id] = (
                _draw(picture, objects[image_id], truth),
                _draw(picture, found[image_id], truth),
            )
    return pictures


def _objects(truth: Truth, image_ids: Collection[int]) -> dict[int, list[_Item]]:
    items: dict[int, list[_Item]] = defaultdict(list)
    for one in truth.objects:
        if one.image_id in image_ids and one.category_id in truth.categories and not one.iscrowd:
            name = str(truth.categories[one.category_id]["name"])
            items[one.image_id].append(_Item(one.category_id, one.bbox, one.segmentation, name))
    return items


def _detections(
    truth: Truth, results: Sequence[dict], image_ids: Collection[int], threshold: float
) -> dict[int, list[_Item]]:
    items: dict[int, list[_Item]] = defaultdict(list)
    for one in results:
        if one["image_id"] in image_ids and one["score"] >= threshold:
            caption = f"{truth.categories[one['category_id']]['name']} {one['score']:.2f}"
            items[one["image_id"]].append(
                _Item(one["category_id"], one.get("bbox"), one.get("segmentation"), caption)
            )
    return items


def _draw(picture: Image.Image, items: Sequence[_Item], truth: Truth) -> Image.Image:
    labels = {category_id: label for label, category_id in enumerate(truth.categories)}
    size, scale = (picture.height, picture.width), SIDE / max(picture.size)
    outlines = [read_outline(item.segmentation, size, boxed=item.box is None) for item in items]
    boxes = torch.zeros(len(items), 4)
    for row, item, outline in zip(boxes, items, outlines, strict=True):
        if item.box is not None:
            x, y, width, height = item.box
            row.copy_(torch.tensor([x, y, x + width, y + height]))
        elif outline.box is not None:
            row.copy_(torch.tensor(outline.box))
    return paint(
        picture,
        boxes,
        [labels[item.category_id] for item in items],
        [item.caption for item in items],
        lambda i: enlarged(outlines[i].shape, size, scale),
        scale,
    )
