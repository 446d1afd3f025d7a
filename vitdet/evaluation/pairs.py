"""Pairs of pictures for the report: an image with its objects, and with its detections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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
    """The images of a `Truth`: the folder that their names are relative to, whether named as in
    LVIS, and how they are read.
    """

    folder: Path
    lvis: bool
    reading: Reading = DEFAULT


class _Item(NamedTuple):
    """An object or a detection; box: x, y, width, height in pixels, None with a mask only."""

    category_id: int
    box: Sequence[float] | None
    segmentation: list | dict | None
    caption: str


def images_of(annotations: Path, dataset: str) -> Images | None:
    """Return the images of an annotation file ("coco" or "lvis") in one of the usual layouts."""
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

    results: checked against the truth; those with a score of at least `threshold` are drawn.
    Images that cannot be read are left out.
    """
    names = {number: str(category["name"]) for number, category in truth.categories.items()}
    labels = {category_id: label for label, category_id in enumerate(names)}
    objects, found = defaultdict(list), defaultdict(list)
    for one in truth.objects:
        category = one.category_id
        if one.image_id in image_ids and category in names and not one.iscrowd:
            item = _Item(category, one.bbox, one.segmentation, names[category])
            objects[one.image_id].append(item)
    for result in results:
        if result["image_id"] in image_ids and result["score"] >= threshold:
            category = result["category_id"]
            caption = f"{names[category]} {result['score']:.2f}"
            item = _Item(category, result.get("bbox"), result.get("segmentation"), caption)
            found[result["image_id"]].append(item)
    pictures = {}
    for image_id in image_ids:
        try:
            name = existing_name(images.folder, image_name(truth.images[image_id], images.lvis))
            picture = read_image(images.folder / name, images.reading)
        except (OSError, ValueError, KeyError):  # KeyError: no file name, not needed for AP
            continue
        if (picture.height, picture.width) == truth.sides(image_id):
            left, right = (_draw(picture, side[image_id], labels) for side in (objects, found))
            pictures[image_id] = left, right
    return pictures


def _draw(picture: Image.Image, items: Sequence[_Item], labels: Mapping[int, int]) -> Image.Image:
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
