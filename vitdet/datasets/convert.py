"""A folder in YOLO's or Pascal VOC's format becomes one in COCO's layout, all of it or nothing.

Images are hard links to those of the source, which cost no disk and survive if the source is deleted; where the file
system has none (another disk), copies. No two images share an id or, unless they are one file, a name: as COCO has it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitdet.datasets.importers.dataset import BOX_ONLY, Foreign, Picture, Thing
from vitdet.datasets.importers.voc import read_voc
from vitdet.datasets.importers.yolo import description, read_yolo
from vitdet.files import written_folder

READERS: dict[str, Callable[[Path], Foreign]] = {"yolo": read_yolo, "voc": read_voc}


@dataclass(frozen=True)
class Converted:
    """What was written: (images, objects) of each split, the classes, and what a person should know, with counts."""

    splits: dict[str, tuple[int, int]]
    class_names: tuple[str, ...]
    notes: dict[str, int]


def convert(
    source: Path, target: Path, kind: str = "", copy: bool = False, boxes_as_masks: bool = False
) -> Converted:
    """Writes target/SPLIT/* and target/annotations/instances_SPLIT.json.

    kind: "yolo" or "voc", else what the source looks like; copy: images are copied in any case.
    boxes_as_masks: an object with a box only gets that box as its mask.
    Raises FileNotFoundError and ValueError, in one line, for the first thing of the source that cannot be used, and
    ValueError if the target holds anything.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target}: is there already; give a new folder")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder")
    found = READERS[kind or _kind(source)](source)
    with written_folder(target) as temporary:
        (temporary / "annotations").mkdir()
        writer = _Writer(temporary, found, copy, boxes_as_masks)
        counts = {split: writer.write(split) for split in found.splits}
    notes = {note: count for note, count in found.notes.items() if count}
    if boxes_as_masks and BOX_ONLY in notes:
        notes["boxes are also their objects' masks"] = notes.pop(BOX_ONLY)
    return Converted(counts, found.class_names, notes)


def _kind(source: Path) -> str:
    looks = {"yolo": description(source) is not None, "voc": (source / "Annotations").is_dir()}
    kinds = [kind for kind, like in looks.items() if like]
    if len(kinds) != 1:
        raise ValueError(
            f"{source}: looks like {' and '.join(kinds) or 'neither yolo nor voc'}; expected data.yaml "
            "(YOLO), or Annotations/, JPEGImages/ and ImageSets/ (Pascal VOC); --format says which"
        )
    return kinds[0]


class _Writer:
    """Numbers and names go on from split to split."""

    def __init__(self, folder: Path, found: Foreign, copy: bool, boxes_as_masks: bool) -> None:
        self.folder, self.found, self.copy = folder, found, copy
        self.boxes_as_masks = boxes_as_masks
        self.images = self.objects = 0
        self.name_of: dict[str, str] = {}  # source file -> name
        self.taken: Counter[str] = Counter()

    def write(self, split: str) -> tuple[int, int]:
        """Writes a split; its number of images and of objects."""
        (self.folder / split).mkdir()
        categories = [
            {"id": label + 1, "name": name} for label, name in enumerate(self.found.class_names)
        ]
        images, objects = [], self.objects
        with open(self.folder / "annotations" / f"instances_{split}.json", "w") as file:
            file.write(
                '{"info": {}, "licenses": [], "categories": '
                + json.dumps(categories)
                + ', "annotations": ['
            )
            for picture in self.found.splits[split]:
                images.append(self._image(split, picture))
                for thing in picture.things:
                    self.objects += 1
                    annotation = {
                        "id": self.objects,
                        "image_id": self.images,
                        "category_id": thing.label + 1,
                        "bbox": thing.box,
                        "area": thing.area,
                        "segmentation": thing.segmentation or self._box_as_mask(thing),
                        "iscrowd": int(thing.crowd),
                    }
                    file.write(
                        (",\n" if self.objects > objects + 1 else "\n") + json.dumps(annotation)
                    )
            file.write('\n], "images": ' + json.dumps(images) + "}\n")
        return len(images), self.objects - objects

    def _box_as_mask(self, thing: Thing) -> list[list[float]]:
        x, y, width, height = thing.box
        right, low = round(x + width, 3), round(y + height, 3)
        return [[x, y, right, y, right, low, x, low]] if self.boxes_as_masks else []

    def _image(self, split: str, picture: Picture) -> dict[str, str | int]:
        path = os.path.realpath(picture.path)  # a link to a link would be one
        name = self.name_of.setdefault(path, "") or self._name(picture.path.name)
        self.name_of[path] = name
        _bring(path, self.folder / split / name, self.copy)
        self.images += 1
        return {
            "id": self.images,
            "file_name": name,
            "height": picture.height,
            "width": picture.width,
        }

    def _name(self, name: str) -> str:
        """The name, with a number if another file has it."""
        stem, suffix = os.path.splitext(name)
        while name in self.taken:
            self.taken[stem + suffix] += 1
            name = f"{stem}_{self.taken[stem + suffix]}{suffix}"
        self.taken[name] += 1
        return name


def _bring(source: str, target: Path, copy: bool) -> None:
    if target.exists():
        return  # the same file, listed twice under two links
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or a file system without hard links
    shutil.copyfile(source, target)
