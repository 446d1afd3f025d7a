"""From a folder in COCO's or LVIS's layout to batches: the training stream and the validation images.

What a position of the training stream becomes depends on (seed, position) alone.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import multiprocessing
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vitdet.config import DataConfig
from vitdet.data import inventory
from vitdet.data.coco import CocoSplit, read_coco, read_image
from vitdet.data.layout import missing, split_files
from vitdet.data.masks import edges_of
from vitdet.data.records import Record, Records
from vitdet.data.samplers import InfiniteSampler, positions, repeat_factors
from vitdet.data.transforms import jitter, pad, resize_and_pad, visible_boxes
from vitdet.types import Batch, Polygons, Target

log = logging.getLogger(__name__)

CACHE = (
    1 << 28
)  # bytes: a training split whose decoded images fit stays in memory, images and outlines

LARGEST = 31 << 20  # bytes, just below the most that glibc learns from

FILES = (
    1 << 16
)  # each tensor of a batch that comes from a worker is an open file; 1,024, the usual limit, is too few

REDRAWS = 100  # images tried for one place in a batch until a crop holds an object

COCO_URL = re.compile(
    rb'"coco_url": *"[^"]*?([^/"]+/[^/"]+)"'
)  # reading 1 GB as JSON takes a minute

Sample = tuple[
    Target | None, tuple[int, int], int, tuple[int, int]
]  # all but the pixels: targets, size, id, source


def read_split(
    data: DataConfig, split: str, tree: dict | None = None, look: bool = True
) -> CocoSplit:
    """The split's records; with data.max_images, only the so many images of lowest id that hold an object.

    tree: the content of the annotation file, if it was read before. look: whether files are compared with what they
    should be, which one process of several does for all. Raises what `read_coco` raises, FileNotFoundError naming the
    first image file that is not there, and either for what is no longer as `vitdet data coco|lvis` left it.
    """
    files = split_files(data, split)
    if look:
        inventory.look(Path(data.root), *files)
    found = read_coco(*files, by_url=data.dataset == "lvis", tree=tree)
    if not found.records.counts().any():
        raise ValueError(
            f"{data.root}: no image of {split} holds an object to learn from or to find"
        )
    if data.max_images:
        found = replace(found, records=_with_objects(found)[: data.max_images])
    gone = [path for path in found.records.paths() if not os.path.isfile(path)] if look else []
    if gone:
        raise FileNotFoundError(
            f"{gone[0]}: no such file, and {len(gone) - 1} more images of the annotations "
            f"are missing; `vitdet data check {data.root}` lists all problems"
        )
    return found


class TrainData(Dataset):
    """Positions of the infinite stream -> a batch of augmented samples; images without a usable object are left out.

    With data.redraw_empty a crop without any object gives its place to one of any other image, as in mmdet.
    """

    def __init__(self, split: CocoSplit, data: DataConfig, seed: int, cache: int = CACHE) -> None:
        self.split = split
        self.records = _with_objects(split)
        if not self.records:
            raise ValueError(
                f"{data.root}: no image of {data.train_split} holds an object to learn from"
            )
        self.without_objects = len(split.records) - len(self.records)
        self.data = data
        self.seed = seed
        repeats = None
        if data.repeat_threshold:
            repeats = repeat_factors(self.records.labels(), data.repeat_threshold)
        self.sampler = InfiniteSampler(len(self.records), seed, repeats)
        self._small = 3 * int(self.records.sizes().prod(axis=1).sum()) <= cache
        self._cache: dict[int, tuple[Image.Image, np.ndarray]] = {}
        _keep_freed_memory()

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        return make_batch(self.draw, positions, self.data.image_size)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def draw(self, position: int, canvas: np.ndarray) -> Sample:
        """The sample, its image on the black `canvas` (3, S, S) uint8."""
        index = self.sampler[position]
        rng = np.random.default_rng((self.seed, position))
        for _ in range(REDRAWS):
            sample = self._crop(index, rng, canvas)
            if sample is not None:
                return sample
            index = int(rng.integers(len(self.records)))
        raise ValueError(
            f"{self.data.root}: {REDRAWS} crops one after the other without any object: the objects are "
            "too few or have no area; data.redraw_empty=false takes such crops as they are"
        )

    def _crop(self, index: int, rng: np.random.Generator, canvas: np.ndarray) -> Sample | None:
        """The image under an affine drawn now; None if that shows no object and data.redraw_empty is set."""
        record, data = self.records[index], self.data
        affine = jitter(
            rng,
            (record.height, record.width),
            data.image_size,
            data.scale_range,
            data.flip,
            data.transpose,
            data.color_jitter,
            data.diagonal_crop,
        )
        image, edges = self._load(index, record)
        edges = affine.edges(edges)
        boxes, keep = visible_boxes(edges, affine.size)
        if data.redraw_empty and not keep.any():
            return None
        target = Target(
            torch.from_numpy(boxes[keep]),
            torch.from_numpy(record.labels[keep]),
            Polygons(torch.from_numpy(edges[keep])),
        )
        pad(affine.seen(image, data.antialias), canvas)
        return target, affine.size, record.image_id, affine.source

    def _load(self, index: int, record: Record) -> tuple[Image.Image, np.ndarray]:
        if index in self._cache:
            return self._cache[index]
        image = read_image(record.path, (record.height, record.width))
        edges = edges_of(record.segmentations, record.height, record.width)
        if self._small:
            self._cache[index] = image, edges
        return image, edges


class ValData(Dataset):
    """Indices -> a batch of these images of the records, longest side = canvas, without targets."""

    def __init__(self, records: Records, image_size: int, antialias: bool = True) -> None:
        self.records = records
        self.image_size = image_size
        self.antialias = antialias

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return make_batch(self.draw, indices, self.image_size)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def draw(self, index: int, canvas: np.ndarray) -> Sample:
        """The image on the black `canvas` (3, S, S) uint8, and what is known of it."""
        record = self.records[index]
        source = (record.height, record.width)
        _, size = resize_and_pad(
            read_image(record.path, source), self.image_size, self.antialias, canvas
        )
        return None, size, record.image_id, source


def make_batch(
    draw: Callable[[int, np.ndarray], Sample], indices: Sequence[int], size: int
) -> Batch:
    """The samples of `indices` as one batch. Each writes its pixels to their place in it: a worker holds them once.

    Without ground truth, the targets are an empty list.
    """
    shape = (len(indices), 3, size, size)
    if get_worker_info() is None:
        images = torch.zeros(shape, dtype=torch.uint8)
    else:  # in what the processes share, where torch would copy it to, as `default_collate` does; new, it is zero
        images = torch.empty(0, dtype=torch.uint8).set_(
            torch.UntypedStorage._new_shared(math.prod(shape)), 0, shape
        )
    samples = [draw(index, canvas) for index, canvas in zip(indices, images.numpy(), strict=True)]
    targets, sizes, image_ids, originals = zip(*samples, strict=True)
    return Batch(
        images,
        [target for target in targets if target is not None],
        torch.tensor(sizes),
        tuple(image_ids),
        torch.tensor(originals),
    )


def as_it_is(batch: Batch) -> Batch:
    """What a data loader is to do with a batch."""
    return batch


def train_loader(
    data: DataConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of this rank for the steps start_step..steps-1; `batch_size` counts the images of all ranks.

    Raises what `read_split` raises (rank 0 alone looks at the files), ValueError when the ranks cannot share a batch,
    and while it is read from ValueError for an image file that cannot be used.
    """
    dataset = TrainData(read_split(data, data.train_split, look=rank == 0), data, seed)
    dropped = dataset.split.dropped
    if dropped and rank == 0:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        log.warning(
            "%s: objects left out of training: %s", split_files(data, data.train_split)[0], counts
        )
    sampler = _Steps(batch_size, start_step, steps, rank, world_size)
    return DataLoader(dataset, batch_sampler=sampler, **_processes(data.workers))


def val_loader(
    data: DataConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    split: CocoSplit | None = None,
) -> DataLoader:
    """Batches of this rank's part of the validation images, also those without objects, in order of image id.

    The ranks' parts, one after the other, are all images once. split: the validation split, if it was read before.
    Raises what `read_split` raises, and ValueError for an image file that cannot be used.
    """
    records = (split or read_split(data, data.val_split)).records
    part = records[len(records) * rank // world_size : len(records) * (rank + 1) // world_size]
    return DataLoader(
        ValData(part, data.image_size, data.antialias),
        batch_size=batch_size,
        **_processes(data.workers),
    )


def dataset_digest(data: DataConfig) -> str:
    """16 hex digits that change when annotations, image names, image file sizes or data.max_images change.

    Looked at are all files of a split's folder, and of LVIS those that coco_urls of the annotation file name.
    """
    digest = hashlib.sha256(str(data.max_images).encode())
    for split in (data.train_split, data.val_split):
        annotations, images = split_files(data, split)
        for path in (annotations, images):
            if not path.exists():
                raise missing(path, data)
        with open(annotations, "rb") as file:
            digest.update(f"\n{split}\n".encode() + hashlib.file_digest(file, "sha256").digest())
        found = _files(images)
        if data.dataset == "lvis":
            found = (
                str(images / name.decode())
                for name in set(COCO_URL.findall(annotations.read_bytes()))
            )
        start = len(str(images)) + 1
        files = sorted(
            (path[start:], os.stat(path).st_size) for path in found if os.path.isfile(path)
        )
        digest.update("\n".join(f"{name} {size}" for name, size in files).encode())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[str]:
    return (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)


class _Steps(Sampler):
    def __init__(
        self, batch_size: int, start_step: int, steps: int, rank: int, world_size: int
    ) -> None:
        self.count = max(steps - start_step, 0)
        self.arguments = (start_step, batch_size, rank, world_size)
        positions(*self.arguments)  # complains here, not in the loop

    def __iter__(self) -> Iterator[list[int]]:
        return islice(positions(*self.arguments), self.count)

    def __len__(self) -> int:
        return self.count


def _keep_freed_memory() -> None:
    """Pictures take the memory of those before them: a fifth of an image's time went into new pages of the kernel.

    glibc gives freed memory back from twice the size of the largest piece on that it has seen freed; this one is never
    touched, so it costs nothing. Worker processes inherit the limit.
    """
    np.empty(LARGEST, np.uint8)


def _with_objects(split: CocoSplit) -> Records:
    return split.records.select(np.flatnonzero(split.records.counts()))


def _processes(workers: int) -> dict:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    multiprocessing.set_forkserver_preload(
        ["__main__", __name__]
    )  # where a server forks workers, it imports torch
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": as_it_is,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _start_worker,
    }


def _start_worker(worker: int) -> None:
    """A signal to the group of the training process must not take its next batch away: it ends its workers itself.

    And the collector leaves alone what was there before the fork: to look at an object is to copy its page of memory.
    """
    os.setpgrp()
    gc.freeze()
