"""Pictures of validation images: the ground truth on the left, the detections on the right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from vitdet.config import DataConfig, EvalConfig
from vitdet.data.coco import CocoSplit
from vitdet.data.dataset import read_split
from vitdet.data.images import DEFAULT, Reading, read_image
from vitdet.data.masks import decode
from vitdet.data.records import Record
from vitdet.files import atomic_write, write_jpeg
from vitdet.predictor import Predictor
from vitdet.visualize import caption_font, draw, legible_scale, paint, scaled, spread

GAP = 8  # pixels between the two halves


def write_pictures(
    detector: nn.Module,
    data: DataConfig,
    folder: str | Path,
    count: int = 8,
    threshold: float = 0.5,
    split: CocoSplit | None = None,
    precision: str = EvalConfig.precision,
) -> list[Path]:
    """Write `count` pictures of the validation split, FOLDER/<image id>.jpg; return their paths.

    The images are evenly spaced in the split, so they are the same each time. threshold: least
    score of a drawn detection. split: the validation split, if already read. precision: as
    evaluate.precision. The detector's mode is restored.
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
    """Return the image of a record with its objects, drawn as `draw` draws detections."""
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
    """Return the pixels (H, W) bool of an object in an image of (height, width) `size` that is
    drawn `scale` times larger.
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
