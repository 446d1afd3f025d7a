"""Common representation of data sets in other formats: the images of each split and their objects.

Boxes and outlines are in pixel coordinates of the upright image. Readers count skipped entries in
`notes`. Entries in `problems` prevent the conversion.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from vitdet.data.coco_layouts import existing_name
from vitdet.data.images import DRAWINGS, Reading, image_size
from vitdet.data.masks import encode
from vitdet.data.segmentation import pixel_count, reaches_far, show

BROKEN = "annotation file that cannot be read"
EMPTY = "objects of zero size skipped"
BOX_ONLY = "objects with a box but no mask (--boxes-as-masks converts boxes to masks)"
THIN = "outlines with fewer than 3 points skipped"
CROWDS = "difficult objects or crowds: ignored in training and evaluation"
EXAMPLES = 20  # maximum number of examples per kind of problem
# formats that Pillow recognizes but cannot decode
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")
# suffixes of non-image files that are common in image folders
DOCUMENTS = frozenset(
    ".cache .csv .data .htm .html .json .md .names .npy .npz .pdf .txt .xml .yaml .yml .zip".split()
)
# common split names -> names in vitdet; "default" is CVAT's split if no subset is set
SPLIT_NAMES = (
    dict.fromkeys(("train", "training", "default"), "train")
    | dict.fromkeys(("val", "valid", "validation"), "val")
    | dict.fromkeys(("test", "testing"), "test")
)
Size = tuple[int, int]  # height, width of an image
Box = tuple[float, float, float, float]  # left, top, width, height
Item = TypeVar("Item")


class Unusable(ValueError):
    """Raised for an unusable entry of a data set; problems are counted by `kind`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class SourceError(ValueError):
    """Raised for a data set with problems; the message contains examples."""


class Problems:
    """Problems of a data set: counts and examples by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(" ".join(text.splitlines()))

    @contextmanager
    def collect(self, kind: str) -> Iterator[None]:
        """Record a ValueError or OSError as a problem of `kind`; `Unusable.kind` overrides it."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.add(error.kind if isinstance(error, Unusable) else kind, str(error))

    def raise_if_any(self, source: Path) -> None:
        """Raise SourceError if there is any problem."""
        total = self.counts.total()
        if total == 1:
            raise SourceError(next(iter(self.examples.values()))[0])
        if total:
            lines = [f"{source}: {total:,} problems, nothing was written"]
            for kind, count in self.counts.items():
                lines.append(f"  {count:,} x {kind}")
                lines += [f"      {example}" for example in self.examples[kind]]
                lines += ["      ..."] if count > EXAMPLES else []
            raise SourceError("\n".join(lines))


@dataclass(frozen=True)
class ImportedObject:
    """An annotated object."""

    label: int
    box: Box
    segmentation: list[list[float]] | dict  # COCO's polygons or RLE; empty if only a box is known
    area: float  # area in square pixels of the mask (as in pycocotools) or, if none, of the box
    crowd: bool = False  # ignored in training and evaluation


@dataclass(frozen=True)
class ImportedImage:
    """An image file with its objects; height and width are those of the upright image."""

    path: Path
    height: int
    width: int
    objects: tuple[ImportedObject, ...]


@dataclass
class ImportedDataset:
    """A data set in another format; labels are indices of `class_names`.

    Each split can be iterated once; iteration reads the images and adds to `notes` and `problems`.
    """

    source: Path
    only: Collection[str]  # requested splits; all if empty
    reading: Reading  # settings for reading image files
    class_names: tuple[str, ...] = ()
    splits: dict[str, Iterator[ImportedImage]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)  # message -> number of occurrences
    remarks: list[str] = field(default_factory=list)  # messages without a number of occurrences
    problems: Problems = field(default_factory=Problems)

    def select(self, items: dict[str, Item]) -> dict[str, Item]:
        """Return the items of the requested splits. Raises ValueError for an unknown split."""
        missing = [name for name in self.only if name not in items]
        if missing:
            splits = ", ".join(items) or "none"
            raise ValueError(f"{self.source}: no split {missing[0]}; available: {splits}")
        skipped = [name for name in items if self.only and name not in self.only]
        self.remarks += [f"split {name} skipped, not requested" for name in skipped]
        return {name: item for name, item in items.items() if name not in skipped}

    def define(
        self,
        class_names: Sequence[str],
        items: Mapping[str, Iterable[Item]],
        read: Callable[[Item, Mapping[str, int], ImportedDataset], ImportedImage],
    ) -> None:
        """Set the classes and splits.

        `read` is called with an item of a split, a map of class names to labels, and this data set.
        """
        self.class_names = tuple(class_names)
        label_of = {name: label for label, name in enumerate(class_names)}

        def images(listed: Iterable[Item]) -> Iterator[ImportedImage]:
            for item in listed:
                with self.problems.collect("image or annotation file that cannot be used"):
                    yield read(item, label_of, self)

        self.splits = {split: images(listed) for split, listed in items.items()}

    def keep(self, obj: ImportedObject | None) -> tuple[ImportedObject, ...]:
        """Return (obj,), or () if `obj` is None; update the counts in `notes`."""
        if obj is None:
            self.notes[EMPTY] += 1
            return ()
        self.notes[BOX_ONLY] += not obj.segmentation
        self.notes[CROWDS] += obj.crowd
        return (obj,)

    def is_image(self, path: Path) -> bool:
        """Return whether a file is an image: by suffix or, if the suffix is unknown, by content."""
        suffix = path.suffix.lower()
        if suffix in image_suffixes() or suffix in DOCUMENTS:
            return suffix in image_suffixes()
        try:
            image_size(path, self.reading)
        except (ValueError, OSError):
            return False
        return True

    def images_below(self, *folders: Path) -> tuple[list[Path], list[Path]]:
        """Return (images, other files) below folders, without files with suffixes in DOCUMENTS."""
        images, others = [], []
        for path in files_below(*folders):
            if self.is_image(path):
                images.append(path)
            elif path.suffix.lower() not in DOCUMENTS:
                others.append(path)
        return images, others

    def check_size(self, where: object, image: Path, stated: Sequence[object] = ()) -> Size:
        """Return (height, width) of an image; raise Unusable if the annotations state another size.

        `stated` is (height, width) in the annotations; (), (0, 0) and (None, None) mean unknown.
        """
        size = image_size(image, self.reading)
        words = [str(side or 0).removesuffix(".0") for side in stated]
        if words not in ([], ["0", "0"], list(map(str, size))):
            raise Unusable(
                "image size that differs from the annotations",
                f"{where}: states a size of {words[1]} x {words[0]}, but {image} is {size[1]} x "
                f"{size[0]} (width x height, upright)",
            )
        return size

    def count_left_out(self, files: Iterable[Path], is_labeled: Callable[[Path], bool]) -> None:
        """Count files that are not supported images, by suffix."""
        by_suffix: dict[str, list[Path]] = defaultdict(list)
        for path in files:
            by_suffix[path.suffix.lower()].append(path)
        for suffix, paths in sorted(by_suffix.items()):
            labeled = sum(map(is_labeled, paths))
            also = f", {labeled:,} of them with a label file" if labeled else ""
            name = f"{suffix} files" if suffix else "files without an extension"
            self.notes[f"{name} skipped, not a supported image format{also}"] += len(paths)

    def count_unnamed(self, folders: Iterable[Path], used: Iterable[Path]) -> None:
        """Count the files in these folders that the converted splits do not use."""
        images, others = self.images_below(*folders)
        self.notes["images skipped (not in any converted split)"] += len({*images}.difference(used))
        self.count_left_out(others, lambda path: False)


def split_of(name: str, otherwise: str = "") -> str:
    """Return a split's standard name; for an unknown name, return `otherwise` or the name."""
    return SPLIT_NAMES.get(name.lower(), otherwise or name)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes (lower case, with dot) of the supported image formats."""
    kinds = set(Image.registered_extensions().values()) & Image.OPEN.keys()
    kinds.difference_update(DRAWINGS, STUBS)
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in kinds)


def files_below(*folders: Path, suffix: str = "") -> list[Path]:
    """Return the files below folders, sorted by path. suffix: lower case; '' for any.

    Skips hidden files and folders, such as .ipynb_checkpoints. Follows links; a folder with several
    paths is listed once, with a path without links if it has one. Raises OSError for an unreadable
    folder.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    paths, seen, pending = set[Path](), set[str](), list(map(str, folders))
    for folder in pending:  # links are appended
        for parent, inside, names in os.walk(folder, onerror=fail):
            inside[:] = sorted(name for name in inside if name[0] != "." and name != "lost+found")
            if (place := os.path.realpath(parent)) in seen:
                inside.clear()
                continue
            seen.add(place)
            below = (os.path.join(parent, name) for name in inside)
            pending += filter(os.path.islink, below)
            paths.update(Path(parent, name) for name in names if name[0] != ".")
    return sorted(path for path in paths if suffix in ("", path.suffix.lower()) and path.is_file())


def find_image(where: object, folders: Sequence[Path], name: str) -> tuple[Path, Path]:
    """Return the first folder with this image, and the image's path. Raises Unusable if missing."""
    slashed = name.replace("\\", "/")
    if slashed.startswith("/") or ".." in slashed.split("/"):
        text = f"{where}: expected a relative image path without .., got {show(name)}"
        raise Unusable("image path outside its folder", text)
    for folder in folders:
        path = folder / existing_name(folder, name)
        if name and os.path.isfile(path):
            return folder, path
    looked = ", ".join(map(str, folders)) or "any image folder"
    raise Unusable("missing image file", f"{where}: no image file {show(name)} in {looked}")


def object_from_box(
    label: int, corners: Sequence[float], size: Size, crowd: bool = False
) -> ImportedObject | None:
    """Return an object with a box x0, y0, x1, y1 clipped to the image; None if the area is zero."""
    box = _clipped(corners, size)[1]
    if min(box[2:]) <= 0:
        return None
    return ImportedObject(label, box, [], round(box[2] * box[3], 3), crowd)


def object_from_outline(
    label: int, parts: Sequence[Sequence[float]], size: Size, crowd: bool = False
) -> ImportedObject | None:
    """Return an object with polygons x, y, ...; None if the area of their bounding box is zero.

    Points outside the image are moved to its border.
    """
    clipped = [_clipped(part, size)[0] for part in parts]
    box = _clipped([value for part in clipped for value in part], size)[1]
    if min(box[2:]) <= 0:
        return None
    return ImportedObject(label, box, clipped, float(pixel_count(clipped, *size)), crowd)


def object_from_mask(
    label: int, pixels: np.ndarray, box: Box | None = None, crowd: bool = False
) -> ImportedObject | None:
    """Return an object with a mask (H, W) bool; None if the mask is empty."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return None
    if box is None:
        x, y = float(columns[0]), float(rows[0])
        box = (x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y)
    code = encode(torch.from_numpy(pixels[None]))[0]
    return ImportedObject(label, box, code, float(pixels.sum()), crowd)


def pixels_of(where: object, words: Iterable[object], size: Size) -> list[float]:
    """Parse words as pixel coordinates. Raises Unusable if invalid or far outside the image."""
    words = list(words)
    try:
        values = [float(word) for word in words]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise Unusable("invalid coordinates", f"{where}: expected numbers, got {show(words)}")
    if values and reaches_far(values, size):
        raise Unusable(
            "coordinates far outside their image",
            f"{where}: {show(words)} is far outside the image of {size[1]} x {size[0]} pixels",
        )
    return values


def _clipped(points: Sequence[float], size: Size) -> tuple[list[float], Box]:
    """Return points x, y, x, y, ... clipped to the image, and the box around them."""
    sides = (size[1], size[0])
    inside = [round(min(max(value, 0), sides[k % 2]), 3) for k, value in enumerate(points)]
    x, y = inside[0::2], inside[1::2]
    return inside, (min(x), min(y), round(max(x) - min(x), 3), round(max(y) - min(y), 3))
