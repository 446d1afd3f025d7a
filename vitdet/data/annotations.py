"""What an annotation file may contain: the one rule of `vitdet data check`, training, evaluation and the report.

An error is what all of them refuse: results would be wrong. A warning is what they leave out and count, or tolerate, as
pycocotools, Detectron2 and mmdet do. Nothing is trusted: a value may be of any type, and what passes can crash neither
pycocotools nor anything behind it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vitdet.data.annotation_file import (
    UNKNOWN,
    Annotation,
    Broken,
    Entries,
    annotations_of,
    loosely,
)
from vitdet.data.box_fit import are_corners, fit
from vitdet.data.coco_layouts import image_name
from vitdet.data.flawless import LARGEST, ImageSizes, area_fits, find_flawless
from vitdet.data.segmentation import (
    Outline,
    inside,
    reaches_far,
    read_outline,
    show,
    whole_number,
)

# pixels that no side of an image reaches: JPEG has none as long, and RLEs count pixels in 32 bits
SIDE = 2**16
# of an LVIS image: what its annotators looked for
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
OUTSIDE = 1.0  # pixels by which a box may leave its image unnoticed: annotators' rounding
COCOS = "LVIS has it; with COCO's annotations take dataset coco"
BLOCK = 1024  # annotations that are looked at together
# From this share of the objects on, a fault is one of the export and not of single objects.
MOST = 0.5
# Why training leaves an object out
CROWD, EMPTY, OUTSIDER = "crowd", "of zero size", "outside their images"
NO_IMAGE, NO_CATEGORY = "of unknown images", "of unknown categories"
# Why training takes an object's box and class only
NO_OUTLINE, NO_PIXELS, OTHER_PLACE = (
    "without an outline",
    "with an outline that has no pixels in its image",
    "whose outline is elsewhere than their box",
)
WITHOUT_AREA = "annotation without 'area' (that of its mask or box is taken)"

Table = list | Entries
# is told the kind of problem, the place in the file, the value ('': none)
Say = Callable[[str, str, str], None]


class Validated(NamedTuple):
    """An annotation as training takes it.

    segmentation: usable polygons or RLE, None without. dropped: why training leaves the object out ("": it does not).
    unmasked: why it trains boxes and classes only (""). own_box: its box is `bbox`, else the one around its outline.
    """

    annotation: Annotation
    segmentation: list | dict | None
    dropped: str
    unmasked: str
    own_box: bool


def refuse(kind: str, where: str, what: str) -> None:
    """Raises ValueError in one line: what a reader does with an error."""
    raise ValueError(f"{where}: {kind}{what and ': '}{what}")


def tolerate(kind: str, where: str, what: str) -> None:
    """What a reader does with a warning."""


def root_category(categories: Iterable[object]) -> int | None:
    """The id of the category 0 that Roboflow adds as the supercategory of the others, which no object has; else None."""
    items = [item for item in categories if isinstance(item, dict)]
    names = [item.get("name") for item in items if whole_number(item.get("id")) == 0]
    others = [item for item in items if whole_number(item.get("id")) != 0]
    is_root = others and names and all(one.get("supercategory") == names[0] for one in others)
    return 0 if is_root else None


def without_objects(dropped: Mapping[str, int]) -> str:
    """Why a split has no object to learn from: its annotations by the cause why they are left out."""
    causes = ", ".join(f"{count} {cause}" for cause, count in dropped.items() if cause)
    return f"its annotations are left out: {causes}" if causes else "it has no annotations"


class AnnotationValidator:
    """One annotation file: first `read_header`, then `annotations`, to the end.

    sizes, names: (height, width) and file name of each image by id; categories: name of each by id; stated: its
    image_count; instances: objects of each category that training uses; objects: annotations of each image; outlines:
    objects with a usable outline. What has an error may be missing in them, and sizes has None for it. files: image
    files will be opened, so they need names.
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
        self.outlines = 0
        self._suspects: Counter[str] = Counter()  # objects by what may be wrong with all of them
        self._count = 0  # annotations that are no crowds
        self._root: int | None = None  # see `root_category`; None once an annotation has it

    def read_header(self, content: object) -> dict[str, Table]:
        """Check the layout, the categories and the images; return the tables by name, empty where there is none."""
        tables = self._tables(content)
        self._root = root_category(tables["categories"])
        for category in self._items(tables["categories"], "category"):
            self._category(category)
        for image in self._items(tables["images"], "image"):
            self._image(image)
        return tables

    def annotations(self, table: Table, flawless: bool = True) -> Iterator[Validated]:
        """Check each annotation, then what concerns all of them; yields those that have no error.

        flawless: also those without even a warning, which are the most.
        """
        seen: set[int] = set()
        for index, item, is_flawless in self._sifted(table, seen, flawless):
            if is_flawless:
                yield Validated(item, item.segmentation, "", "", False)
                continue
            annotation = item if type(item) is Annotation else self._loose(item, index)
            if annotation is None:
                continue
            if not -(2**63) <= annotation.id < 2**63:
                self._no_item({"id": annotation.id}, "annotation", index)
            elif annotation.id in seen:
                self.error(
                    "annotation id that comes twice",
                    f"annotation {annotation.id}",
                    f"entry {index}",
                )
            else:
                seen.add(annotation.id)
                if (found := self._annotation(annotation)) is not None:
                    yield found
        self._systematic()
        if self._root is not None:
            del self.categories[self._root]
        for name, count in Counter(self.names.values()).items():
            if count > 1:
                self.warning("file that several images share", show(name), f"{count} images")
        for image_id in self.sizes:
            if not self.objects[image_id]:
                self.warning("image without objects", f"image {image_id}", "")
        for category_id, name in self.categories.items():
            if not self.instances[category_id]:
                self.warning("category without instances", f"category {category_id}", show(name))

    def _sifted(
        self, table: Table, seen: set[int], flawless: bool
    ) -> Iterator[tuple[int, Any, bool]]:
        """Index and entry of each annotation, and whether it is flawless: those are counted here, and left out unless
        `flawless` asks for them. Their ids are added to `seen`.
        """
        if not isinstance(table, Entries):
            for index, item in enumerate(annotations_of(table)):
                yield index, item, False
            return
        images = ImageSizes(self.sizes)
        for start in range(0, len(table), BLOCK):
            stop = min(start + BLOCK, len(table))
            found = find_flawless(
                table.outlined(start, stop), images, self.categories, self.lvis, seen
            )
            seen.update(found.ids)
            self.objects.update(found.image_ids)
            self.instances.update(found.category_ids)
            self.outlines += len(found.ids)
            self._count += len(found.ids)
            if self._root in found.category_ids:
                self._root = None
            passed = set(found.rows)
            if flawless:
                for row, item in enumerate(table.annotations(start, stop)):
                    yield start + row, item, row in passed
                continue
            for index in range(start, stop) if len(passed) < stop - start else ():
                if index - start not in passed:
                    (item,) = table.annotations(index, index + 1)
                    yield index, item, False

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
        """The entries that are objects with an id of their own, as whole numbers."""
        seen: set[int] = set()
        for index, item in enumerate(table):
            number = whole_number(item.get("id")) if type(item) is dict else None
            if number is not None and number not in seen and -(2**63) <= number < 2**63:
                seen.add(number)
                if type(item["id"]) is not int:
                    self._converted(f"{what} {number}", f"id {show(item['id'])}")
                yield item | {"id": number}
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
        elif (number := whole_number(item["id"])) is None:
            self.error(f"{what} id that is not a whole number", where, show(item["id"]))
        elif not -(2**63) <= number < 2**63:
            self.error(f"{what} id of more than 64 bits", where, show(item["id"]))
        else:
            self.error(f"{what} id that comes twice", f"{what} {number}", f"entry {index}")

    def _converted(self, where: str, what: str) -> None:
        self.warning("number of another type (read as a whole number)", where, what)

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
        sides = []
        for key in ("height", "width"):
            if not self._has(image, key, where):
                continue
            side = whole_number(image[key])
            if side is None or not 0 < side < SIDE:
                kind = f"image {key} that is not a whole number from 1 to {SIDE - 1}"
                self.error(kind, where, show(image[key]))
                continue
            if type(image[key]) is not int:
                self._converted(where, f"{key} {show(image[key])}")
            sides.append(side)
        self.sizes[number] = (sides[0], sides[1]) if len(sides) == 2 else None

    def _name(self, image: dict, where: str) -> None:
        place = "coco_url" if self.lvis and image.get("coco_url") else "file_name"
        if self._has(image, place, where):
            if not is_line(image[place]) or not image[place]:
                self.error("file name that is not text", where, show(image[place]))
                return
            name = image_name(image, self.lvis)
            if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
                self.error("file name that leaves its folder", where, show(name))
            else:
                self.names[image["id"]] = name

    def _are_categories(self, ids: object) -> bool:
        return isinstance(ids, list) and all(
            type(one) is int and one in self.categories for one in ids
        )

    def _loose(self, item: object, index: int) -> Annotation | None:
        """An entry with values of other types; None after an error."""
        number = whole_number(item.get("id")) if isinstance(item, dict) else None
        if not isinstance(item, dict) or number is None:
            self._no_item(item, "annotation", index)
            return None
        found, errors, converted = loosely(item)
        place = _place(number, item["image_id"]) if "image_id" in item else f"annotation {number}"
        for kind, text in errors:
            self.error(kind, place, text)
        if converted:
            self._converted(place, converted)
        return found

    def _annotation(self, annotation: Annotation) -> Validated | None:
        """None after an error. Here the time goes: text is put together only where there is need."""
        image_id, category_id = annotation.image_id, annotation.category_id
        crowd = annotation.iscrowd != 0 and self._crowd(annotation)
        self._count += not crowd
        if category_id == self._root:
            self._root = None
        if image_id not in self.sizes:
            value = f"image {image_id}" if image_id != UNKNOWN else "no image"
            self._suspect(
                "annotation of an image that does not exist (it is left out)", annotation, value
            )
            return Validated(annotation, None, NO_IMAGE, "", True)
        self.objects[image_id] += 1
        if category_id not in self.categories:
            value = f"category {category_id}" if category_id != UNKNOWN else "no category"
            self._suspect(
                "annotation of a category that does not exist (it is left out)", annotation, value
            )
            return Validated(annotation, None, NO_CATEGORY, "", True)
        size = self.sizes[image_id]
        outline = read_outline(annotation.segmentation, size, boxed=not crowd)
        if outline.problem:
            self.error(outline.problem[0], _place_of(annotation), outline.problem[1])
        dropped = self._box(annotation, size, crowd)
        if dropped is None or outline.problem:
            return None
        if crowd or dropped:
            return Validated(annotation, outline.shape, CROWD if crowd else dropped, "", True)
        self.instances[category_id] += 1
        unmasked, own_box = self._compare(annotation, outline, size)
        self.outlines += not unmasked
        return Validated(annotation, None if unmasked else outline.shape, "", unmasked, own_box)

    def _crowd(self, annotation: Annotation) -> bool:
        crowd = annotation.iscrowd
        if crowd not in (0, 1, None):
            self.error("iscrowd that is neither 0 nor 1", _place_of(annotation), show(crowd))
            return False
        if crowd:
            self.warning("crowd region (training leaves it out)", _place_of(annotation), "")
        elif crowd is None and not self.lvis:
            kind = "annotation without 'iscrowd' (it is no crowd)"
            self.warning(kind, _place_of(annotation), "")
        return bool(crowd)

    def _box(self, annotation: Annotation, size: tuple[int, int] | None, crowd: bool) -> str | None:
        """Check box and area; why training leaves the object out (""), None after an error."""
        area = annotation.area
        if area is None:
            self.warning(WITHOUT_AREA, _place_of(annotation), "")
        elif not 0 <= area <= LARGEST:
            self.error("area that is not a number of pixels", _place_of(annotation), show(area))
            area = None
        x, y, width, height = annotation.bbox
        if not math.isfinite(x + y + width + height):
            self.error(
                "bbox that is not four finite numbers", _place_of(annotation), show(annotation.bbox)
            )
            return None
        empty = width <= 0 or height <= 0
        dropped: str | None = EMPTY if empty else ""
        if empty:
            kind = "box of zero size (training leaves it out)"
            self.warning(kind, _place_of(annotation), show(annotation.bbox))
        elif width < 1 and height < 1:
            self._suspect("box smaller than a pixel", annotation, show(annotation.bbox))
        if size is not None and not (
            0 <= x <= x + width <= size[1] and 0 <= y <= y + height <= size[0]
        ):
            dropped = self._outside(annotation, size, empty)
        pixels = width * height
        if area is not None and not empty and not area_fits(area, pixels) and not crowd:
            inside = f"{area:g} in {width:g} x {height:g}"
            self.warning("area that does not fit its box", _place_of(annotation), inside)
        return dropped

    def _outside(self, annotation: Annotation, size: tuple[int, int], empty: bool) -> str | None:
        x, y, width, height = annotation.bbox
        right, low = x + width, y + height
        rows, columns = size
        place = f"{show(annotation.bbox)} on {columns} x {rows} pixels"
        if reaches_far((x, y, right, low), size):
            self.error("box far outside its image", _place_of(annotation), place)
            return None
        if empty:
            return EMPTY
        if x < width <= columns and y < height <= rows:
            self._suspects[CORNERS] += 1
        if x >= columns or y >= rows or right <= 0 or low <= 0:
            self._suspect("box outside its image (training leaves it out)", annotation, place)
            return OUTSIDER
        if min(x, y) < -OUTSIDE or right > columns + OUTSIDE or low > rows + OUTSIDE:
            self.warning("box partly outside its image", _place_of(annotation), place)
        return ""

    def _compare(
        self, annotation: Annotation, outline: Outline, size: tuple[int, int] | None
    ) -> tuple[str, bool]:
        """Why the object trains no mask (""), and whether its box is `bbox` instead of the one around its outline."""
        if outline.left_out:
            kind = "outline with parts of fewer than 3 points (they are left out)"
            self.warning(
                kind, _place_of(annotation), f"{outline.left_out} of {len(annotation.segmentation)}"
            )
        if outline.shape is None:
            kind = "object without an outline (it trains boxes and classes, not masks)"
            self.warning(kind, _place_of(annotation), "")
            return NO_OUTLINE, True
        found = fit(annotation.bbox, outline.box, size or (SIDE, SIDE))
        if found == "fits":
            return "", False
        if found == "empty":
            kind = "outline without pixels in its image (the object trains its box and class)"
            self.warning(kind, _place_of(annotation), show(outline.box))
            return NO_PIXELS, True
        assert outline.box is not None
        x0, y0, x1, y1 = (round(value, 2) for value in outline.box)
        text = f"{show(annotation.bbox)}, that of the outline {show([x0, y0, x1 - x0, y1 - y0])}"
        if found == "differs":
            kind = "box that differs from the one around its outline (training takes the box)"
            self.warning(kind, _place_of(annotation), text)
            return "", True
        x, y, width, height = annotation.bbox
        is_inside = inside((x, y, x + width, y + height), size or (SIDE, SIDE))
        if is_inside and are_corners(
            annotation.bbox, outline.box
        ):  # else `_outside` has counted it
            self._suspects[CORNERS] += 1
        kind = "box that does not fit its outline (training leaves the outline out)"
        self._suspect(kind, annotation, text)
        return OTHER_PLACE, True

    def _suspect(self, kind: str, annotation: Annotation, text: str) -> None:
        """A warning that is an error if most objects have it."""
        self._suspects[kind] += 1
        self.warning(kind, _place_of(annotation), text)

    def _systematic(self) -> None:
        for kind, count in sorted(self._suspects.items(), key=lambda one: one[0] != CORNERS):
            if count >= MOST * self._count:
                text = f"{count} of {self._count}{HINTS.get(kind, '')}"
                self.error(f"most objects: {kind}", "annotations", text)


CORNERS = "bbox that reads as corners"
HINTS = {
    CORNERS: "; COCO's bbox is x, y, width, height, these look like x0, y0, x1, y1",
    "box smaller than a pixel": "; are the coordinates shares of the image, from 0 to 1? COCO's are pixels",
}


def _place_of(annotation: Annotation) -> str:
    return _place(annotation.id, annotation.image_id)


def _place(annotation_id: int, image_id: object) -> str:
    image = f" (image {show(image_id)})" if image_id != UNKNOWN else ""
    return f"annotation {annotation_id}{image}"


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
