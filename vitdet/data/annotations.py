"""What an annotation file may hold: the one rule of `vitdet data check`, training, evaluation and the report.

An error is what all of them refuse. A warning is what training leaves out and counts, as the published recipes do with
crowds and boxes of zero size, or what all of them tolerate. Nothing is trusted: a value may be of any type, and what
passes can crash neither pycocotools nor anything behind it.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vitdet.data.annotation_file import Broken, Entries

NUMBERS = frozenset({int, float})
# pixels that no side of an image reaches: JPEG has none as long, and RLEs count pixels in 32 bits
SIDE = 2**16
# of an LVIS image: what its annotators looked for
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
NEEDED = frozenset({"image_id", "category_id", "bbox", "segmentation"})  # of an annotation
OUTSIDE = 1.0  # pixels by which a box may leave its image unnoticed: annotators' rounding
COCOS = "LVIS has it; with COCO's annotations take dataset coco"
LARGEST = SIDE**2  # pixels of an area; beyond 1e10 COCO's evaluation would pass over the object
CROWD, EMPTY = "crowd", "of zero size"  # why training leaves an object out

Table = list | Entries
# is told the kind of problem, the place in the file, the value ('': none)
Say = Callable[[str, str, str], None]


def refuse(kind: str, where: str, what: str) -> None:
    """Raises ValueError in one line: what a reader does with an error."""
    raise ValueError(f"{where}: {kind}{what and ': '}{what}")


def tolerate(kind: str, where: str, what: str) -> None:
    """What a reader does with a warning."""


def image_name(head: dict, lvis: bool) -> str:
    """Where an image lies in its folder: file_name, or as its coco_url ends, as in train2017/000000000139.jpg."""
    url = head.get("coco_url") if lvis else None
    return "/".join(url.split("/")[-2:]) if url else head["file_name"]


class Judge:
    """One annotation file: first `heads`, then `annotations`, to the end.

    sizes, names: (height, width) and file name of each image by id; categories: name of each by id; stated: its
    image_count; instances: objects of each category that training uses; objects: annotations of each image. What has
    an error may be missing in them, and sizes has None for it. files: image files will be opened, so they need names.
    """

    def __init__(
        self, lvis: bool, error: Say = refuse, warning: Say = tolerate, files: bool = True
    ) -> None:
        self.lvis, self.error, self.warning, self.files = lvis, error, warning, files
        self.sizes: dict[int, tuple[int, int] | None] = {}
        self.names: dict[int, str] = {}
        self.categories: dict[int, str] = {}
        self.stated: dict[int, object] = {}
        self.instances: Counter[int] = Counter()
        self.objects: Counter[int] = Counter()

    def heads(self, content: object) -> dict[str, Table]:
        """Judges the layout, the categories and the images; returns the tables by name, empty where there is none."""
        tables = self._tables(content)
        for category in self._items(tables["categories"], "category"):
            self._category(category)
        for image in self._items(tables["images"], "image"):
            self._image(image)
        return tables

    def annotations(self, table: Table) -> Iterator[tuple[dict, str]]:
        """Each annotation with an id, judged, and why training leaves it out ('': it does not)."""
        for annotation in self._items(table, "annotation"):
            yield annotation, self._annotation(annotation)
        for name, count in Counter(self.names.values()).items():
            if count > 1:
                self.warning("file that several images share", show(name), f"{count} images")
        for image_id in self.sizes:
            if not self.objects[image_id]:
                self.warning("image without objects", f"image {image_id}", "")
        for category_id, name in self.categories.items():
            if not self.instances[category_id]:
                self.warning("category without instances", f"category {category_id}", show(name))

    def _tables(self, content: object) -> dict[str, Table]:
        tables: dict[str, Table] = {"images": [], "annotations": [], "categories": []}
        if not isinstance(content, dict):
            self.error(
                "not COCO's layout",
                "top level",
                f"expected an object with {', '.join(tables)}; got a {type(content).__name__}",
            )
            return tables
        for key in tables:
            if key not in content:
                self.error(
                    f"no {key!r} in the file", "top level", f"its keys are {show(list(content))}"
                )
            elif not isinstance(content[key], Table):
                self.error(f"{key!r} is not a list", "top level", f"got {show(content[key])}")
            else:
                tables[key] = content[key]
        return tables

    def _items(self, table: Table, what: str) -> Iterator[dict]:
        """The entries that are objects with an id of their own."""
        seen: set[int] = set()
        for index, item in enumerate(table):
            number = item.get("id") if type(item) is dict else None
            if type(number) is int and number not in seen and -(2**63) <= number < 2**63:
                seen.add(number)
                yield item
            else:
                self._no_item(item, what, index)

    def _no_item(self, item: object, what: str, index: int) -> None:
        where = f"{what}s, entry {index}"
        if isinstance(item, Broken):
            self.error("broken JSON", where, item.reason)
        elif not isinstance(item, dict):
            self.error(f"{what} that is not an object", where, show(item))
        elif "id" not in item:
            self.error(f"{what} without 'id'", where, show(item))
        elif type(item["id"]) is not int:
            self.error(f"{what} id that is not a whole number", where, show(item["id"]))
        elif not -(2**63) <= item["id"] < 2**63:
            self.error(f"{what} id of more than 64 bits", where, show(item["id"]))
        else:
            self.error(f"{what} id that comes twice", f"{what} {item['id']}", f"entry {index}")

    def _has(self, item: dict, key: str, where: str) -> bool:
        if key not in item:
            self.error(f"{where.split()[0]} without {key!r}", where, "")
        return key in item

    def _category(self, category: dict) -> None:
        number, name = category["id"], category.get("name")
        where = f"category {number}"
        if self._has(category, "name", where) and not is_text(name):
            self.error("category name that is not text", where, show(name))
        elif name in self.categories.values():
            self.warning("category name that comes twice", where, show(name))
        if self.lvis and category.get("frequency") not in ("r", "c", "f"):
            stated = show(category["frequency"]) if "frequency" in category else COCOS
            self.error("category whose frequency is not r, c or f", where, stated)
        self.categories[number] = name if isinstance(name, str) and is_text(name) else ""
        self.stated[number] = category.get("image_count")

    def _image(self, image: dict) -> None:
        number, where = image["id"], f"image {image['id']}"
        if self.files:
            self._name(image, where)
        for key in LISTS if self.lvis else ():
            if key not in image:
                self.error(f"image without {key!r}", where, COCOS)
            elif not self._are_categories(image[key]):
                self.error(f"{key!r} that are not categories", where, show(image[key]))
        sides = [key for key in ("height", "width") if self._has(image, key, where)]
        wrong = [key for key in sides if type(image[key]) is not int or not 0 < image[key] < SIDE]
        for key in wrong:
            self.error(
                f"image {key} that is not a whole number from 1 to {SIDE - 1}",
                where,
                show(image[key]),
            )
        self.sizes[number] = None if wrong or len(sides) < 2 else (image["height"], image["width"])

    def _name(self, image: dict, where: str) -> None:
        place = "coco_url" if self.lvis and image.get("coco_url") else "file_name"
        if self._has(image, place, where):
            if not is_line(image[place]) or not image[place]:
                self.error("file name that is not text", where, show(image[place]))
                return
            name = image_name(image, self.lvis)
            if name.startswith("/") or ".." in name.split("/"):
                self.error("file name that leaves its folder", where, show(name))
            else:
                self.names[image["id"]] = name

    def _are_categories(self, ids: object) -> bool:
        return isinstance(ids, list) and all(
            type(one) is int and one in self.categories for one in ids
        )

    def _annotation(self, annotation: dict) -> str:
        """Why training leaves it out. Here the time goes: names are put together only where there is need."""
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        for key in () if annotation.keys() >= NEEDED else sorted(NEEDED - annotation.keys()):
            self.error(f"annotation without {key!r}", _place(annotation), "")
        size = None
        if type(image_id) is int and image_id in self.sizes:
            size = self.sizes[image_id]
            self.objects[image_id] += 1
        elif "image_id" in annotation:
            self.error(
                "annotation of an image that does not exist",
                f"annotation {annotation['id']}",
                f"image {show(image_id)}",
            )
        known = isinstance(category_id, int) and type(category_id) is int
        known = known and category_id in self.categories
        if not known and "category_id" in annotation:
            self.error(
                "annotation of a category that does not exist",
                _place(annotation),
                f"category {show(category_id)}",
            )
        crowd, empty = self._crowd(annotation), self._box(annotation, size)
        if "segmentation" in annotation:
            problem = segmentation_problem(annotation["segmentation"], size)
            if problem:
                self.error(problem[0], _place(annotation), problem[1])
        if category_id is not None and known and not crowd and not empty:
            self.instances[category_id] += 1
        return CROWD if crowd else EMPTY if empty else ""

    def _crowd(self, annotation: dict) -> bool:
        crowd = annotation.get("iscrowd", 0)
        if type(crowd) not in (int, bool) or crowd not in (0, 1):
            self.error("iscrowd that is neither 0 nor 1", _place(annotation), show(crowd))
            return False
        if crowd:
            self.warning("crowd region (training leaves it out)", _place(annotation), "")
        elif "iscrowd" not in annotation and not self.lvis:
            self.warning("annotation without 'iscrowd' (it is no crowd)", _place(annotation), "")
        return bool(crowd)

    def _box(self, annotation: dict, size: tuple[int, int] | None) -> bool:
        """Judges box and area; True where the box has no size."""
        box, area = annotation.get("bbox"), annotation.get("area")
        if "area" not in annotation:
            self.warning(
                "annotation without 'area' (that of its mask is taken)", _place(annotation), ""
            )
        elif area is None or type(area) not in NUMBERS or not 0 <= area <= LARGEST:
            self.error("area that is not a number of pixels", _place(annotation), show(area))
            area = None
        if type(box) is not list or len(box) != 4 or not are_numbers(box):
            if "bbox" in annotation:
                self.error("bbox that is not four finite numbers", _place(annotation), show(box))
            return False
        x, y, width, height = box
        empty = width <= 0 or height <= 0
        if empty:
            self.warning("box of zero size (training leaves it out)", _place(annotation), show(box))
        if size is not None and not (
            0 <= x <= x + width <= size[1] and 0 <= y <= y + height <= size[0]
        ):
            self._outside(annotation, box, size, empty)
        pixels = float(width) * height
        if (
            area is not None
            and not empty
            and not 0.005 * pixels <= area <= 1.1 * pixels + 4
            and not annotation.get("iscrowd", 0)
        ):
            inside = f"{show(area)} in {width:g} x {height:g}"
            self.warning("area that does not fit its box", _place(annotation), inside)
        return empty

    def _outside(self, annotation: dict, box: list, size: tuple[int, int], empty: bool) -> None:
        x, y, right, low = box[0], box[1], box[0] + box[2], box[1] + box[3]
        rows, columns = size
        inside = f"{show(box)} on {columns} x {rows} pixels"
        if reaches_far((x, y, right, low), size):
            self.error("box far outside its image", _place(annotation), inside)
        elif not empty and (x >= columns or y >= rows or right <= 0 or low <= 0):
            self.error("box outside its image", _place(annotation), inside)
        elif not empty and (
            min(x, y) < -OUTSIDE or right > columns + OUTSIDE or low > rows + OUTSIDE
        ):
            self.warning("box partly outside its image", _place(annotation), inside)


def _place(annotation: dict) -> str:
    image = f" (image {show(annotation['image_id'])})" if "image_id" in annotation else ""
    return f"annotation {annotation['id']}{image}"


def segmentation_problem(
    segmentation: object, size: tuple[int, int] | None
) -> tuple[str, str] | None:
    """(kind, text) of the first thing that is wrong with polygons or an RLE on an image of (height, width) `size`."""
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, size)
    if segmentation == []:
        return (
            "segmentation that is neither polygons nor RLE",
            "[] (where there is a box only, write its corners)",
        )
    if not isinstance(segmentation, list):
        return "segmentation that is neither polygons nor RLE", show(segmentation)
    for part in segmentation:
        if not isinstance(part, list):
            return "polygon that is not a list x, y, x, y, ...", show(part)
        if len(part) < 6 or len(part) % 2:
            return "polygon without x, y of at least 3 points", f"{len(part)} numbers"
        try:
            finite = math.isfinite(sum(part))
        except (TypeError, OverflowError):  # text, lists, nothing, or beyond any float
            finite = False
        if not finite:
            return "polygon with coordinates that are not finite numbers", show(part)
        # pycocotools draws all of it, pixel by pixel
        if size is not None and reaches_far(part, size):
            return "polygon far outside its image", f"{show(part)} on {size[1]} x {size[0]} pixels"
    return None


def _rle_problem(code: dict, size: tuple[int, int] | None) -> tuple[str, str] | None:
    shape, counts = code.get("size"), code.get("counts")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or any(type(side) is not int or side <= 0 for side in shape)
    ):
        return "RLE without size [height, width]", show(shape)
    if size is not None and tuple(shape) != size:
        return (
            "RLE of another size than its image",
            f"{shape}, the image {list(size)} (height, width)",
        )
    runs = _run_lengths(counts)
    if runs is None:
        return "RLE whose counts are not run lengths", show(counts)
    if sum(runs) != shape[0] * shape[1]:
        return (
            "RLE whose counts do not fill its size",
            f"{sum(runs)} of {shape[0] * shape[1]} pixels",
        )
    return None


def _run_lengths(counts: object) -> list[int] | None:
    """Run lengths as they are, or out of COCO's compressed text: 5 bits a character, differences to two runs before."""
    if isinstance(counts, list):
        return (
            counts if {int}.issuperset(map(type, counts)) and min(counts, default=0) >= 0 else None
        )
    if not isinstance(counts, str) or not counts.isascii():
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 35 bits are no run
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist() if runs.min() >= 0 else None


def reaches_far(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether any of these numbers lies farther outside an image of (height, width) `size` than its longer side."""
    side = max(size)
    return min(coordinates) < -side or max(coordinates) > 2 * side


def is_line(value: object) -> bool:
    """Whether it is text of one line, or none, as the name of a file is."""
    return isinstance(value, str) and len(value.splitlines()) < 2 and "\0" not in value


def is_text(value: object) -> bool:
    """Whether it is text of one line that any file can hold: without half a surrogate pair."""
    return (
        isinstance(value, str)
        and is_line(value)
        and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))
    )


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all of them are finite numbers."""
    try:
        return math.isfinite(sum(values)) and NUMBERS.issuperset(map(type, values))
    except (TypeError, OverflowError):  # text, lists, nothing, or beyond any float
        return False


def show(value: object) -> str:
    """The value in a few characters of one line, whatever it is."""
    return reprlib.repr(value)
