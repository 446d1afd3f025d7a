"""Reader of Pascal VOC's format: an XML file per image.

Everingham and Winn, The PASCAL VOC 2012 Development Kit,
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/: Annotations/ID.xml, JPEGImages/ID.jpg and
ImageSets/Main/SPLIT.txt with one ID per line. The pixel at the top left is (1, 1) and a box
includes its last row and column, so that xmin..xmax spans x from xmin - 1 to xmax. `difficult`
objects are ignored in evaluation, like COCO's crowds. In SegmentationObject/ID.png, if present, the
value of a pixel is the object's number in the XML file, 0 for the background, or 255 for the border
between objects, which is ignored. Per-class lists (e.g. aeroplane_train.txt) have a second column
and are not splits.

CVAT (https://docs.cvat.ai/docs/dataset_management/formats/format-voc/) quotes IDs that contain a
space. Without ImageSets, XML files are next to the images in train/, valid/ and test/
(https://roboflow.com/formats/pascal-voc-xml) or in one folder. <polygon> is an outline with 0-based
coordinates x1, y1, x2, y2, ... or points <pt>. If there is no mask, the outline is used and
<bndbox> is ignored.
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

LARGEST = 4 << 20  # maximum size of an XML file in bytes; VOC's files are a few kilobytes each
BORDER = 255  # value of border pixels between objects
LISTS = ("ImageSets/Main", "ImageSets/Segmentation", "ImageSets")
# an ID, possibly quoted; per-class lists add -1 (absent), 0 (difficult) or 1 (present)
ROW = re.compile(r'(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>.*?))(?:\s+(?P<presence>-1|0|1))?')

Item = tuple[Path, Element, Path]  # XML file, its root element, and the image


def is_voc(source: Path) -> bool:
    """Return whether a folder contains Annotations/, or XML files with the root <annotation>."""
    if (source / "Annotations").is_dir():
        return True
    if not source.is_dir():
        return False
    folders = (source, *sorted(path for path in source.glob("[!.]*") if path.is_dir()))
    firsts = (next(folder.glob("[!.]*.xml"), None) for folder in folders)
    return any(path is not None and has_root(path, "annotation") for path in firsts)


def read_voc(dataset: ImportedDataset) -> None:
    """Read a folder in Pascal VOC's format; classes are in alphabetical order."""
    folders = _Folders(dataset)
    splits = folders.splits()
    items: dict[str, list[Item]] = {}
    for split, paths in dataset.select(splits).items():
        if split == "test" and not any(map(os.path.isfile, paths)):
            # VOC2012 does not include the annotations of its test split
            note = "test images skipped: none has an annotation file"
            dataset.notes[note] += len(paths)
            continue
        items[split] = []
        for path, where in paths.items():
            with dataset.problems.collect(BROKEN):
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
                dataset.problems.add("object without a name", f"{path}: an object without <name>")
    if not names and not dataset.problems.counts:
        raise ValueError(f"{folders.annotations}: no annotation file contains an object")
    dataset.define(sorted(names - {""}), items, partial(_read_image, folders))


class _Folders:
    """The XML files, images and lists of a data set."""

    def __init__(self, dataset: ImportedDataset) -> None:
        source, self.dataset = dataset.source, dataset
        upper, lower = source / "Annotations", source / "annotations"
        beside = upper if upper.is_dir() else source  # where images are without a folder for them
        use_lower = beside == source and files_below(lower, suffix=".xml")
        self.annotations = lower if use_lower else beside
        named = [source / name for name in ("JPEGImages", "images", "Images")]
        self.images = next((folder for folder in named if folder.is_dir()), beside)
        lists = (source / name for name in LISTS)
        self.lists = next((folder for folder in lists if any(folder.glob("[!.]*.txt"))), None)
        self.files, self.others = dataset.images_below(self.images)
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
        """Return the image with the ID of an XML file or, if missing, the image of <filename>."""
        named = Path((tree.findtext("filename") or "").strip().replace("\\", "/")).name
        stem = self.stem(path)
        if same := self.by_stem.get(stem):
            return min(same, key=lambda file: (file.suffix.lower() != ".jpg", file.name != named))
        for image in (self.images / named, self.images / stem.parent / named):
            if named and os.path.isfile(image) and self.dataset.is_image(image):
                return image
        for other in self.others:
            if self.image_stem(other) == stem:
                raise Unusable(
                    "image that cannot be read", f"{other}: not a supported image format"
                )
        text = f"{path}: no image {self.images / stem}.jpg (.png, ...)"
        raise Unusable("missing image file", text)

    def xml(self, image_id: str) -> Path:
        """Return the XML file of an ID; the ID may end with the suffix of the image."""
        stem = image_id.rpartition(".")[0]
        path, shorter = (self.annotations / f"{name}.xml" for name in (image_id, stem))
        return shorter if stem and not os.path.isfile(path) and os.path.isfile(shorter) else path

    def splits(self) -> dict[str, dict[Path, str]]:
        """Return {split: {XML file: message prefix}}, without trainval if train and val exist.

        The prefix is "LIST:LINE: " or, if there are no lists, "".
        """
        splits: dict[str, dict[Path, str]] = defaultdict(dict)
        if self.lists is None:
            paths = files_below(self.annotations, suffix=".xml")
            if not paths:
                raise FileNotFoundError(f"{self.annotations}: no XML file")
            firsts = {path: self.stem(path).parts[0].lower() for path in paths}
            # whether every XML file is in a folder with the name of a split
            divided = {*firsts.values()} <= SPLIT_NAMES.keys()
            for path, first in firsts.items():
                splits[split_of(first) if divided else "train"][path] = ""
            return splits
        lists = sorted(self.lists.glob("[!.]*.txt"))
        counts = Counter(split_of(path.stem) for path in lists)
        for path in lists:
            name = split_of(path.stem)
            if ids := self.ids(path):
                splits[name if counts[name] == 1 else path.stem] = ids
        if not splits and not self.dataset.problems.counts:
            raise FileNotFoundError(f"{self.lists}: no train.txt or val.txt with one ID per line")
        if "train" in splits and "val" in splits:
            left = splits.pop("trainval", {}).keys() - splits["train"].keys() - splits["val"].keys()
            note = "IDs of trainval.txt skipped, in neither train.txt nor val.txt"
            self.dataset.notes[note] += len(left)
        return splits

    def ids(self, path: Path) -> dict[Path, str]:
        """Return {XML file: message prefix} for the IDs in a list. The prefix is "LIST:LINE: ".

        Returns {} for a per-class list. Adds invalid lines to the problems of the data set.
        """
        dataset, ids = self.dataset, dict[Path, str]()
        rows = problems = 0
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        for number, line in enumerate(map(str.strip, text.splitlines()), 1):
            match = ROW.fullmatch(line)
            if not line or match is None:
                continue
            quoted = match["quoted"]
            name = match["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            known = next((text for text in (line, name) if os.path.isfile(self.xml(text))), None)
            if match["presence"] and known != line:
                rows += 1
                continue
            problem = ""
            if Path(name).is_absolute() or ".." in Path(name).parts:
                problem = f"{show(line)}: expected the name of an image without its extension"
            elif known is None and quoted is None and len(line.split()) > 1:
                problem = f"{show(line)}: expected an ID, but there is no file {self.xml(line)}"
            if problem:
                problems += 1
                dataset.problems.add("line that is not an ID", f"{path}:{number}: {problem}")
            else:
                ids[self.xml(known or name)] = f"{path}:{number}: "
        if rows and ids:
            text = f"expected lines 'ID' or lines 'ID -1|0|1', got both ({len(ids)} and {rows})"
            dataset.problems.add("list with and without a second column", f"{path}: {text}")
        elif rows:
            dataset.notes["per-class lists (with a second column) ignored"] += 1
        elif not ids and not problems:
            dataset.remarks.append(f"split {split_of(path.stem)} skipped: {path} contains no IDs")
        return ids

    def count_others(self, splits: dict[str, dict[Path, str]], used: set[Path]) -> None:
        """Count annotation files that are in no list, and images without an annotation file."""
        notes, there = self.dataset.notes, {*files_below(self.annotations, suffix=".xml")}
        unlisted = there.difference(*splits.values())
        notes["annotation files skipped (not in any list)"] += len(unlisted)
        stems = {self.stem(path) for path in there}
        unnamed = [path for path in self.files if self.image_stem(path) not in stems]
        notes["images without an annotation file skipped"] += len({*unnamed} - used)
        self.dataset.count_left_out(self.others, lambda path: self.image_stem(path) in stems)

    def numbers(self, path: Path, size: Size, objects: int) -> np.ndarray | None:
        """Return an array (H, W) of object numbers, 0 and BORDER; None if there is no mask file."""
        file = self.dataset.source / "SegmentationObject" / f"{self.stem(path)}.png"
        if not os.path.isfile(file):
            return None
        height, width = image_size(file, self.dataset.reading)
        if (height, width) != size:
            expected = f"expected the size of the image, {size[1]} x {size[0]} (width x height)"
            raise ValueError(f"{file}: {expected}, got {width} x {height}")
        try:
            with Image.open(file) as image:
                if image.mode not in ("P", "L"):
                    expected = "expected a palette or grayscale image of object numbers, got mode"
                    raise ValueError(f"{expected} {image.mode}")
                numbers = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        largest = int(numbers.max(where=numbers != BORDER, initial=0))
        if largest > objects:
            expected = f"expected at most {objects} (objects in {path})"
            raise ValueError(f"{file}: contains object number {largest}, {expected}")
        return numbers


def _read_image(
    folders: _Folders, item: Item, label_of: Mapping[str, int], dataset: ImportedDataset
) -> ImportedImage:
    path, tree, image = item
    stated = [(tree.findtext(f"size/{side}") or "0").strip() for side in ("height", "width")]
    size = dataset.check_size(path, image, stated)
    elements = tree.findall("object")
    numbers = folders.numbers(path, size, len(elements))
    objects: list[ImportedObject] = []
    for number, element in enumerate(elements, 1):
        if not (name := _name(element)):
            continue  # `read_voc` has already reported the missing name
        with dataset.problems.collect("object that cannot be used"):
            pixels = None if numbers is None else numbers == number
            objects += dataset.keep(_object(path, element, size, label_of[name], pixels, dataset))
    return ImportedImage(image, *size, tuple(objects))


def _object(
    path: Path,
    element: Element,
    size: Size,
    label: int,
    pixels: np.ndarray | None,
    dataset: ImportedDataset,
) -> ImportedObject | None:
    """Return an element's object. pixels: its mask (H, W) bool; None if there is no mask file."""
    crowd = (element.findtext("difficult") or "").strip().lower() in ("1", "true")
    parts = [_polygon(path, polygon, size) for polygon in element.findall("polygon")]
    whole = [part for part in parts if len(part) >= 6]
    dataset.notes[THIN] += len(parts) - len(whole)
    masked = pixels is not None and pixels.any()
    if whole and not masked:
        return object_from_outline(label, whole, size, crowd)
    obj = object_from_box(label, _corners(path, element, size), size, crowd)
    if obj is None or pixels is None or not masked:
        return obj
    return object_from_mask(label, pixels, obj.box, crowd)


def _polygon(path: Path, polygon: Element, size: Size) -> list[float]:
    """Return the outline x, y, x, y, ... of a <polygon>."""
    points = polygon.findall("pt")
    words = [point.findtext(axis) for point in points for axis in ("x", "y")]
    if not points:
        values = {child.tag: child.text for child in polygon if child.tag[:1] in ("x", "y")}
        count = (len(values) + 1) // 2
        words = [values.get(f"{axis}{k + 1}") for k in range(count) for axis in "xy"]
    return pixels_of(f"{path}: polygon", words, size)


def _corners(path: Path, element: Element, size: Size) -> Box:
    """Return the box x0, y0, x1, y1 in 0-based pixel coordinates."""
    words = [element.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
    where, got = f"{path}: bndbox:", show(words)
    try:
        x0, y0, x1, y1 = map(float, words)
    except ValueError:
        expected = f"{where} expected numbers xmin, ymin, xmax, ymax, got {got}"
        raise Unusable("box without four numbers", expected) from None
    height, width = size
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
        expected = f"{where} expected finite xmin <= xmax and ymin <= ymax, got {got}"
        raise Unusable("box with invalid corners", expected)
    if x0 > width or y0 > height or x1 < 1 or y1 < 1:
        text = f"{where} {got} is outside the image of {width} x {height} pixels"
        raise Unusable("box outside its image", text)
    return x0 - 1, y0 - 1, x1, y1


def _name(element: Element) -> str:
    return " ".join((element.findtext("name") or "").split())
