"""Data sets that yield batches: the infinite training stream and the validation images.

The sample at a position of the training stream depends only on (seed, position).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from vitdet.config import DataConfig
from vitdet.data import download_record
from vitdet.data.annotations import explain_dropped
from vitdet.data.coco import CocoSplit, read_coco, read_image
from vitdet.data.images import DEFAULT, Reading
from vitdet.data.layout import missing, split_files
from vitdet.data.masks import edges_of, rectangles
from vitdet.data.records import Record, Records
from vitdet.data.samplers import InfiniteSampler, repeat_factors
from vitdet.data.transforms import jitter, pad, resize_and_pad, visible_boxes
from vitdet.types import Batch, Polygons, Target

log = logging.getLogger(__name__)

CACHE = 1 << 28  # cache size in bytes; images are cached if all decoded training images fit
REDRAWS = 100  # maximum number of attempts to draw a crop with an object (data.redraw_empty)
# a sample without its pixels: target, size on the canvas, image id, original size
Sample = tuple[Target | None, tuple[int, int], int, tuple[int, int]]


def read_split(
    data: DataConfig, split: str, tree: dict | None = None, check_files: bool = True
) -> CocoSplit:
    """Read a split, limited to the data.max_images images with the lowest ids (0: all images).

    With a limit, images without objects are skipped; data.keep_empty keeps them for training.

    Args:
        tree: content of the annotation file, if it was already read.
        check_files: whether to check that the images exist and that the files match the record
            of `vitdet data coco|lvis`; only rank 0 needs to check.

    Raises:
        FileNotFoundError, ValueError: for missing or invalid files, or if no object is usable.
    """
    root, (annotations, images) = Path(data.root), split_files(data, split)
    for path in (annotations, images):
        if not path.exists():
            raise missing(path, data)
    if check_files:
        download_record.check_split(root, annotations)
    found = read_coco(annotations, images, by_url=data.dataset == "lvis", tree=tree)
    if check_files:
        download_record.check_images(root, images, found.records.names())
    if not found.records.counts().any():
        raise ValueError(
            f"{data.root}: no image of {split} has a usable object; "
            f"{explain_dropped(found.dropped)}; `vitdet data check {data.root}` lists all problems"
        )
    if data.max_images and data.keep_empty and split == data.train_split:
        found = replace(found, records=found.records[: data.max_images])
    elif data.max_images:
        found = with_objects(found, data.max_images)
    paths = found.records.paths() if check_files else ()
    if absent := [path for path in paths if not os.path.isfile(path)]:
        raise FileNotFoundError(
            f"{absent[0]}: no such file (missing images: {len(absent):,}); "
            f"`vitdet data check {data.root}` lists all problems"
        )
    return found


class TrainData(Dataset):
    """Maps positions of the infinite training stream to batches of augmented samples.

    Excludes images without a usable object, or uses them as background (data.keep_empty). With
    data.redraw_empty, a crop that misses all objects of its image is redrawn from a random image.
    """

    def __init__(self, split: CocoSplit, data: DataConfig, seed: int, cache: int = CACHE) -> None:
        self.split = split
        nonempty = with_objects(split).records
        if not nonempty:
            raise ValueError(f"{data.root}: no image of {data.train_split} has a usable object")
        self.records = split.records if data.keep_empty else nonempty
        self.without_objects = len(split.records) - len(nonempty)
        self.data = data
        self.seed = seed
        threshold = data.repeat_threshold
        repeats = repeat_factors(self.records.labels(), threshold) if threshold else None
        self.sampler = InfiniteSampler(len(self.records), seed, repeats)
        self._fits_in_cache = 3 * int(self.records.sizes().prod(axis=1).sum()) <= cache
        self._cache: dict[int, tuple[Image.Image, np.ndarray, np.ndarray]] = {}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        return make_batch(self.draw, positions, self.data.image_size)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def draw(self, position: int, canvas: np.ndarray) -> Sample:
        """Return the sample at a position; write the pixels to a black `canvas` (3, S, S) uint8."""
        index = self.sampler[position]
        rng = np.random.default_rng((self.seed, position))
        for _ in range(REDRAWS):
            sample = self._crop(index, rng, canvas)
            if sample is not None:
                return sample
            index = int(rng.integers(len(self.records)))
        raise ValueError(
            f"{self.data.root}: {REDRAWS} consecutive crops without objects; objects are too "
            "rare or have no area; set data.redraw_empty=false to train on crops without objects"
        )

    def _crop(self, index: int, rng: np.random.Generator, canvas: np.ndarray) -> Sample | None:
        """Augment an image; return None if data.redraw_empty rejects a crop without objects."""
        record, data = self.records[index], self.data
        affine = jitter(
            rng,
            (record.height, record.width),
            data.image_size,
            scale_range=data.scale_range,
            flip=data.flip,
            transpose=data.transpose,
            color_jitter=data.color_jitter,
            diagonal=data.diagonal_crop,
        )
        image, edges, counts = self._load(index, record)
        edges = affine.edges(edges)
        boxes, keep = visible_boxes(edges, counts, affine.size)
        own, has_mask = record.own_box, None
        if own.any():
            sides, four = rectangles(record.boxes[own])
            boxes[own], keep[own] = visible_boxes(affine.edges(sides), four, affine.size)
            has_mask = torch.tensor([shape is not None for shape in record.segmentations])[keep]
        if data.redraw_empty and len(record) and not keep.any():
            return None
        tensor = torch.from_numpy
        masks = Polygons.of(tensor(edges[np.repeat(keep, counts)]), tensor(counts[keep]))
        target = Target(tensor(boxes[keep]), tensor(record.labels[keep]), masks, has_mask)
        pad(affine.seen(image, data.antialias), canvas)
        return target, affine.size, record.image_id, affine.source

    def _load(self, index: int, record: Record) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        if index in self._cache:
            return self._cache[index]
        image = read_image(record.path, (record.height, record.width), Reading.of(self.data))
        loaded = image, *edges_of(record.segmentations, record.height, record.width)
        if self._fits_in_cache:
            self._cache[index] = loaded
        return loaded


class ValData(Dataset):
    """Maps record indices to batches of images with longest side `image_size`, without targets."""

    def __init__(
        self, records: Records, image_size: int, antialias: bool, reading: Reading = DEFAULT
    ) -> None:
        self.records = records
        self.image_size = image_size
        self.antialias = antialias
        self.reading = reading

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return make_batch(self.draw, indices, self.image_size)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def draw(self, index: int, canvas: np.ndarray) -> Sample:
        """Return the sample of an image; write the pixels to a black `canvas` (3, S, S) uint8."""
        record = self.records[index]
        source = (record.height, record.width)
        image = read_image(record.path, source, self.reading)
        _, size = resize_and_pad(image, self.image_size, self.antialias, canvas)
        return None, size, record.image_id, source


def make_batch(
    draw: Callable[[int, np.ndarray], Sample], indices: Sequence[int], size: int
) -> Batch:
    """Collate the samples at `indices`; `draw` writes the images directly into the batch.

    If the samples have no ground truth, the targets of the batch are an empty list.
    """
    shape = (len(indices), 3, size, size)
    if get_worker_info() is None:
        images = torch.zeros(shape, dtype=torch.uint8)
    else:  # shared memory (zero-initialized) saves a copy, as in `default_collate`
        shared = torch.UntypedStorage._new_shared(math.prod(shape))
        images = torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)
    samples = [draw(index, canvas) for index, canvas in zip(indices, images.numpy(), strict=True)]
    targets, sizes, image_ids, originals = zip(*samples, strict=True)
    return Batch(
        images,
        [target for target in targets if target is not None],
        torch.tensor(sizes),
        tuple(image_ids),
        torch.tensor(originals),
    )


def with_objects(split: CocoSplit, most: int | None = None) -> CocoSplit:
    """Limit a split to images with objects; `most` is the maximum number of images (None: all)."""
    nonempty = np.flatnonzero(split.records.counts())[:most]
    return replace(split, records=split.records.select(nonempty))
