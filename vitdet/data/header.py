"""Validation of an annotation file's tables, categories and images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from vitdet.data.annotation_file import Entries, InvalidEntry
from vitdet.data.coco_layouts import image_name
from vitdet.data.segmentation import show, whole_number

# image sides must be below this number of pixels, as in JPEG; RLEs count pixels in 32 bits
MAX_SIDE = 2**16
# LVIS image fields that list the categories that are absent or not exhaustively annotated
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
COCO_HINT = "required by LVIS; for COCO's annotations set data.dataset=coco"

Table: TypeAlias = list | Entries
# called with the kind of problem, its location in the file, and details ('' for none)
Handler: TypeAlias = Callable[[str, str, str], None]


def raise_error(kind: str, where: str, what: str) -> None:
    """Raise ValueError with a one-line message (error handler of training and evaluation)."""
    raise ValueError(f"{where}: {kind}{what and ': '}{what}")


def ignore_warning(kind: str, where: str, what: str) -> None:
    """Ignore a warning (warning handler of training and evaluation)."""


def root_category(categories: Iterable[object]) -> int | None:
    """Return 0 if category 0 is Roboflow's supercategory of all other categories, else None."""
    items = [item for item in categories if isinstance(item, dict)]
    names = [item.get("name") for item in items if whole_number(item.get("id")) == 0]
    others = [item for item in items if whole_number(item.get("id")) != 0]
    is_root = others and names and all(other.get("supercategory") == names[0] for other in others)
    return 0 if is_root else None


@dataclass
class HeaderValidator:
    """Validates the tables, categories and images of one annotation file.

    Args:
        lvis: whether the file has LVIS's format, not COCO's.
        error, warning: functions that are called for each problem (see `Handler`).
        files: whether each image needs a valid file name.

    Attributes:
        sizes: (height, width) of each image by id; None if a side is missing or invalid.
        names: file name of each image by id.
        categories: name of each category by id.
        stated: `image_count` of each category by id, as in the file.
        root: result of `root_category`, or None if an annotation uses the root category.
    """

    lvis: bool
    error: Handler = raise_error
    warning: Handler = ignore_warning
    files: bool = True
    sizes: dict[int, tuple[int, int] | None] = field(default_factory=dict, init=False)
    names: dict[int, str] = field(default_factory=dict, init=False)
    categories: dict[int, str] = field(default_factory=dict, init=False)
    stated: dict[int, object] = field(default_factory=dict, init=False)
    root: int | None = field(default=None, init=False)

    def read_header(self, content: object) -> dict[str, Table]:
        """Validate layout, categories and images; return the tables ([] if missing or invalid)."""
        tables = self._tables(content)
        self.root = root_category(tables["categories"])
        for category in self._items(tables["categories"], "category"):
            self._category(category)
        for image in self._items(tables["images"], "image"):
            self._image(image)
        return tables

    def _tables(self, content: object) -> dict[str, Table]:
        tables: dict[str, Table] = {"images": [], "annotations": [], "categories": []}
        if not isinstance(content, dict):
            text = f"expected a JSON object with {', '.join(tables)}; got {type(content).__name__}"
            self.error("not COCO's layout", "top level", text)
            return tables
        for key in tables:
            if key not in content:
                text = f"got the keys {show(list(content))}"
                self.error(f"no {key!r} in the file", "top level", text)
            elif not isinstance(content[key], Table):
                self.error(f"{key!r} is not a list", "top level", f"got {show(content[key])}")
            else:
                tables[key] = content[key]
        return tables

    def _items(self, table: Table, what: str) -> Iterator[dict]:
        """Yield entries with their id as int; report entries without a valid, unique id."""
        seen: set[int] = set()
        for index, item in enumerate(table):
            number = whole_number(item.get("id")) if type(item) is dict else None
            if number is None or not self._add_id(number, seen):
                self._invalid(item, what, index)
                continue
            if type(item["id"]) is not int:
                self._converted(f"{what} {number}", f"id {show(item['id'])}")
            yield item | {"id": number}

    @staticmethod
    def _add_id(number: int, seen: set[int]) -> bool:
        """Add an id to `seen`; return False for a duplicate id or an id of more than 64 bits."""
        is_new = number not in seen and -(2**63) <= number < 2**63
        if is_new:
            seen.add(number)
        return is_new

    def _invalid(self, item: object, what: str, index: int) -> None:
        """Report an entry without a valid, unique id."""
        where = f"{what} entry {index}"
        if isinstance(item, InvalidEntry):
            self.error("invalid JSON", where, item.reason)
        elif not isinstance(item, dict):
            self.error(f"{what} that is not a JSON object", where, show(item))
        elif "id" not in item:
            self.error(f"{what} without 'id'", where, show(item))
        elif (number := whole_number(item["id"])) is None:
            self.error(f"{what} id that is not a whole number", where, show(item["id"]))
        elif not -(2**63) <= number < 2**63:
            self.error(f"{what} id of more than 64 bits", where, show(item["id"]))
        else:
            self.error(f"duplicate {what} id", f"{what} {number}", f"entry {index}")

    def _converted(self, where: str, what: str) -> None:
        self.warning("number stored as a different type (read as an integer)", where, what)

    def _has(self, item: dict, key: str, where: str) -> bool:
        if key not in item:
            self.error(f"{where.split()[0]} without {key!r}", where, "")
        return key in item

    def _category(self, category: dict) -> None:
        number, name = category["id"], category.get("name")
        where = f"category {number}"
        if self._has(category, "name", where) and not is_text(name):
            self.error("category name that is not one line of text", where, show(name))
        elif name in self.categories.values():
            self.warning("duplicate category name", where, show(name))
        if self.lvis and category.get("frequency") not in ("r", "c", "f"):
            stated = show(category["frequency"]) if "frequency" in category else COCO_HINT
            self.error("category whose frequency is not r, c or f", where, stated)
        self.categories[number] = name if isinstance(name, str) and is_text(name) else ""
        self.stated[number] = category.get("image_count")

    def _image(self, image: dict) -> None:
        number, where = image["id"], f"image {image['id']}"
        if self.files:
            self._name(image, where)
        for key in LISTS if self.lvis else ():
            if key not in image:
                self.error(f"image without {key!r}", where, COCO_HINT)
            elif not self._are_categories(image[key]):
                self.error(f"{key!r} that is not a list of categories", where, show(image[key]))
        sides = []
        for key in ("height", "width"):
            if not self._has(image, key, where):
                continue
            side = whole_number(image[key])
            if side is None or not 0 < side < MAX_SIDE:
                kind = f"image {key} that is not a whole number from 1 to {MAX_SIDE - 1}"
                self.error(kind, where, show(image[key]))
                continue
            if type(image[key]) is not int:
                self._converted(where, f"{key} {show(image[key])}")
            sides.append(side)
        self.sizes[number] = (sides[0], sides[1]) if len(sides) == 2 else None

    def _name(self, image: dict, where: str) -> None:
        key = "coco_url" if self.lvis and image.get("coco_url") else "file_name"
        if not self._has(image, key, where):
            return
        if not is_line(image[key]) or not image[key]:
            self.error("file name that is not one line of text", where, show(image[key]))
            return
        name = image_name(image, self.lvis)
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            self.error("file name that points outside its folder", where, show(name))
        else:
            self.names[image["id"]] = name

    def _are_categories(self, ids: object) -> bool:
        return isinstance(ids, list) and all(
            type(number) is int and number in self.categories for number in ids
        )


def is_line(value: object) -> bool:
    """Return whether a value is a string of at most one line without NUL characters."""
    return isinstance(value, str) and len(value.splitlines()) < 2 and "\0" not in value


def is_text(value: object) -> bool:
    """Return whether a value satisfies `is_line` and can be encoded as UTF-8."""
    return is_line(value) and not re.search("[\ud800-\udfff]", str(value))
