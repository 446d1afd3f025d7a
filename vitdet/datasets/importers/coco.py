"""Reader of COCO annotations in the folder layouts of common annotation tools.

Format: https://cocodataset.org/#format-data. Roboflow: train|valid|test/_annotations.coco.json
next to the images (https://roboflow.com/formats/coco-json); category 0 is the parent of all other
categories, not a class. CVAT: annotations/instances_default.json and images/, or images/SPLIT/
(https://docs.cvat.ai/docs/dataset_management/formats/format-coco/). Label Studio: result.json and
images/ (https://labelstud.io/guide/export). FiftyOne: labels.json and data/
(https://docs.voxel51.com/user_guide/export_datasets.html). COCO: annotations/instances_SPLIT.json
and SPLIT/. If there is no file with one of these names, any JSON file in COCO's format in the
folder or in annotations/ is read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vitdet.data.annotation_file import read_entries
from vitdet.data.annotations import CROWD, NO_OUTLINE, AnnotationValidator
from vitdet.data.segmentation import pixel_count
from vitdet.data.shared_memory import PackedList
from vitdet.datasets.importers.dataset import (
    BOX_ONLY,
    BROKEN,
    CROWDS,
    EMPTY,
    SPLIT_NAMES,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    find_image,
    split_of,
)

ROBOFLOW = "_annotations.coco.json"
NAMES = (ROBOFLOW, "result.json", "labels.json")
SPLIT = rf"(?:{'|'.join(SPLIT_NAMES)})(?:201[457])?"  # possibly with the year of COCO's splits
STEM = re.compile(rf"(?:^|[_.-])({SPLIT})(?:$|[_.-])", re.IGNORECASE)
MOST = 20  # maximum number of JSON files per folder that are read to detect the format


def annotation_files(source: Path) -> list[tuple[str, Path]]:
    """Return (split name, path) of each annotation file in a folder, or of a single JSON file."""
    if source.is_file():
        return [(_split_in(source.stem), source)] if source.suffix == ".json" else []
    folders = [source, *sorted(path for path in source.glob("[!.]*") if path.is_dir())]
    named = [
        (folder.name if folder.name.lower() in SPLIT_NAMES else "train", folder / name)
        for folder in folders
        for name in NAMES
        if (folder / name).is_file()
    ]
    instances = sorted((source / "annotations").glob("instances_*.json"))
    if named or instances:
        return named or [(path.stem.removeprefix("instances_"), path) for path in instances]
    folders = [source / "annotations", source]
    others = [path for folder in folders for path in _json_files(folder)[:MOST]]
    return [(_split_in(path.stem), path) for path in others if _is_coco_file(path)]


def is_coco(source: Path) -> bool:
    """Return whether a path is a COCO annotation file or a folder with annotation files."""
    files = annotation_files(source)
    return bool(files) and (not source.is_file() or _is_coco_file(source))


def _json_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.json"))


def _split_in(stem: str) -> str:
    match = STEM.search(stem)
    return match[1] if match else "train"


def _is_coco_file(path: Path) -> bool:
    try:
        content = read_entries(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


@dataclass
class _File:
    """An annotation file; `objects` contains rows (category id, bbox, segmentation, crowd)."""

    path: Path
    split: str
    validator: AnnotationValidator
    children: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # by parent
    objects: PackedList = field(default_factory=PackedList)
    rows: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by image id
    used: set[int] = field(default_factory=set)  # category ids that objects use

    def folders(self) -> list[Path]:
        """Return the folders that may contain the images."""
        parents = (self.path.parent, self.path.parent.parent)
        below = (self.split, f"images/{self.split}", "images", "data", "")
        return [parent / name for parent in parents for name in below if (parent / name).is_dir()]

    def root(self) -> set[int]:
        """Return {0} if category 0 is a root category without objects, otherwise an empty set."""
        name = self.validator.categories.get(0)
        if name is None or 0 in self.used or len(self.validator.categories) < 2:
            return set()
        roboflow = self.path.name == ROBOFLOW and name in self.children["none"]
        return {0} if name in self.children or roboflow else set()


def read_coco_folder(dataset: ImportedDataset) -> None:
    """Read a folder or file in COCO's format; classes are ordered by category id."""
    source, named = dataset.source, dict[str, tuple[str, Path]]()
    for name, path in annotation_files(source):
        split = split_of(name)
        if split in named:
            raise ValueError(
                f"{source}: {named[split][1]} and {path} both belong to the split {split}; pass "
                "one of these files as SRC"
            )
        named[split] = name, path
    if not named:
        raise FileNotFoundError(f"{source}: no annotation file in COCO's format")
    files = {split: _read(*pair, dataset) for split, pair in dataset.select(named).items()}
    if not source.is_file():
        paths = {path for _, path in named.values()}
        siblings = {sibling for path in paths for sibling in _json_files(path.parent)}
        dataset.notes["other JSON files ignored"] += len(siblings - paths)
    roots = set.intersection(*(file.root() for file in files.values()))
    dataset.notes["root category dropped (no object uses it)"] += len(roots)
    tables = [file.validator.categories for file in files.values()]
    categories = [item for table in tables for item in sorted(table.items())]
    images: dict[str, list[tuple[_File, int, Path]]] = {}
    folders: set[Path] = set()
    for split, file in files.items():
        images[split] = []
        for number, name in sorted(file.validator.names.items()):
            with dataset.problems.collect("missing image file"):
                folder, path = find_image(f"{file.path}: image {number}", file.folders(), name)
                images[split].append((file, number, path))
                folders.add(folder)
    names = dict.fromkeys(name for number, name in categories if number not in roots)
    dataset.define([*names], images, _read_image)
    dataset.count_unnamed(folders, [path for listed in images.values() for _, _, path in listed])


def _read(name: str, path: Path, dataset: ImportedDataset) -> _File:
    def error(kind: str, where: str, what: str) -> None:
        dataset.problems.add(kind, f"{path}: {where}: {kind}{what and ': '}{what}")

    def warning(kind: str, where: str, what: str) -> None:
        """Ignore warnings, since `_read` counts dropped objects."""

    file = _File(path, name, AnnotationValidator(False, error, warning))
    try:
        content = read_entries(path)
    except (OSError, ValueError) as problem:
        dataset.problems.add(BROKEN, f"{path}: {problem}")
        return file
    tables = file.validator.read_header(content)
    for category in tables["categories"]:
        if isinstance(category, dict):
            file.children[str(category.get("supercategory"))].add(str(category.get("name")))
    for checked in file.validator.annotations(tables["annotations"]):
        annotation, shape = checked.annotation, checked.segmentation
        crowd = checked.dropped == CROWD
        file.used.add(annotation.category_id)
        if (checked.dropped and not crowd) or min(annotation.bbox[2:]) <= 0:
            dataset.notes[EMPTY if crowd else f"objects {checked.dropped} skipped"] += 1
            continue
        if checked.unmasked and checked.unmasked != NO_OUTLINE and not crowd:
            dataset.notes[f"objects {checked.unmasked}: outline skipped"] += 1
        dataset.notes[BOX_ONLY] += not shape
        dataset.notes[CROWDS] += crowd
        file.rows[annotation.image_id].append(len(file.objects))
        file.objects.append((annotation.category_id, annotation.bbox, shape, crowd))
    return file


def _read_image(
    item: tuple[_File, int, Path], label_of: Mapping[str, int], dataset: ImportedDataset
) -> ImportedImage:
    file, number, path = item
    stated = file.validator.sizes[number] or ()
    size = dataset.check_size(f"{file.path}: image {number}", path, stated)
    objects = []
    for row in file.rows[number]:
        category, (x, y, width, height), shape, crowd = file.objects[row]
        area = float(pixel_count(shape, *size)) if shape else round(width * height, 3)
        label = label_of[file.validator.categories[category]]
        objects.append(ImportedObject(label, (x, y, width, height), shape or [], area, crowd))
    return ImportedImage(path, *size, tuple(objects))
