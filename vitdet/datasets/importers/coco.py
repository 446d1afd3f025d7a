"""Reader of COCO's annotations in the layouts of annotation tools.

Format: https://cocodataset.org/#format-data. Roboflow: train|valid|test/_annotations.coco.json
next to the images (https://roboflow.com/formats/coco-json); its category 0 is the root of the
others, not a class. CVAT: annotations/instances_default.json and images/, or images/SPLIT/
(https://docs.cvat.ai/docs/dataset_management/formats/format-coco/). Label Studio: result.json and
images/ (https://labelstud.io/guide/export). FiftyOne: labels.json and data/
(https://docs.voxel51.com/user_guide/export_datasets.html). COCO: annotations/instances_SPLIT.json
and SPLIT/. Or any JSON file in this format, with the images next to it or in a folder with one of
these names.
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
    SPLIT_NAMES,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    find_image,
    split_of,
)

ROBOFLOW = "_annotations.coco.json"
NAMES = (ROBOFLOW, "result.json", "labels.json")
STEM = re.compile(rf"(?:^|[_.-])({'|'.join(SPLIT_NAMES)})(?:$|[_.-])", re.IGNORECASE)
MOST = 20  # JSON files that are read to detect the format


def annotation_files(source: Path) -> list[tuple[str, Path]]:
    """Return the annotation files of a folder, or the file itself, by the name of their split."""
    if source.is_file():
        return [(_split(source.stem), source)] if source.suffix == ".json" else []
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    named = [
        (folder.name if folder.name.lower() in SPLIT_NAMES else "train", folder / name)
        for folder in folders
        for name in NAMES
        if (folder / name).is_file()
    ]
    instances = sorted((source / "annotations").glob("instances_*.json"))
    if named or instances:
        return named or [(path.stem.removeprefix("instances_"), path) for path in instances]
    others = [one for folder in ("annotations", "") for one in _json_files(source / folder)[:MOST]]
    return [(_split(path.stem), path) for path in others if _is_coco_file(path)]


def is_coco(source: Path) -> bool:
    """Return whether a path is such an annotation file or a folder that contains some."""
    files = annotation_files(source)
    return bool(files) and (not source.is_file() or _is_coco_file(source))


def _json_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _split(stem: str) -> str:
    found = STEM.search(stem)
    return found[1] if found else "train"


def _is_coco_file(path: Path) -> bool:
    try:
        content = read_entries(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


@dataclass
class _File:
    """An annotation file; objects: (category, bbox, segmentation, is a crowd), rows: by image."""

    path: Path
    split: str
    validator: AnnotationValidator
    parents: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    objects: PackedList = field(default_factory=PackedList)
    rows: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    used: set[int] = field(default_factory=set)

    def folders(self) -> list[Path]:
        """Return the possible folders of its images."""
        parents = (self.path.parent, self.path.parent.parent)
        below = (self.split, f"images/{self.split}", "images", "data", "")
        return [parent / name for parent in parents for name in below if (parent / name).is_dir()]

    def root(self) -> set[int]:
        """Return category 0 if unused and a parent category, or Roboflow's root."""
        name = self.validator.categories.get(0)
        if name is None or 0 in self.used or len(self.validator.categories) < 2:
            return set()
        roboflow = self.path.name == ROBOFLOW and name in self.parents["none"]
        return {0} if name in self.parents or roboflow else set()


def read_coco_folder(found: ImportedDataset) -> None:
    """Read such a folder or file; classes in the order of the categories. Images are read later."""
    source, there = found.source, dict[str, tuple[str, Path]]()
    for name, path in annotation_files(source):
        split = split_of(name)
        if split in there:
            raise ValueError(
                f"{source}: {there[split][1]} and {path} both belong to the split {split}; give "
                "one of them as SRC"
            )
        there[split] = name, path
    if not there:
        raise FileNotFoundError(f"{source}: no annotation file in COCO's format")
    files = {split: _read(*one, found) for split, one in found.select(there).items()}
    if not source.is_file():
        paths = {path for _, path in there.values()}
        beside = {one for path in paths for one in _json_files(path.parent)}
        found.notes["other JSON files ignored"] += len(beside - paths)
    roots = set.intersection(*(file.root() for file in files.values()))
    found.notes["root category dropped (no object uses it)"] += len(roots)
    categories = [
        one for file in files.values() for one in sorted(file.validator.categories.items())
    ]
    images: dict[str, list[tuple[_File, int, Path]]] = {}
    folders: set[Path] = set()
    for split, file in files.items():
        images[split] = []
        for number, name in sorted(file.validator.names.items()):
            with found.problems.collect("missing image file"):
                folder, path = find_image(f"{file.path}: image {number}", file.folders(), name)
                images[split].append((file, number, path))
                folders.add(folder)
    names = dict.fromkeys(name for number, name in categories if number not in roots)
    found.define([*names], images, _picture)
    found.count_unnamed(folders, [path for listed in images.values() for _, _, path in listed])


def _read(name: str, path: Path, found: ImportedDataset) -> _File:
    def error(kind: str, where: str, what: str) -> None:
        found.problems.add(kind, f"{path}: {where}: {kind}{what and ': '}{what}")

    def warning(kind: str, where: str, what: str) -> None:
        """Ignore warnings: dropped objects are counted below."""

    file = _File(path, name, AnnotationValidator(False, error, warning))
    try:
        content = read_entries(path)
    except (OSError, ValueError) as problem:
        found.problems.add(BROKEN, f"{path}: {problem}")
        return file
    tables = file.validator.read_header(content)
    for category in tables["categories"]:
        if isinstance(category, dict):
            file.parents[str(category.get("supercategory"))].add(str(category.get("name")))
    for one in file.validator.annotations(tables["annotations"]):
        annotation, crowd = one.annotation, one.dropped == CROWD
        file.used.add(annotation.category_id)
        if (one.dropped and not crowd) or min(annotation.bbox[2:]) <= 0:
            found.notes[f"objects {one.dropped} skipped"] += 1
            continue
        if one.unmasked and one.unmasked != NO_OUTLINE and not crowd:
            found.notes[f"objects {one.unmasked}: outline skipped"] += 1
        found.notes[BOX_ONLY] += not one.segmentation
        file.rows[annotation.image_id].append(len(file.objects))
        file.objects.append((annotation.category_id, annotation.bbox, one.segmentation, crowd))
    return file


def _picture(
    item: tuple[_File, int, Path], label_of: Mapping[str, int], found: ImportedDataset
) -> ImportedImage:
    file, number, path = item
    stated = file.validator.sizes[number] or ()
    size = found.check_size(f"{file.path}: image {number}", path, stated)
    things = []
    for row in file.rows[number]:
        category, (x, y, width, height), shape, crowd = file.objects[row]
        area = float(pixel_count(shape, *size)) if shape else round(width * height, 3)
        label = label_of[file.validator.categories[category]]
        things.append(ImportedObject(label, (x, y, width, height), shape or [], area, crowd))
    return ImportedImage(path, *size, tuple(things))
