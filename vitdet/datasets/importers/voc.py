"""Data sets in Pascal VOC's layout: Annotations/ID.xml, JPEGImages/ID.jpg, ImageSets/Main/SPLIT.txt.

Everingham and Winn, The PASCAL VOC 2012 Development Kit, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/: the
pixel at the top left is (1, 1) and a box holds its last row and column, so xmin..xmax are the x from xmin - 1 to xmax;
detections of `difficult` objects count neither way, which is what COCO calls a crowd; in SegmentationObject/ID.png,
where there is one, the pixels of object n of the XML file have the value n, background 0, and 255 is the rim between
objects, which is nobody's. Files per class (aeroplane_train.txt) have a second column and are no splits.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers.expat import ExpatError, ParserCreate

import numpy as np
import torch
from PIL import Image

from vitdet.data.images import image_size
from vitdet.data.masks import encode
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    BOX_ONLY,
    EMPTY,
    SUFFIXES,
    Foreign,
    Picture,
    Thing,
    box_thing,
)

LARGEST = 4 << 20  # bytes of an XML file; one of VOC's has some thousands
RIM = 255


def read_voc(source: Path) -> Foreign:
    """The data set of a folder with Annotations/, JPEGImages/ and ImageSets/Main/; classes in order of the alphabet.

    Raises FileNotFoundError and ValueError, in one line, for the first thing that cannot be used.
    """
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        if not (source / name).is_dir():
            raise FileNotFoundError(
                f"{source / name}: not there; expected Annotations/ID.xml, JPEGImages/ID.jpg and "
                "ImageSets/Main/train.txt, val.txt with an ID a line"
            )
    found, notes = {}, Counter[str]()
    for split, ids in _splits(source).items():
        if split == "test" and not any(os.path.isfile(_xml(source, one)) for one in ids):
            continue  # as VOC2012 has it: the answers are not published
        found[split] = [_parse(_xml(source, one)) for one in ids]
    names = sorted(
        {
            _text(path, thing, "name")
            for trees in found.values()
            for path, tree in trees
            for thing in tree.findall("object")
        }
    )
    if not names:
        raise ValueError(f"{source / 'Annotations'}: no object in any file")
    label_of = {name: label for label, name in enumerate(names)}
    splits: dict[str, Iterable[Picture]] = {
        split: [_picture(source, path, tree, label_of, notes) for path, tree in trees]
        for split, trees in found.items()
    }
    return Foreign(tuple(names), splits, notes)


def _xml(source: Path, one: str) -> Path:
    return source / "Annotations" / f"{one}.xml"


def _splits(source: Path) -> dict[str, list[str]]:
    """The IDs of each split; without trainval where train and val are there."""
    splits = {}
    for path in sorted((source / "ImageSets" / "Main").glob("*.txt")):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        lines = [line.split() for line in text.splitlines() if line.strip()]
        if lines and all(len(words) == 1 for words in lines):
            ids = list(dict.fromkeys(words[0] for words in lines))
            wrong = [one for one in ids if Path(one).is_absolute() or ".." in Path(one).parts]
            if wrong:
                raise ValueError(
                    f"{path}: {wrong[0]}: expected the name of an image without its ending"
                )
            splits[path.stem] = ids
    if not splits:
        raise FileNotFoundError(
            f"{source / 'ImageSets' / 'Main'}: no train.txt or val.txt with an ID a line"
        )
    if "train" in splits and "val" in splits:
        splits.pop("trainval", None)
    return splits


def _parse(path: Path) -> tuple[Path, Element]:
    """The file and its tree. A DOCTYPE is refused: only it can define entities, with which small files grow huge."""

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE, which annotations do not need")

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such annotation file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are no annotation of one image")
    builder, parser = TreeBuilder(), ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except (ExpatError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not XML that can be read: {error}") from error
    return path, builder.close()


def _picture(
    source: Path, path: Path, tree: Element, label_of: dict[str, int], notes: Counter[str]
) -> Picture:
    image = _image(source, path, tree)
    size = image_size(image)
    stated = tuple(tree.findtext(f"size/{side}", "0").strip() for side in ("height", "width"))
    if stated != ("0", "0") and stated != tuple(map(str, size)):
        raise ValueError(
            f"{path}: the size is {stated[1]} x {stated[0]}, but {image} is {size[1]} x {size[0]} (width "
            "x height, upright)"
        )
    objects = tree.findall("object")
    numbers = _numbers(source, path, size, len(objects))
    things = []
    for number, element in enumerate(objects, 1):
        crowd = element.findtext("difficult", "0").strip().lower() in ("1", "true")
        box = _corners(path, element, size)
        thing = box_thing(label_of[_text(path, element, "name")], box, size, crowd)
        pixels = None if numbers is None else numbers == number
        if thing is None:
            notes[EMPTY] += 1
            continue
        if pixels is None or not pixels.any():
            notes[BOX_ONLY] += 1
        else:
            thing = Thing(
                thing.label,
                thing.box,
                encode(torch.from_numpy(pixels[None]))[0],
                float(pixels.sum()),
                crowd,
            )
        notes[
            "difficult objects: training leaves them out, evaluation counts them neither way"
        ] += crowd
        things.append(thing)
    return Picture(image, *size, tuple(things))


def _image(source: Path, path: Path, tree: Element) -> Path:
    """The file of the same name, else the one that `filename` says, in JPEGImages alone."""
    folder = source / "JPEGImages"
    stem = folder / path.relative_to(source / "Annotations").with_suffix("")
    for suffix in (".jpg", *sorted(SUFFIXES), *(suffix.upper() for suffix in sorted(SUFFIXES))):
        if os.path.isfile(stem.parent / (stem.name + suffix)):
            return stem.parent / (stem.name + suffix)
    named = Path(tree.findtext("filename", "").strip().replace("\\", "/")).name
    if named and os.path.isfile(folder / named):
        return folder / named
    raise FileNotFoundError(f"{path}: no image {stem}.jpg (.png, ...)")


def _numbers(source: Path, path: Path, size: tuple[int, int], objects: int) -> np.ndarray | None:
    """Which object each pixel (H, W) is of, from 1; None without a file."""
    file = (
        source / "SegmentationObject" / path.relative_to(source / "Annotations").with_suffix(".png")
    )
    if not os.path.isfile(file):
        return None
    if image_size(file) != size:
        raise ValueError(
            f"{file}: not of the size of its image, {size[1]} x {size[0]} (width x height)"
        )
    try:
        with Image.open(file) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"expected an image of numbers (palette), got one of mode {image.mode}"
                )
            numbers = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    largest = int(numbers.max(where=numbers != RIM, initial=0))
    if largest > objects:
        raise ValueError(f"{file}: has an object {largest}, but {path} names {objects}")
    return numbers


def _corners(
    path: Path, element: Element, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    words = [element.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = map(float, words)
    except ValueError:
        raise ValueError(
            f"{path}: bndbox: expected numbers xmin, ymin, xmax, ymax, got {show(words)}"
        ) from None
    height, width = size
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
        raise ValueError(
            f"{path}: bndbox: expected xmin <= xmax and ymin <= ymax, got {show(words)}"
        )
    if x0 > width or y0 > height or x1 < 1 or y1 < 1:
        raise ValueError(
            f"{path}: bndbox: {show(words)} lies outside the image of {width} x {height} pixels"
        )
    return x0 - 1, y0 - 1, x1, y1


def _text(path: Path, element: Element, key: str) -> str:
    text = " ".join(element.findtext(key, "").split())
    if not text:
        raise ValueError(f"{path}: an object without <{key}>")
    return text
