"""Atomic conversion of data sets in other formats to COCO's layout.

By default, images are hard-linked, so that they use no additional space and remain if the source is
deleted. An image is copied if it cannot be linked, e.g. to another file system. Image ids and file
names are unique across splits, also without regard to case; an image file in several splits has the
same name in each split.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitdet.data.images import DEFAULT, Reading
from vitdet.datasets.classes import select_classes
from vitdet.datasets.formats import FORMATS, detect
from vitdet.datasets.importers.dataset import (
    BOX_ONLY,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
)
from vitdet.files import atomic_dir, folded

UNDIVIDED = "no validation split, which training requires"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    splits: dict[str, tuple[int, int]]  # split name -> (number of images, number of objects)
    class_names: tuple[str, ...]
    notes: dict[str, int]  # message for the user -> number of occurrences
    remarks: tuple[str, ...] = ()  # messages for the user without a number of occurrences


def convert(
    source: Path,
    target: Path,
    kind: str = "",
    copy: bool = False,
    boxes_as_masks: bool = False,
    *,
    splits: Sequence[str] = (),
    classes: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    val_share: float = 0.0,
    seed: int = 0,
    reading: Reading = DEFAULT,
) -> Converted:
    """Convert a data set to target/SPLIT/* and target/annotations/instances_SPLIT.json.

    Args:
        source: the data set.
        target: a new or empty folder.
        kind: the format of the source, a key of FORMATS; detected if empty.
        copy: copy images instead of linking them.
        boxes_as_masks: use boxes as the masks of objects that have no mask.
        splits: names of the splits to convert; all if empty.
        classes: names of the classes to convert, in the order of labels; all if empty.
        rename: map from old to new class names, applied before `classes`.
        val_share: if not 0, fraction of the images to use as `val`; requires a single split.
        seed: seed of the random selection for `val_share`.
        reading: settings for reading image files.

    Raises:
        SourceError: a subclass of ValueError; the message lists the problems of the source.
        FileNotFoundError, ValueError: the source, the target or an option is unusable.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target}: already exists; choose a new folder")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if not 0 <= val_share < 1:
        raise ValueError(f"--val-share: expected at least 0 and less than 1, got {val_share}")
    dataset = ImportedDataset(source, splits, reading)
    FORMATS[kind or detect(source)].read(dataset)
    names: tuple[str, ...] = ()
    labels: list[int | None] = []
    if dataset.class_names:  # no classes if the source could not be read
        names, labels = select_classes(source, dataset.class_names, classes, rename or {})
    with atomic_dir(target) as temporary:
        (temporary / "annotations").mkdir()
        writer = _Writer(temporary, names, labels, copy, boxes_as_masks)
        images: Mapping[str, Iterable[ImportedImage]] = dataset.splits
        if val_share and images:
            images = _divided(dataset, val_share, seed)
        counts = {split: writer.write(split, listed) for split, listed in images.items()}
        dataset.problems.raise_if_any(source)
        if not writer.images:
            raise ValueError(f"{source}: {'; '.join(['nothing to convert', *dataset.remarks])}")
    if not any(split.startswith("val") for split in counts):
        advice = "; --val-share 0.1 uses 10% of the images as val" if len(counts) == 1 else ""
        dataset.remarks.append(UNDIVIDED + advice)
    notes = {note: count for note, count in dataset.notes.items() if count}
    if boxes_as_masks and BOX_ONLY in notes:
        notes["boxes used as masks"] = notes.pop(BOX_ONLY)
    if writer.other_classes:
        notes["objects of other classes dropped (--classes)"] = writer.other_classes
    return Converted(counts, names, notes, tuple(dataset.remarks))


def _divided(dataset: ImportedDataset, share: float, seed: int) -> dict[str, list[ImportedImage]]:
    """Divide the images of a single split at random into train and val."""
    if len(dataset.splits) != 1:
        raise ValueError(
            f"{dataset.source}: --val-share splits the images of a single split, but there are "
            f"{', '.join(dataset.splits)}; select one with --splits"
        )
    images = [image for split in dataset.splits.values() for image in split]
    if len(images) < 2 and not dataset.problems.counts:
        raise ValueError(
            f"{dataset.source}: --val-share needs at least 2 images, got {len(images)}"
        )
    count = min(max(round(share * len(images)), 1), len(images) - 1)
    chosen = set(random.Random(seed).sample(range(len(images)), max(count, 0)))
    dataset.remarks.append(f"val: {count:,} of {len(images):,} images, drawn with seed {seed}")
    return {
        "train": [image for index, image in enumerate(images) if index not in chosen],
        "val": [image for index, image in enumerate(images) if index in chosen],
    }


@dataclass
class _Writer:
    folder: Path
    class_names: Sequence[str]
    labels: Sequence[int | None]  # source label -> target label, None if dropped
    copy: bool
    boxes_as_masks: bool

    def __post_init__(self) -> None:
        self.images = self.objects = self.other_classes = 0
        self.name_of: dict[str, str] = {}  # source path -> target file name
        self.taken: Counter[str] = Counter()

    def write(self, split: str, images: Iterable[ImportedImage]) -> tuple[int, int]:
        """Write a split; return the number of images and the number of objects."""
        (self.folder / split).mkdir()
        categories = [{"id": label, "name": name} for label, name in enumerate(self.class_names, 1)]
        entries, before = [], self.objects
        with open(self.folder / "annotations" / f"instances_{split}.json", "w") as file:
            head = f'"info": {{}}, "licenses": [], "categories": {json.dumps(categories)}'
            file.write(f'{{{head}, "annotations": [')
            for image in images:
                entries.append(self._image(split, image))
                for obj in image.objects:
                    label = self.labels[obj.label]
                    if label is None:
                        self.other_classes += 1
                        continue
                    self.objects += 1
                    annotation = {
                        "id": self.objects,
                        "image_id": self.images,
                        "category_id": label + 1,
                        "bbox": obj.box,
                        "area": obj.area,
                        "segmentation": obj.segmentation or self._box_as_mask(obj),
                        "iscrowd": int(obj.crowd),
                    }
                    comma = "," if self.objects > before + 1 else ""
                    file.write(f"{comma}\n{json.dumps(annotation)}")
            file.write(f'\n], "images": {json.dumps(entries)}}}\n')
        return len(entries), self.objects - before

    def _box_as_mask(self, obj: ImportedObject) -> list[list[float]]:
        x, y, width, height = obj.box
        right, bottom = round(x + width, 3), round(y + height, 3)
        return [[x, y, right, y, right, bottom, x, bottom]] if self.boxes_as_masks else []

    def _image(self, split: str, image: ImportedImage) -> dict[str, str | int]:
        path = os.path.realpath(image.path)  # link to the file, not to a symbolic link
        name = self.name_of[path] = self.name_of.get(path) or self._unique(image.path.name)
        _link_or_copy(path, self.folder / split / name, self.copy)
        self.images += 1
        size = {"height": image.height, "width": image.width}
        return {"id": self.images, "file_name": name, **size}

    def _unique(self, name: str) -> str:
        """Return the file name, with a number before the suffix if the name is already used."""
        (stem, suffix), first = os.path.splitext(name), folded(name)
        while folded(name) in self.taken:
            self.taken[first] += 1
            name = f"{stem}_{self.taken[first]}{suffix}"
        self.taken[folded(name)] += 1
        return name


def _link_or_copy(source: str, target: Path, copy: bool) -> None:
    if target.exists():
        return  # the split contains this file twice
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # e.g. the target is on another file system
    shutil.copyfile(source, target)
