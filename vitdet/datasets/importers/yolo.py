"""Reader of Ultralytics' YOLO format: data.yaml and one text file per image.

https://docs.ultralytics.com/datasets/detect/ and /segment/; details as in
ultralytics/data/utils.py: `names` is a list or a map 0: name, or only `nc`; `train`, `val` (or
`validation`) and `test` name a folder, a text file of paths, or a list of these, below `path`, and
a "../" that does not exist is removed; the labels of .../images/x.jpg are in .../labels/x.txt; an
empty or missing file means no objects; duplicate rows are removed; coordinates are relative to the
upright image, at most 1 % outside. CVAT's exports have the paths of images in train.txt, with or
without the prefix "data/", and no `val`: https://docs.cvat.ai/docs/dataset_management/formats/

A row of 5 numbers is class, centre x and y, width, height; one of 7, 9, ... class and outline.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import yaml

from vitdet.data.header import is_text
from vitdet.data.images import DEFAULT, Reading
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    DOCUMENTS,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    ImportedSplit,
    Unusable,
    files_below,
    object_from_box,
    object_from_outline,
)

HEAD = "entry of data.yaml that cannot be used"
TOLERANCE = 0.01  # tolerance of coordinates outside of the image, as a fraction
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
NUMBER = re.compile(rb"[+-]?\d+(\.\d*)?")
KEYS = re.compile(r"^(names|nc|train|val)\s*:", re.MULTILINE)


def description(source: Path) -> Path | None:
    """Return the YAML file of a folder, or the file itself; None if there is none, or it is not
    clear which.
    """
    if source.is_file():
        return source if source.suffix in (".yaml", ".yml") else None
    found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    named = next((path for path in found if path.stem in ("data", source.name)), None)
    described = [path for path in found if KEYS.search(path.read_text(errors="replace"))]
    return named or (described[0] if len(described) == 1 else None)


def read_yolo(
    source: Path, only: Collection[str] = (), reading: Reading = DEFAULT
) -> ImportedDataset:
    """Read a folder with data.yaml, or such a file. Label files are read on iteration over a split.

    Raises FileNotFoundError and ValueError if data.yaml cannot be read or has neither train nor
    val.
    """
    path = description(source)
    if path is None:
        raise FileNotFoundError(
            f"{source}: expected one data.yaml, which names the classes and the splits"
        )
    head = _head(path)
    found = ImportedDataset(reading)
    with found.problems.collect(HEAD):
        found.class_names = _names(path, head)
    places: set[Path] = set()
    images: dict[str, list[Path]] = {}
    for key, name in SPLITS.items():
        with found.problems.collect(HEAD):
            if name not in images and (entries := _entries(path, head, key)):
                listed = _split(path, head, key, entries, places, found)
                if listed or found.problems.counts:
                    images[name] = listed
    if not images.keys() & {"train", "val"} and not found.problems.counts:
        raise ValueError(
            f"{path}: expected the keys train and val, got {', '.join(map(str, head))}"
        )
    if not found.class_names:  # else each row would be wrong, too
        return found
    _account(places, {image for listed in images.values() for image in listed}, found)
    for name, chosen in found.select(path, images, only).items():
        if any(os.path.isfile(_label_file(image)) for image in chosen):
            found.splits[name] = ImportedSplit(
                chosen, lambda image: _picture(image, found), found.problems
            )
        elif name == "test":
            found.notes["images of the split test skipped, none has a label file"] += len(chosen)
        elif chosen:
            found.problems.add(
                "split without label files",
                f"{path}: {name}: none of {len(chosen)} images has a label file; expected "
                f"{_label_file(chosen[0])} for {chosen[0]}",
            )
    return found


def _entries(path: Path, head: dict, key: str) -> list[str]:
    """Return the entries of a split; empty if the key is missing or empty. Scalars are text
    here.
    """
    entries = head.get(key) or []
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(
            f"{path}: {key}: expected a folder, a text file or a list of these, got {show(entries)}"
        )
    return [] if entries in (["null"], ["~"]) else entries


def _split(
    path: Path, head: dict, key: str, entries: list[str], places: set[Path], found: ImportedDataset
) -> list[Path]:
    """Return the unique images of a split. Raises ValueError if the training split has none."""
    name = SPLITS[key]
    if name == "test" and not any(_place(path, head, entry)[0] for entry in entries):
        found.remarks.append(f"split test skipped: {', '.join(entries)} does not exist")
        return []
    listed = dict.fromkeys(
        image for entry in entries for image in _images(path, head, key, entry, places, found)
    )
    if not listed and not found.problems.counts:
        if name == "train":
            raise ValueError(f"{path}: {key}: no image in {', '.join(entries)}")
        found.remarks.append(f"split {name} skipped: no image in {', '.join(entries)}")
    return list(listed)


def _head(path: Path) -> dict:
    try:
        # scalars stay text: a class may be named "no"
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


def _place(path: Path, head: dict, entry: str) -> tuple[Path | None, list[Path]]:
    """Return the folder or file that an entry of a split refers to, None if it does not exist, and
    the searched folders.
    """
    base = Path(os.path.abspath(path.parent))
    stated = head.get("path")
    root = stated if isinstance(stated, str) else ""
    roots = list(dict.fromkeys([base / root, base, base.parent / root]))
    places = [place for root in roots for place in (root / entry, root / entry.removeprefix("../"))]
    return next((Path(os.path.abspath(one)) for one in places if os.path.exists(one)), None), roots


def _images(
    path: Path, head: dict, key: str, entry: str, places: set[Path], found: ImportedDataset
) -> Iterator[Path]:
    """Return the image files of one entry of a split, by absolute path without resolving links;
    adds their folders to `places`.
    """
    place, roots = _place(path, head, entry)
    if place is None:
        raise FileNotFoundError(
            f"{path}: {key}: {entry} is not there, looked below {', '.join(map(str, roots))}"
        )
    if place.is_dir():
        places.add(place)
        yield from found.images_below(place)[0]
        return
    if place.suffix != ".txt":
        raise ValueError(f"{path}: {key}: {entry}: expected a folder or a .txt file of image paths")
    for number, line in enumerate(_text(place).splitlines(), 1):
        if not line.strip():
            continue
        with found.problems.collect("line without an image file"):
            image = _listed(place, number, line.strip(), roots)
            places.add(image.parent)  # where `_account` counts those of other formats
            if found.is_image(image):
                yield image


def _listed(place: Path, number: int, line: str, roots: list[Path]) -> Path:
    for name in (line, line.removeprefix("data/")):
        for root in (place.parent, *roots):
            if os.path.isfile(root / name):
                image = Path(os.path.abspath(root / name))
                if image.suffix.lower() in DOCUMENTS:
                    raise ValueError(f"{place}:{number}: {line}: not a readable image")
                return image
    raise FileNotFoundError(f"{place}:{number}: {line}: no such image file")


def _label_file(image: Path) -> Path:
    before, found, after = str(image).rpartition(f"{os.sep}images{os.sep}")
    return Path(f"{before}{os.sep}labels{os.sep}{after}" if found else after).with_suffix(".txt")


def _account(places: Iterable[Path], used: set[Path], found: ImportedDataset) -> None:
    """Count the image and label files that are in no split."""
    folders = set()
    for place in places:
        before, cut, _ = f"{place}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
        folders.add(Path(f"{before}{os.sep}images") if cut else place)
    images, others = found.images_below(*folders)
    found.notes["images that no split contains skipped"] += len({*images} - used)
    found.count_left_out(others, lambda path: os.path.isfile(_label_file(path)))
    beside = [one.with_name("labels") if one.name == "images" else one for one in folders]
    labels = {*files_below(*beside, suffix=".txt")}
    labels -= {_label_file(image) for image in (*images, *others, *used)}
    found.notes["label files without an image skipped"] += sum(map(_has_rows, labels))


def _has_rows(path: Path) -> bool:
    """Return whether a text file contains labels, and is not classes.txt, a list of images or other
    text.
    """
    with open(path, "rb") as file:
        words = file.readline(1000).split()
    return path.name != "classes.txt" and (not words or NUMBER.fullmatch(words[0]) is not None)


def _picture(image: Path, found: ImportedDataset) -> ImportedImage:
    size = found.check_size(image, image)
    label_file = _label_file(image)
    if os.path.isfile(label_file):
        return ImportedImage(image, *size, tuple(_things(label_file, size, found)))
    found.notes["images without a label file: without objects"] += 1
    return ImportedImage(image, *size, ())


def _things(path: Path, size: tuple[int, int], found: ImportedDataset) -> Iterator[ImportedObject]:
    seen = set()
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        row = None
        with found.problems.collect("row that cannot be used"):
            row = _row(f"{path}:{number}", line.split(), len(found.class_names))
        if row is None:
            continue
        if row in seen:
            found.notes["duplicate rows removed"] += 1
            continue
        seen.add(row)
        yield from found.keep(_thing(row, size))


def _row(where: str, words: list[str], classes: int) -> tuple[float, ...]:
    if len(words) < 5 or len(words) % 2 == 0:
        raise Unusable(
            "row of the wrong length",
            f"{where}: expected 'class x y width height' or 'class x y x y x y ...', got "
            f"{len(words)} "
            f"numbers: {show(' '.join(words))}",
        )
    try:
        row = tuple(map(float, words))
    except ValueError:
        raise Unusable(
            "row with text instead of a number",
            f"{where}: expected numbers, got {show(' '.join(words))}",
        ) from None
    if row[0] not in range(classes):
        raise Unusable(
            "class that is not in data.yaml",
            f"{where}: class {words[0]}: expected a whole number from 0 to {classes - 1}, as "
            "data.yaml "
            "names them",
        )
    wrong = [
        word
        for word, value in zip(words[1:], row[1:], strict=True)
        if not math.isfinite(value) or not -TOLERANCE <= value <= 1 + TOLERANCE
    ]
    if wrong:
        raise Unusable(
            "coordinate outside of its image",
            f"{where}: coordinate {wrong[0]}: expected a fraction of the image, from 0 to 1",
        )
    return row


def _thing(row: tuple[float, ...], size: tuple[int, int]) -> ImportedObject | None:
    height, width = size
    if len(row) == 5:
        x, y, wide, high = row[1] * width, row[2] * height, row[3] * width, row[4] * height
        return object_from_box(
            int(row[0]), (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), size
        )
    points = [value * (height if place % 2 else width) for place, value in enumerate(row[1:])]
    return object_from_outline(int(row[0]), [points], size)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text: {error}") from error
