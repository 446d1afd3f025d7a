"""Pictures that show an image with its objects next to the same image with its detections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from vitdet.config import DataConfig, EvalConfig
from vitdet.data.coco import CocoSplit
from vitdet.data.coco_layouts import existing_name, find_splits, image_name, root_of
from vitdet.data.dataset import read_split
from vitdet.data.images import DEFAULT, Reading, read_image
from vitdet.data.masks import decode
from vitdet.data.records import Record
from vitdet.data.segmentation import read_outline
from vitdet.evaluation.results import Truth
from vitdet.files import atomic_write, write_jpeg
from vitdet.predictor import Predictor
from vitdet.visualize import caption_font, draw, legible_scale, paint, scaled, spread

GAP = 8  # pixels between the two halves of a picture from `write_pictures`
SIDE = 520  # longer side of a picture from `draw_pairs`, in pixels


def write_pictures(
    detector: nn.Module,
    data: DataConfig,
    folder: str | Path,
    count: int = 8,
    threshold: float = 0.5,
    split: CocoSplit | None = None,
    precision: str = EvalConfig.precision,
) -> list[Path]:
    """Write up to `count` pictures of validation images to FOLDER/<image id>.jpg; return the paths.

    The images are evenly spaced in the split, so every call draws the same images. Detections with
    a score of at least `threshold` are drawn. By default, the split is read from `data`. For
    `precision`, see the setting evaluate.precision. The detector's mode is restored.
    """
    split = split or read_split(data, data.val_split)
    chosen = [split.records[i] for i in spread(len(split.records), count)]
    reading = Reading.of(data)
    predictor = Predictor(
        detector, split.class_names, data.image_size, data.antialias, reading, precision
    )
    paths = [Path(folder) / f"{record.image_id:012d}.jpg" for record in chosen]
    was_training = detector.training
    detector.eval()
    try:
        for record, path in zip(chosen, paths, strict=True):
            picture = _compare(record, predictor, threshold)
            with atomic_write(path) as temporary:
                write_jpeg(temporary, picture, quality=90, subsampling=0)
    finally:
        detector.train(was_training)
    return paths


def draw_truth(
    record: Record, class_names: tuple[str, ...], reading: Reading = DEFAULT
) -> Image.Image:
    """Return a record's image with its objects drawn in the style of `vitdet.visualize.draw`."""
    picture = read_image(record.path, reading)
    scale = legible_scale(picture.size)
    labels = record.labels.tolist()
    return paint(
        picture,
        torch.from_numpy(record.boxes),
        labels,
        [class_names[label] for label in labels],
        lambda i: enlarged(record.segmentations[i], (record.height, record.width), scale),
        scale,
    )


def enlarged(
    segmentation: list | dict | None, size: tuple[int, int], scale: float
) -> torch.Tensor | None:
    """Return an object's mask (H, W) bool in an image resized by `scale`; None without a mask.

    size: (height, width) of the original image.
    """
    if segmentation is None:
        return None
    bitmap = Image.fromarray(decode(segmentation, *size) * np.uint8(255))
    soft = bitmap.resize(scaled(bitmap.size, scale), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(soft) >= 128)


def _compare(record: Record, predictor: Predictor, threshold: float) -> Image.Image:
    left = draw_truth(record, predictor.class_names, predictor.reading)
    picture = read_image(record.path, predictor.reading)
    right = draw(picture, predictor(picture, threshold))
    font = caption_font(max(14, round(max(left.size) / 45)))
    head = round(1.8 * font.size)
    sheet = Image.new("RGB", (2 * left.width + GAP, left.height + head), (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    title = f"detections, score >= {threshold:g}"
    for x, half, text in ((0, left, "ground truth"), (left.width + GAP, right, title)):
        sheet.paste(half, (x, head))
        pen.text((x + head // 4, head / 2), text, fill=(40, 40, 40), font=font, anchor="lm")
    return sheet


@dataclass(frozen=True)
class Images:
    """The image files of a `Truth` in `folder`. If `lvis` is True, coco_url contains the names."""

    folder: Path
    lvis: bool
    reading: Reading = DEFAULT


class _Item(NamedTuple):
    """An object or a detection; box: x, y, width, height in pixels, None if it has only a mask."""

    category_id: int
    box: Sequence[float] | None
    segmentation: list | dict | None
    caption: str


def images_of(annotations: Path, dataset: str) -> Images | None:
    """Return the images of an annotation file, or None if they are in an unknown folder layout.

    dataset: "coco" or "lvis".
    """
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

    Detections with a score of at least `threshold` are drawn; `results` must have been validated.
    Images that cannot be read, or whose size is not the annotated size, are omitted.
    """
    names = {number: str(category["name"]) for number, category in truth.categories.items()}
    labels = {category_id: label for label, category_id in enumerate(names)}
    objects, found = defaultdict(list), defaultdict(list)
    for target in truth.objects:
        category = target.category_id
        if target.image_id in image_ids and category in names and not target.iscrowd:
            item = _Item(category, target.bbox, target.segmentation, names[category])
            objects[target.image_id].append(item)
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
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # e.g. no file name
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
