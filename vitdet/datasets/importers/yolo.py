"""Data sets in Ultralytics' YOLO format: data.yaml and one text file an image.

https://docs.ultralytics.com/datasets/detect/ and /segment/; what their pages leave open is as ultralytics/data/utils.py
has it: `names` is a list or a map 0: name, or only `nc`; `train`, `val` (or `validation`) and `test` name a folder, a
text file of paths, or a list of these, below `path`, and "../" that leads nowhere is left out; the labels of
.../images/x.jpg stand in .../labels/x.txt; a file that is empty or not there is a picture without objects; a row comes
once; coordinates are shares of the upright picture, at most 1 % outside.
A row of 5 numbers is class, centre x and y, width, height; one of 7, 9, ... class and outline.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from vitdet.data.annotations import is_text
from vitdet.data.images import image_size
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    BOX_ONLY,
    EMPTY,
    SUFFIXES,
    Foreign,
    Picture,
    Thing,
    box_thing,
    images_below,
    polygon_thing,
)

TOLERANCE = 0.01  # of the picture, by which a coordinate may lie outside
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def description(source: Path) -> Path | None:
    """The YAML file of a folder, or the file itself; None where there is none, or none that is meant."""
    if source.is_file():
        return source if source.suffix in (".yaml", ".yml") else None
    found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    return next(
        (path for path in found if path.stem in ("data", source.name)),
        found[0] if len(found) == 1 else None,
    )


def read_yolo(source: Path) -> Foreign:
    """The data set of a folder with data.yaml, or of such a file. Label files are read while a split is gone through.

    Raises FileNotFoundError and ValueError, in one line, for the first thing that cannot be used.
    """
    path = description(source)
    if path is None:
        raise FileNotFoundError(
            f"{source}: expected one data.yaml, which names the classes and the splits"
        )
    head = _head(path)
    names, notes = _names(path, head), Counter[str]()
    splits: dict[str, Iterable[Picture]] = {}
    for key, name in SPLITS.items():
        entries = head.get(key) or []
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(
                f"{path}: {key}: expected a folder, a text file or a list of these, got {show(entries)}"
            )
        if not entries or name in splits:
            continue
        images = list(
            dict.fromkeys(image for entry in entries for image in _images(path, head, key, entry))
        )
        if not images:
            raise ValueError(f"{path}: {key}: no image in {', '.join(entries)}")
        if any(os.path.isfile(_label_file(image)) for image in images):
            splits[name] = _Split(images, len(names), notes)
        elif name != "test":
            raise FileNotFoundError(
                f"{path}: {key}: none of {len(images)} images has a label file; expected "
                f"{_label_file(images[0])} for {images[0]}"
            )
    if "train" not in splits or "val" not in splits:
        raise ValueError(
            f"{path}: expected the keys train and val, got {', '.join(map(str, head))}"
        )
    return Foreign(names, splits, notes)


def _head(path: Path) -> dict:
    try:
        # scalars stay text: a class may be called "no"
        head = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(head, dict):
        raise ValueError(f"{path}: expected keys with values: names, train, val; got {show(head)}")
    if head.get("kpt_shape"):
        raise ValueError(f"{path}: these are key points (kpt_shape); expected boxes or outlines")
    return head


def _names(path: Path, head: dict) -> tuple[str, ...]:
    names, count = head.get("names"), head.get("nc")
    if names is None and isinstance(count, str) and count.isdecimal() and 0 < int(count) < 100_000:
        return tuple(f"class_{label}" for label in range(int(count)))
    if isinstance(names, dict) and all(str(label) in names for label in range(len(names))):
        names = [names[str(label)] for label in range(len(names))]
    if not isinstance(names, list) or not names or not all(map(is_text, names)):
        raise ValueError(
            f"{path}: names: expected a list of class names, or a map 0: name, 1: name, ...; got "
            f"{show(names)}"
        )
    if count is not None and count != str(len(names)):
        raise ValueError(f"{path}: {len(names)} names, but nc: {show(count)}")
    return tuple(names)


def _images(path: Path, head: dict, key: str, entry: str) -> list[Path]:
    """The image files of one entry of a split, by absolute path, links as they are."""
    base = Path(os.path.abspath(path.parent))
    stated = head.get("path")
    root = stated if isinstance(stated, str) else ""
    roots = list(dict.fromkeys([base / root, base, base.parent / root]))
    places = [place for root in roots for place in (root / entry, root / entry.removeprefix("../"))]
    place = next((Path(os.path.abspath(place)) for place in places if os.path.exists(place)), None)
    if place is None:
        raise FileNotFoundError(
            f"{path}: {key}: {entry} is not there, looked below {', '.join(map(str, roots))}"
        )
    if place.is_dir():
        return images_below(place)
    if place.suffix != ".txt":
        raise ValueError(f"{path}: {key}: {entry}: expected a folder or a .txt file of image paths")
    return [
        _listed(place, line.strip(), roots) for line in _text(place).splitlines() if line.strip()
    ]


def _listed(place: Path, line: str, roots: list[Path]) -> Path:
    for root in (place.parent, *roots):
        if os.path.isfile(root / line):
            if (root / line).suffix.lower() not in SUFFIXES:
                break
            return Path(os.path.abspath(root / line))
    raise FileNotFoundError(f"{place}: {line}: no such image file")


def _label_file(image: Path) -> Path:
    before, found, after = str(image).rpartition(f"{os.sep}images{os.sep}")
    return Path(f"{before}{os.sep}labels{os.sep}{after}" if found else after).with_suffix(".txt")


class _Split(Iterable[Picture]):
    """The pictures of a split, each read when it is its turn."""

    def __init__(self, images: list[Path], classes: int, notes: Counter[str]) -> None:
        self.images, self.classes, self.notes = images, classes, notes

    def __iter__(self) -> Iterator[Picture]:
        for image in self.images:
            size = image_size(image)
            label_file = _label_file(image)
            things: tuple[Thing, ...] = ()
            if os.path.isfile(label_file):
                things = tuple(self._things(label_file, size))
            else:
                self.notes["images without a label file: without objects"] += 1
            yield Picture(image, *size, things)

    def _things(self, path: Path, size: tuple[int, int]) -> Iterator[Thing]:
        seen = set()
        for number, line in enumerate(_text(path).splitlines(), 1):
            if not line.strip():
                continue
            row = _row(f"{path}:{number}", line.split(), self.classes)
            if row in seen:
                self.notes["rows that came twice, once left out"] += 1
                continue
            seen.add(row)
            thing = _thing(row, size)
            self.notes[EMPTY] += thing is None
            self.notes[BOX_ONLY] += thing is not None and len(row) == 5
            if thing is not None:
                yield thing


def _row(where: str, words: list[str], classes: int) -> tuple[float, ...]:
    if len(words) < 5 or len(words) % 2 == 0:
        raise ValueError(
            f"{where}: expected 'class x y width height' or 'class x y x y x y ...', got {len(words)} "
            f"numbers: {show(' '.join(words))}"
        )
    try:
        row = tuple(map(float, words))
    except ValueError:
        raise ValueError(f"{where}: expected numbers, got {show(' '.join(words))}") from None
    if row[0] not in range(classes):
        raise ValueError(
            f"{where}: class {words[0]}: expected a whole number from 0 to {classes - 1}, as data.yaml "
            "names them"
        )
    wrong = [
        word
        for word, value in zip(words[1:], row[1:], strict=True)
        if not math.isfinite(value) or not -TOLERANCE <= value <= 1 + TOLERANCE
    ]
    if wrong:
        raise ValueError(
            f"{where}: coordinate {wrong[0]}: expected a share of the picture, from 0 to 1"
        )
    return row


def _thing(row: tuple[float, ...], size: tuple[int, int]) -> Thing | None:
    height, width = size
    if len(row) == 5:
        x, y, wide, high = row[1] * width, row[2] * height, row[3] * width, row[4] * height
        return box_thing(
            int(row[0]), (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), size
        )
    points = [value * (height if place % 2 else width) for place, value in enumerate(row[1:])]
    return polygon_thing(int(row[0]), points, size)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text: {error}") from error
