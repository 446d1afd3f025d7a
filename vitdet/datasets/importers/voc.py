"""Reader of Pascal VOC's format: an XML file per image.

Everingham and Winn, The PASCAL VOC 2012 Development Kit,
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/: Annotations/ID.xml, JPEGImages/ID.jpg and
ImageSets/Main/SPLIT.txt with one ID per line; the pixel at the top left is (1, 1) and a box
includes its last row and column, so xmin..xmax are the x from xmin - 1 to xmax; `difficult` objects
are ignored in evaluation, like COCO's crowds; in SegmentationObject/ID.png, if present, the pixels
of object n of the XML file have the value n, background 0, and 255 is the border between objects,
which is ignored. Files per class (aeroplane_train.txt) have a second column and are no splits.

Annotation tools differ: CVAT quotes IDs with a space
(https://docs.cvat.ai/docs/dataset_management/formats/format-voc/) and lists masks in
ImageSets/Segmentation; without ImageSets, XML files are beside the images in train/, valid/ and
test/ (https://roboflow.com/formats/pascal-voc-xml) or in one folder; <polygon> is an outline of x1,
y1, x2, y2, ... or of points <pt> in pixels from 0, whose box is used.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from PIL import Image

from vitdet.data.images import DEFAULT, Reading, image_size
from vitdet.data.segmentation import show
from vitdet.datasets.importers.dataset import (
    SPLIT_NAMES,
    THIN,
    ImportedDataset,
    ImportedImage,
    ImportedObject,
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
# an ID, possibly quoted, and its value in a list of one class: absent, difficult,
# there
ROW = re.compile(r'(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>.*?))(?:\s+(?P<presence>-1|0|1))?')


def is_voc(source: Path) -> bool:
    """Return whether a folder contains Annotations/*.xml, or XML files of images."""
    if (source / "Annotations").is_dir():
        return True
    if not source.is_dir():
        return False
    for folder in (source, *sorted(one for one in source.iterdir() if one.is_dir())):
        path = next(folder.glob("*.xml"), None)
        if path is not None and has_root(path, "annotation"):
            return True
    return False


class _Folders:
    """The folders of the XML files and the images."""

    def __init__(self, source: Path, found: ImportedDataset) -> None:
        self.source, self.is_image = source, found.is_image
        self.annotations = source / "Annotations"
        if not self.annotations.is_dir():
            self.annotations = source
        usual = [source / name for name in ("JPEGImages", "images", "Images")]
        self.images = next((one for one in usual if one.is_dir()), self.annotations)
        self.lists = next((one for name in LISTS if _has_lists(one := source / name)), None)
        self.files, self.others = found.images_below(self.images)
        self.by_stem: dict[Path, list[Path]] = {}
        for path in self.files:
            self.by_stem.setdefault(self.image_stem(path), []).append(path)

    def stem(self, path: Path) -> Path:
        """Return the ID of an XML file."""
        return path.relative_to(self.annotations).with_suffix("")

    def image_stem(self, path: Path) -> Path:
        """Return the ID of an image."""
        return path.relative_to(self.images).with_suffix("")

    def image(self, path: Path, tree: Element) -> Path:
        """Return the image of an XML file: of the same name, else `filename` in `images`."""
        named = Path((tree.findtext("filename") or "").strip().replace("\\", "/")).name
        same = self.by_stem.get(self.stem(path), [])
        if same:
            return min(same, key=lambda one: (one.suffix.lower() != ".jpg", one.name != named))
        for folder in (self.images, self.images / self.stem(path).parent):
            if named and os.path.isfile(folder / named) and self.is_image(folder / named):
                return folder / named
        unread = [one for one in self.others if self.image_stem(one) == self.stem(path)]
        if unread:
            raise Unusable("image that cannot be read", f"{unread[0]}: not a known image format")
        raise Unusable(
            "missing image file",
            f"{path}: no image {self.images / self.stem(path)}.jpg (.png, ...)",
        )


def _has_lists(folder: Path) -> bool:
    return any(folder.glob("*.txt"))


def read_voc(
    source: Path, only: Collection[str] = (), reading: Reading = DEFAULT
) -> ImportedDataset:
    """Read such a folder; classes in alphabetical order. XML files are read here, images later."""
    found = ImportedDataset(reading)
    folders = _Folders(source, found)
    splits = _splits(folders, found)
    trees: dict[str, list[tuple[Path, Element, Path]]] = {}
    for split, paths in found.select(source, splits, only).items():
        if split == "test" and not any(map(os.path.isfile, paths)):
            # as in VOC2012, whose test annotations are not published
            found.notes["images of the split test skipped, none has an annotation file"] += len(
                paths
            )
            continue
        trees[split] = []
        for path, where in paths.items():
            with found.problems.collect("annotation file that cannot be read"):
                if not os.path.isfile(path):
                    raise Unusable(
                        "missing annotation file", f"{where}{path}: no such annotation file"
                    )
                tree = read_xml(path, LARGEST)
                trees[split].append((path, tree, folders.image(path, tree)))
    _account(folders, splits, {one[2] for items in trees.values() for one in items}, found)
    names = set()
    for path, tree, _ in (one for items in trees.values() for one in items):
        for element in tree.findall("object"):
            name = _name(element)
            if name:
                names.add(name)
            else:
                found.problems.add("object without a name", f"{path}: an object without <name>")
    if not names and not found.problems.counts:
        raise ValueError(f"{folders.annotations}: no object in any file")
    found.define(sorted(names), trees, partial(_picture, folders))
    return found


def _splits(folders: _Folders, found: ImportedDataset) -> dict[str, dict[Path, str]]:
    """Return the XML files of each split, with the location in its list; without trainval if train
    and val exist.
    """
    splits: dict[str, dict[Path, str]] = {}
    if folders.lists is None:
        paths = files_below(folders.annotations, suffix=".xml")
        if not paths:
            raise FileNotFoundError(f"{folders.annotations}: no XML file")
        firsts = {path: folders.stem(path).parts[0].lower() for path in paths}
        if (
            not {*firsts.values()} <= SPLIT_NAMES.keys()
        ):  # names of files, or folders that are no splits
            return {"train": dict.fromkeys(paths, "")}
        for path, first in firsts.items():
            splits.setdefault(split_of(first), {})[path] = ""
        return splits
    lists = sorted(folders.lists.glob("*.txt"))
    counts = Counter(split_of(path.stem) for path in lists)
    for path in lists:
        ids = _ids(path, folders, found)
        name = split_of(path.stem)
        if ids:
            splits[name if counts[name] == 1 else path.stem] = ids
    if not splits and not found.problems.counts:
        raise FileNotFoundError(f"{folders.lists}: no train.txt or val.txt with an ID a line")
    if "train" in splits and "val" in splits:
        both = splits["train"] | splits["val"]
        found.notes["IDs of trainval.txt skipped, in neither train.txt nor val.txt"] += len(
            splits.pop("trainval", {}).keys() - both.keys()
        )
    return splits


def _ids(path: Path, folders: _Folders, found: ImportedDataset) -> dict[Path, str]:
    """Return the XML files that a list names, with line numbers; none for the list of one class.

    Lines that are neither an ID nor a row of a list of one class are problems.
    """
    ids: dict[Path, str] = {}
    rows = problems = 0
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        match = ROW.fullmatch(line)
        if not line or match is None:
            continue
        quoted = match["quoted"]
        one = match["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        known = next((name for name in (line, one) if os.path.isfile(_xml(folders, name))), None)
        if match["presence"] and known != line:
            rows += 1
            continue
        problem = ""
        if Path(one).is_absolute() or ".." in Path(one).parts:
            problem = f"{line}: expected the name of an image without its ending"
        elif known is None and quoted is None and len(line.split()) > 1:
            problem = f"{show(line)}: expected an ID, but there is no file {_xml(folders, line)}"
        if problem:
            problems += 1
            found.problems.add("line that is no ID", f"{path}:{number}: {problem}")
        else:
            ids[_xml(folders, known or one)] = f"{path}:{number}: "
    if rows and ids:
        found.problems.add(
            "list file of two kinds",
            f"{path}: {len(ids)} IDs and {rows} rows 'ID -1|0|1' of a list of one class",
        )
    elif rows:
        found.notes["lists of one class (ID and a second column), not read"] += 1
    elif not ids and not problems:
        found.remarks.append(f"split {split_of(path.stem)} skipped: {path} has no IDs")
    return ids


def _xml(folders: _Folders, one: str) -> Path:
    """Return the XML file of an ID, which may have the suffix of its image."""
    path = folders.annotations / f"{one}.xml"
    stem = one.rpartition(".")[0]
    if stem and not os.path.isfile(path) and os.path.isfile(folders.annotations / f"{stem}.xml"):
        return folders.annotations / f"{stem}.xml"
    return path


def _account(
    folders: _Folders, splits: dict[str, dict[Path, str]], used: set[Path], found: ImportedDataset
) -> None:
    """Count the annotation and image files that are in no split."""
    listed = {path for paths in splits.values() for path in paths}
    there = {*files_below(folders.annotations, suffix=".xml")}
    found.notes["annotation files that no list contains skipped"] += len(there - listed)
    stems = {folders.stem(path) for path in there}
    found.notes["images without an annotation file skipped"] += sum(
        folders.image_stem(path) not in stems and path not in used for path in folders.files
    )
    found.count_left_out(folders.others, lambda path: folders.image_stem(path) in stems)


def _picture(
    folders: _Folders,
    item: tuple[Path, Element, Path],
    label_of: Mapping[str, int],
    found: ImportedDataset,
) -> ImportedImage:
    path, tree, image = item
    stated = [(tree.findtext(f"size/{side}") or "0").strip() for side in ("height", "width")]
    size = found.check_size(path, image, stated)
    objects = tree.findall("object")
    numbers = _numbers(folders, path, size, len(objects), found.reading)
    things: list[ImportedObject] = []
    for number, element in enumerate(objects, 1):
        if not _name(element):
            continue  # counted when the classes were collected
        with found.problems.collect("object that cannot be used"):
            pixels = None if numbers is None else numbers == number
            things += found.keep(_thing(path, element, size, label_of, pixels, found))
    return ImportedImage(image, *size, tuple(things))


def _thing(
    path: Path,
    element: Element,
    size: tuple[int, int],
    label_of: Mapping[str, int],
    pixels: np.ndarray | None,
    found: ImportedDataset,
) -> ImportedObject | None:
    """Return the object of an element; pixels (H, W) bool: its mask in SegmentationObject, or
    None.
    """
    label = label_of[_name(element)]
    crowd = (element.findtext("difficult") or "").strip().lower() in ("1", "true")
    parts = [_polygon(path, polygon, size) for polygon in element.findall("polygon")]
    whole = [part for part in parts if len(part) >= 6]
    found.notes[THIN] += len(parts) - len(whole)
    if whole and (pixels is None or not pixels.any()):
        return object_from_outline(label, whole, size, crowd)
    thing = object_from_box(label, _corners(path, element, size), size, crowd)
    if thing is None or pixels is None or not pixels.any():
        return thing
    return object_from_mask(label, pixels, thing.box, crowd)


def _polygon(path: Path, polygon: Element, size: tuple[int, int]) -> list[float]:
    """Return x, y, x, y, ... of an outline with children x1, y1, x2, y2, ... or pt."""
    points = polygon.findall("pt")
    if points:
        words = [point.findtext(axis) for point in points for axis in ("x", "y")]
    else:
        values = {child.tag: child.text for child in polygon if child.tag[:1] in ("x", "y")}
        words = [
            values.get(f"{axis}{k + 1}") for k in range((len(values) + 1) // 2) for axis in "xy"
        ]
    return pixels_of(f"{path}: polygon", words, size)


def _numbers(
    folders: _Folders, path: Path, size: tuple[int, int], objects: int, reading: Reading
) -> np.ndarray | None:
    """Return the object number of each pixel (H, W), from 1; None without a file."""
    file = folders.source / "SegmentationObject" / f"{folders.stem(path)}.png"
    if not os.path.isfile(file):
        return None
    if image_size(file, reading) != size:
        raise ValueError(f"{file}: not of its image's size, {size[1]} x {size[0]} (width x height)")
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
        raise Unusable(
            "box without four numbers",
            f"{path}: bndbox: expected numbers xmin, ymin, xmax, ymax, got {show(words)}",
        ) from None
    height, width = size
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 < x0 or y1 < y0:
        raise Unusable(
            "box with exchanged corners",
            f"{path}: bndbox: expected xmin <= xmax and ymin <= ymax, got {show(words)}",
        )
    if x0 > width or y0 > height or x1 < 1 or y1 < 1:
        raise Unusable(
            "box outside of its image",
            f"{path}: bndbox: {show(words)} is outside of the image of {width} x {height} pixels",
        )
    return x0 - 1, y0 - 1, x1, y1


def _name(element: Element) -> str:
    return " ".join((element.findtext("name") or "").split())
