"""Reader of Pascal VOC's format: an XML file per image.

Everingham and Winn, The PASCAL VOC 2012 Development Kit,
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/: Annotations/ID.xml, JPEGImages/ID.jpg and
ImageSets/Main/SPLIT.txt with one ID per line; the pixel at the top left is (1, 1) and a box
includes its last row and column, so xmin..xmax are the x from xmin - 1 to xmax; `difficult` objects
are ignored in evaluation, like COCO's crowds; in SegmentationObject/ID.png, if present, the pixels
of object n of the XML file have the value n, background 0, and 255 is the border between objects,
which is ignored. Files per class (aeroplane_train.txt) have a second column and are not splits.

Annotation tools differ: CVAT quotes IDs with a space
(https://docs.cvat.ai/docs/dataset_management/formats/format-voc/) and lists masks in
ImageSets/Segmentation; without ImageSets, XML files are next to the images in train/, valid/ and
test/ (https://roboflow.com/formats/pascal-voc-xml) or in one folder; <polygon> is an outline of x1,
y1, x2, y2, ... or of points <pt> in pixels from 0, whose box is used.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from PIL import Image

from vitdet.data.images import image_size
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    BROKEN,
    SPLIT_NAMES,
    THIN,
    Box,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
    Size,
    Unusable,
    files_below,
    object_from_box,
    object_from_mask,
    object_from_outline,
    pixels_of,
    split_of,
)
from vitdet.datasets.importers.xml_file import has_root, read_xml

LARGEST = 4 << 20  # maximum bytes of an XML file; VOC's have a few thousand
RIM = 255
LISTS = ("ImageSets/Main", "ImageSets/Segmentation", "ImageSets")
# an ID, possibly quoted, and its value in a list of one class: absent, difficult, there
ROW = re.compile(r'(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>.*?))(?:\s+(?P<presence>-1|0|1))?')

Item = tuple[Path, Element, Path]  # XML file, its root element, and the image


def is_voc(source: Path) -> bool:
    """Return whether a folder contains Annotations/*.xml, or XML files of images."""
    if (source / "Annotations").is_dir():
        return True
    if not source.is_dir():
        return False
    folders = (source, *sorted(path for path in source.iterdir() if path.is_dir()))
    firsts = (next(folder.glob("*.xml"), None) for folder in folders)
    return any(path is not None and has_root(path, "annotation") for path in firsts)


def read_voc(found: ImportedDataset) -> None:
    """Read such a folder; classes in alphabetical order. XML files are read here, images later."""
    folders = _Folders(found)
    splits = folders.splits()
    items: dict[str, list[Item]] = {}
    for split, paths in found.select(splits).items():
        if split == "test" and not any(map(os.path.isfile, paths)):
            # as in VOC2012, whose test annotations are not published
            note = "test images skipped: none has an annotation file"
            found.notes[note] += len(paths)
            continue
        items[split] = []
        for path, where in paths.items():
            with found.problems.collect(BROKEN):
                if not os.path.isfile(path):
                    text = f"{where}{path}: no such annotation file"
                    raise Unusable("missing annotation file", text)
                tree = read_xml(path, LARGEST)
                items[split].append((path, tree, folders.image(path, tree)))
    every = [item for listed in items.values() for item in listed]
    folders.count_others(splits, {image for _, _, image in every})
    names = set()
    for path, tree, _ in every:
        for element in tree.findall("object"):
            names.add(name := _name(element))
            if not name:
                found.problems.add("object without a name", f"{path}: an object without <name>")
    if not names and not found.problems.counts:
        raise ValueError(f"{folders.annotations}: no object in any file")
    found.define(sorted(names - {""}), items, partial(_picture, folders))


class _Folders:
    """The XML files, images and lists of a data set."""

    def __init__(self, found: ImportedDataset) -> None:
        source, self.found = found.source, found
        self.annotations = source / "Annotations"
        if not self.annotations.is_dir():
            self.annotations = source
        usual = [source / name for name in ("JPEGImages", "images", "Images")]
        self.images = next((folder for folder in usual if folder.is_dir()), self.annotations)
        lists = (source / name for name in LISTS)
        self.lists = next((folder for folder in lists if any(folder.glob("*.txt"))), None)
        self.files, self.others = found.images_below(self.images)
        self.by_stem: dict[Path, list[Path]] = defaultdict(list)
        for path in self.files:
            self.by_stem[self.image_stem(path)].append(path)

    def stem(self, path: Path) -> Path:
        """Return the ID of an XML file."""
        return path.relative_to(self.annotations).with_suffix("")

    def image_stem(self, path: Path) -> Path:
        """Return the ID of an image."""
        return path.relative_to(self.images).with_suffix("")

    def image(self, path: Path, tree: Element) -> Path:
        """Return the image of an XML file: by the same name, else `filename` in `images`."""
        named = Path((tree.findtext("filename") or "").strip().replace("\\", "/")).name
        stem = self.stem(path)
        if same := self.by_stem.get(stem):
            return min(same, key=lambda one: (one.suffix.lower() != ".jpg", one.name != named))
        for image in (self.images / named, self.images / stem.parent / named):
            if named and os.path.isfile(image) and self.found.is_image(image):
                return image
        for other in self.others:
            if self.image_stem(other) == stem:
                raise Unusable("image that cannot be read", f"{other}: not a known image format")
        text = f"{path}: no image {self.images / stem}.jpg (.png, ...)"
        raise Unusable("missing image file", text)

    def xml(self, one: str) -> Path:
        """Return the XML file of an ID, which may have the suffix of its image."""
        stem = one.rpartition(".")[0]
        path, shorter = (self.annotations / f"{name}.xml" for name in (one, stem))
        return shorter if stem and not os.path.isfile(path) and os.path.isfile(shorter) else path

    def splits(self) -> dict[str, dict[Path, str]]:
        """Return the XML files of each split, with the location in its list.

        trainval is left out if train and val exist.
        """
        splits: dict[str, dict[Path, str]] = defaultdict(dict)
        if self.lists is None:
            paths = files_below(self.annotations, suffix=".xml")
            if not paths:
                raise FileNotFoundError(f"{self.annotations}: no XML file")
            firsts = {path: self.stem(path).parts[0].lower() for path in paths}
            # otherwise these are names of files, or folders that are not splits
            divided = {*firsts.values()} <= SPLIT_NAMES.keys()
            for path, first in firsts.items():
                splits[split_of(first) if divided else "train"][path] = ""
            return splits
        lists = sorted(self.lists.glob("*.txt"))
        counts = Counter(split_of(path.stem) for path in lists)
        for path in lists:
            name = split_of(path.stem)
            if ids := self.ids(path):
                splits[name if counts[name] == 1 else path.stem] = ids
        if not splits and not self.found.problems.counts:
            raise FileNotFoundError(f"{self.lists}: no train.txt or val.txt with one ID per line")
        if "train" in splits and "val" in splits:
            left = splits.pop("trainval", {}).keys() - splits["train"].keys() - splits["val"].keys()
            note = "IDs of trainval.txt skipped, in neither train.txt nor val.txt"
            self.found.notes[note] += len(left)
        return splits

    def ids(self, path: Path) -> dict[Path, str]:
        """Return the XML files that a list names, with line numbers; none for a list of one class.

        Lines that are neither an ID nor a row of a list of one class are problems.
        """
        found, ids = self.found, dict[Path, str]()
        rows = problems = 0
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        for number, line in enumerate(map(str.strip, text.splitlines()), 1):
            match = ROW.fullmatch(line)
            if not line or match is None:
                continue
            quoted = match["quoted"]
            one = match["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            known = next((name for name in (line, one) if os.path.isfile(self.xml(name))), None)
            if match["presence"] and known != line:
                rows += 1
                continue
            problem = ""
            if Path(one).is_absolute() or ".." in Path(one).parts:
                problem = f"{line}: expected the name of an image without its extension"
            elif known is None and quoted is None and len(line.split()) > 1:
                problem = f"{show(line)}: expected an ID, but there is no file {self.xml(line)}"
            if problem:
                problems += 1
                found.problems.add("line that is not an ID", f"{path}:{number}: {problem}")
            else:
                ids[self.xml(known or one)] = f"{path}:{number}: "
        if rows and ids:
            text = f"{path}: {len(ids)} IDs and {rows} rows 'ID -1|0|1' of a list of one class"
            found.problems.add("list file of two kinds", text)
        elif rows:
            found.notes["lists of one class (ID and a second column) ignored"] += 1
        elif not ids and not problems:
            found.remarks.append(f"split {split_of(path.stem)} skipped: {path} has no IDs")
        return ids

    def count_others(self, splits: dict[str, dict[Path, str]], used: set[Path]) -> None:
        """Count the annotation and image files that are in no split."""
        notes, there = self.found.notes, {*files_below(self.annotations, suffix=".xml")}
        left = there.difference(*splits.values())
        notes["annotation files skipped (not in any list)"] += len(left)
        stems = {self.stem(path) for path in there}
        unnamed = [path for path in self.files if self.image_stem(path) not in stems]
        notes["images without an annotation file skipped"] += len({*unnamed} - used)
        self.found.count_left_out(self.others, lambda path: self.image_stem(path) in stems)

    def numbers(self, path: Path, size: Size, objects: int) -> np.ndarray | None:
        """Return the object number of each pixel (H, W), from 1; None without a file."""
        file = self.found.source / "SegmentationObject" / f"{self.stem(path)}.png"
        if not os.path.isfile(file):
            return None
        if image_size(file, self.found.reading) != size:
            sides = f"{size[1]} x {size[0]} (width x height)"
            raise ValueError(f"{file}: its size differs from that of the image: {sides}")
        try:
            with Image.open(file) as image:
                if image.mode not in ("P", "L"):
                    expected = "expected a palette or grayscale image of object numbers, got mode"
                    raise ValueError(f"{expected} {image.mode}")
                numbers = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        largest = int(numbers.max(where=numbers != RIM, initial=0))
        if largest > objects:
            raise ValueError(f"{file}: has an object {largest}, but {path} lists {objects}")
        return numbers


def _picture(
    folders: _Folders, item: Item, label_of: Mapping[str, int], found: ImportedDataset
) -> ImportedImage:
    path, tree, image = item
    stated = [(tree.findtext(f"size/{side}") or "0").strip() for side in ("height", "width")]
    size = found.check_size(path, image, stated)
    objects = tree.findall("object")
    numbers = folders.numbers(path, size, len(objects))
    things: list[ImportedObject] = []
    for number, element in enumerate(objects, 1):
        if not (name := _name(element)):
            continue  # counted when the classes were collected
        with found.problems.collect("object that cannot be used"):
            pixels = None if numbers is None else numbers == number
            things += found.keep(_thing(path, element, size, label_of[name], pixels, found))
    return ImportedImage(image, *size, tuple(things))


def _thing(
    path: Path,
    element: Element,
    size: Size,
    label: int,
    pixels: np.ndarray | None,
    found: ImportedDataset,
) -> ImportedObject | None:
    """Return the object of an element; pixels (H, W) bool: its mask in SegmentationObject."""
    crowd = (element.findtext("difficult") or "").strip().lower() in ("1", "true")
    parts = [_polygon(path, polygon, size) for polygon in element.findall("polygon")]
    whole = [part for part in parts if len(part) >= 6]
    found.notes[THIN] += len(parts) - len(whole)
    masked = pixels is not None and pixels.any()
    if whole and not masked:
        return object_from_outline(label, whole, size, crowd)
    thing = object_from_box(label, _corners(path, element, size), size, crowd)
    if thing is None or pixels is None or not masked:
        return thing
    return object_from_mask(label, pixels, thing.box, crowd)


def _polygon(path: Path, polygon: Element, size: Size) -> list[float]:
    """Return x, y, x, y, ... of an outline with children x1, y1, x2, y2, ... or pt."""
    points = polygon.findall("pt")
    words = [point.findtext(axis) for point in points for axis in ("x", "y")]
    if not points:
        values = {child.tag: child.text for child in polygon if child.tag[:1] in ("x", "y")}
        count = (len(values) + 1) // 2
        words = [values.get(f"{axis}{k + 1}") for k in range(count) for axis in "xy"]
    return pixels_of(f"{path}: polygon", words, size)


def _corners(path: Path, element: Element, size: Size) -> Box:
    """Return the box x0, y0, x1, y1, in pixels from 0."""
    words = [element.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
    where, got = f"{path}: bndbox:", show(words)
    try:
        x0, y0, x1, y1 = map(float, words)
    except ValueError:
        expected = f"{where} expected numbers xmin, ymin, xmax, ymax, got {got}"
        raise Unusable("box without four numbers", expected) from None
    height, width = size
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
        expected = f"{where} expected xmin <= xmax and ymin <= ymax, got {got}"
        raise Unusable("box with exchanged corners", expected)
    if x0 > width or y0 > height or x1 < 1 or y1 < 1:
        text = f"{where} {got} is outside the image of {width} x {height} pixels"
        raise Unusable("box outside its image", text)
    return x0 - 1, y0 - 1, x1, y1


def _name(element: Element) -> str:
    return " ".join((element.findtext("name") or "").split())
