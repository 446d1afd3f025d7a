"""Reader of Ultralytics' YOLO format: data.yaml and one text file per image.

See https://docs.ultralytics.com/datasets/detect/ and /segment/; edge cases follow
ultralytics/data/utils.py. `names` (a list, or a map of labels to names) is optional if `nc` exists.
`train`, `val` (or `valid`, `validation`) and `test`, in upper or lower case, are a folder, a text
file of image paths, or a list of these. A leading "../" is removed if the path does not exist. The
labels of .../images/x.jpg are in .../labels/x.txt; an image with an empty or missing label file has
no objects. Duplicate rows are removed. Coordinates are fractions of the upright image's sides, from
-0.01 to 1.01. A row of 5 numbers is class, center x, center y, width and height; a row of 7, 9, ...
is class and outline.

CVAT's exports list images in SUBSET.txt, with or without the prefix "data/", under the key SUBSET:
https://docs.cvat.ai/docs/dataset_management/formats/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vitdet.data.header import is_text
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    DOCUMENTS,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    Size,
    Unusable,
    files_below,
    object_from_box,
    object_from_outline,
)
from vitdet.files import read_yaml

HEAD = "entry of data.yaml that cannot be used"
TOLERANCE = 0.01  # coordinates may be outside the image by this fraction of its width or height
# keys of data.yaml, in lower case
SPLITS = dict(train="train", val="val", valid="val", validation="val", test="test")
NUMBER = re.compile(rb"[+-]?\d+(\.\d*)?")
KEYS = re.compile(r"^(names|nc|train|val)\s*:", re.MULTILINE)


def description(source: Path) -> Path | None:
    """Return `source` or, for a folder, its data.yaml; None if missing or ambiguous."""
    if source.is_file():
        return source if source.suffix in (".yaml", ".yml") else None
    paths = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    named = next((path for path in paths if path.stem in ("data", source.name)), None)
    described = [path for path in paths if KEYS.search(path.read_text(errors="replace"))]
    return named or (described[0] if len(described) == 1 else None)


def read_yolo(dataset: ImportedDataset) -> None:
    """Read data.yaml, or a folder that contains data.yaml.

    Raises FileNotFoundError or ValueError if data.yaml is unusable or has neither train nor val.
    """
    path = description(dataset.source)
    if path is None:
        expected = "expected one data.yaml with classes and splits"
        raise FileNotFoundError(f"{dataset.source}: {expected}")
    head = _Head(path, dataset)
    names: tuple[str, ...] = ()
    with dataset.problems.collect(HEAD):
        names = head.names()
    images: dict[str, list[Path]] = {}
    for known, name in SPLITS.items():
        same = [key for key in head.values if key.lower() == known]
        with dataset.problems.collect(HEAD):
            entries = [entry for key in same for entry in head.entries(key)]
            if entries and name not in images:
                listed = head.split(name, " and ".join(same), entries)
                if listed or dataset.problems.counts:
                    images[name] = listed
    if not images.keys() & {"train", "val"} and not dataset.problems.counts:
        keys = ", ".join(map(str, head.values))
        raise ValueError(f"{path}: expected images under the key train or val; keys: {keys}")
    if not names:
        return  # without class names, every row would be reported as a problem
    head.count_others({image for listed in images.values() for image in listed})
    labeled: dict[str, list[Path]] = {}
    for name, chosen in dataset.select(images).items():
        if any(os.path.isfile(_label_file(image)) for image in chosen):
            labeled[name] = chosen
        elif name == "test":
            dataset.notes["test images skipped: none has a label file"] += len(chosen)
        elif chosen:
            dataset.problems.add(
                "split without label files",
                f"{path}: {name}: no image has a label file (images: {len(chosen):,}); expected "
                f"{_label_file(chosen[0])} for {chosen[0]}",
            )
    dataset.define(names, labeled, _read_image)


class _Head:
    """The content of data.yaml, and the folders and files that its splits refer to."""

    def __init__(self, path: Path, dataset: ImportedDataset) -> None:
        self.path, self.dataset = path, dataset
        values = read_yaml(path)
        if not isinstance(values, dict):
            expected = "expected keys with values: names, train, val"
            raise ValueError(f"{path}: {expected}; got {show(values)}")
        if values.get("kpt_shape"):
            raise ValueError(f"{path}: expected boxes or outlines, got keypoints (kpt_shape)")
        self.values: dict = values
        base = Path(os.path.abspath(path.parent))
        stated = values.get("path")
        root = stated if isinstance(stated, str) else ""
        self.roots = [*dict.fromkeys([base / root, base, base.parent / root])]
        self.places: set[Path] = set()  # folders of images

    def names(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        names, count = self.values.get("names"), self.values.get("nc")
        if names is None and isinstance(count, str) and count.isdecimal():
            if 0 < int(count) < 100_000:
                return tuple(f"class_{label}" for label in range(int(count)))
        if isinstance(names, dict) and all(str(label) in names for label in range(len(names))):
            names = [names[str(label)] for label in range(len(names))]
        if not isinstance(names, list) or not names or not all(map(is_text, names)):
            raise ValueError(
                f"{self.path}: names: expected a list of class names, or a map 0: name, 1: name, "
                f"...; got {show(names)}"
            )
        if count is not None and count != str(len(names)):
            raise ValueError(f"{self.path}: names has length {len(names)}, but nc is {show(count)}")
        return tuple(names)

    def entries(self, key: str) -> list[str]:
        """Return the entries of a split; empty if the key is missing or empty."""
        entries = self.values.get(key) or []
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            expected = "expected a folder, a text file or a list of these"
            raise ValueError(f"{self.path}: {key}: {expected}, got {show(entries)}")
        return [] if entries in (["null"], ["~"]) else entries

    def split(self, name: str, key: str, entries: list[str]) -> list[Path]:
        """Return the unique images of a split. Raises ValueError if the training split has none."""
        named, dataset = ", ".join(entries), self.dataset
        optional = name == "test" or name not in (dataset.only or SPLITS)
        if optional and not any(map(self.place, entries)):
            dataset.remarks.append(f"split {name} skipped: {named} not found")
            return []
        listed = dict.fromkeys(image for entry in entries for image in self.images(key, entry))
        if not listed and not dataset.problems.counts:
            if name == "train":
                raise ValueError(f"{self.path}: {key}: no image in {named}")
            dataset.remarks.append(f"split {name} skipped: no image in {named}")
        return list(listed)

    def place(self, entry: str) -> Path | None:
        """Return the folder or file that an entry refers to; None if it does not exist."""
        names = (entry, entry.removeprefix("../"))
        places = (root / name for root in self.roots for name in names)
        return next((Path(os.path.abspath(path)) for path in places if os.path.exists(path)), None)

    def images(self, key: str, entry: str) -> Iterator[Path]:
        """Yield the absolute paths of an entry's images, without resolving links."""
        place = self.place(entry)
        if place is None:
            roots = ", ".join(map(str, self.roots))
            raise FileNotFoundError(f"{self.path}: {key}: {entry} does not exist in {roots}")
        if place.is_dir():
            self.places.add(place)
            yield from self.dataset.images_below(place)[0]
            return
        if place.suffix != ".txt":
            expected = "expected a folder or a .txt file of image paths"
            raise ValueError(f"{self.path}: {key}: {entry}: {expected}")
        for number, line in _lines(place):
            with self.dataset.problems.collect("line without an image file"):
                image = self.listed(place, number, line)
                self.places.add(image.parent)  # `count_others` searches this folder
                if self.dataset.is_image(image):
                    yield image

    def listed(self, place: Path, number: int, line: str) -> Path:
        """Return the file to which a line in a list of images refers."""
        for name in (line, line.removeprefix("data/")):
            for root in (place.parent, *self.roots):
                if os.path.isfile(root / name):
                    image = Path(os.path.abspath(root / name))
                    if image.suffix.lower() in DOCUMENTS:
                        raise ValueError(f"{place}:{number}: {line}: not a readable image")
                    return image
        raise FileNotFoundError(f"{place}:{number}: {line}: no such image file")

    def count_others(self, used: set[Path]) -> None:
        """Count images that are in no split, and label files without an image."""
        folders, notes = set(), self.dataset.notes
        for place in self.places:
            before, cut, _ = f"{place}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
            folders.add(Path(f"{before}{os.sep}images") if cut else place)
        images, others = self.dataset.images_below(*folders)
        notes["images skipped (not in any split)"] += len({*images} - used)
        self.dataset.count_left_out(others, lambda path: os.path.isfile(_label_file(path)))
        places = [path.with_name("labels") if path.name == "images" else path for path in folders]
        labels = {*files_below(*places, suffix=".txt")}
        labels -= {_label_file(image) for image in (*images, *others, *used)}
        notes["label files skipped (no image)"] += sum(map(_has_rows, labels))


def _label_file(image: Path) -> Path:
    before, cut, after = str(image).rpartition(f"{os.sep}images{os.sep}")
    return Path(f"{before}{os.sep}labels{os.sep}{after}" if cut else after).with_suffix(".txt")


def _has_rows(path: Path) -> bool:
    """Return whether a text file contains labels rather than class names or image paths."""
    with open(path, "rb") as file:
        words = file.readline(1000).split()
    return path.name != "classes.txt" and (not words or NUMBER.fullmatch(words[0]) is not None)


def _read_image(
    image: Path, label_of: Mapping[str, int], dataset: ImportedDataset
) -> ImportedImage:
    size = dataset.check_size(image, image)
    label_file = _label_file(image)
    if os.path.isfile(label_file):
        return ImportedImage(image, *size, tuple(_objects(label_file, size, dataset)))
    dataset.notes["images without a label file (no objects)"] += 1
    return ImportedImage(image, *size, ())


def _objects(path: Path, size: Size, dataset: ImportedDataset) -> Iterator[ImportedObject]:
    seen = set()
    for number, line in _lines(path):
        row = None
        with dataset.problems.collect("row that cannot be used"):
            row = _row(f"{path}:{number}", line, len(dataset.class_names))
        if row in seen:
            dataset.notes["duplicate rows removed"] += 1
        elif row is not None:
            seen.add(row)
            yield from dataset.keep(_object(row, size))


def _row(where: str, line: str, classes: int) -> tuple[float, ...]:
    words = line.split()
    if len(words) < 5 or len(words) % 2 == 0:
        raise Unusable(
            "row of the wrong length",
            f"{where}: expected 'class x y width height' or 'class x y x y x y ...', got "
            f"a row of length {len(words)}: {show(' '.join(words))}",
        )
    try:
        row = tuple(map(float, words))
    except ValueError:
        text = f"{where}: expected numbers, got {show(' '.join(words))}"
        raise Unusable("row with text instead of a number", text) from None
    if row[0] not in range(classes):
        raise Unusable(
            "class that is not in data.yaml",
            f"{where}: class {words[0]}: expected a whole number from 0 to {classes - 1}, an index "
            "of the names in data.yaml",
        )
    for word, value in zip(words[1:], row[1:], strict=True):
        if not -TOLERANCE <= value <= 1 + TOLERANCE:  # also true for NaN
            text = f"{where}: coordinate {word}: expected a fraction of the image, from 0 to 1"
            raise Unusable("coordinate outside its image", text)
    return row


def _object(row: tuple[float, ...], size: Size) -> ImportedObject | None:
    height, width = size
    if len(row) == 5:
        x, y, wide, high = row[1] * width, row[2] * height, row[3] * width, row[4] * height
        corners = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
        return object_from_box(int(row[0]), corners, size)
    points = [value * (height if index % 2 else width) for index, value in enumerate(row[1:])]
    return object_from_outline(int(row[0]), [points], size)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Return (line number, line) of the non-empty lines of a text file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file: {error}") from error
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return ((number, line) for number, line in lines if line)
