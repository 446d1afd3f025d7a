"""All problems of a folder in COCO's or LVIS's layout at once.

An error is what training or evaluation would stop at, or what would make their figures worthless; without errors both
run. A warning is what they leave out or tolerate, as the published recipes do with crowds and boxes of zero size.
Nothing is trusted: a value of any type where another was expected becomes an entry of the report.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

from PIL import ExifTags, Image

from vitdet.data.coco import image_name
from vitdet.data.entries import Entries, read_entries
from vitdet.data.report import Report
from vitdet.data.values import is_number, segmentation_problem, show

PREFIXES = ("instances_", "lvis_v1_")  # of annotation files: COCO's and LVIS's
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")  # of an LVIS image: what its annotators looked for
Table = list | Entries
OUTSIDE = 1.0  # pixels by which a box may leave its image unnoticed: annotators' rounding


def check(folder: Path | str, splits: Sequence[str] | None = None, images: bool = True) -> Report:
    """Looks at folder/annotations/instances_SPLIT.json and folder/SPLIT/ of the given splits, or of all there are.

    LVIS is found as lvis_v1_SPLIT.json, its images below `folder` where their coco_url says. images: also decode every
    image file, on all processors, which takes most of the time; else only whether it is there.
    """
    report = Report(Path(folder))
    found = [(prefix, path.stem.removeprefix(prefix)) for prefix in PREFIXES
             for path in sorted(report.folder.glob(f"annotations/{prefix}*.json"))]
    if splits is not None:
        there = {name: [pair for pair in found if pair[1] == name] for name in splits}
        found = [pair for name, pairs in there.items() for pair in pairs or [(PREFIXES[0], name)]]
    elif not found:
        report.error("no annotation file", f"expected {report.folder}/annotations/instances_SPLIT.json")
    checked = [_Split(report, prefix, name) for prefix, name in found]
    for split in checked:
        split.check()
    digests = [split.read_images() if images else split.find_images() for split in checked]
    for (first, its_digests), (second, other_digests) in combinations(zip(checked, digests, strict=True), 2):
        if first.lvis == second.lvis:  # one picture may well be in COCO and in LVIS
            _compare(report, first, second, its_digests, other_digests)
    return report


class _Split:
    """One annotation file while it is looked at."""

    def __init__(self, report: Report, prefix: str, name: str) -> None:
        self.report = report
        self.lvis = prefix == "lvis_v1_"
        self.name = f"lvis_v1_{name}" if self.lvis else name  # in the report
        self.images = report.folder if self.lvis else report.folder / name
        self.file = f"{prefix}{name}.json"
        self.sizes: dict[int, tuple[int, int] | None] = {}  # image id -> (height, width), None where not known
        self.names: dict[int, str] = {}  # image id -> file name
        self.categories: dict[int, str] = {}
        self.instances: Counter[int] = Counter()  # category id -> objects that training uses
        self.objects: Counter[int] = Counter()  # image id -> annotations

    def check(self) -> None:
        """Everything but the image files."""
        tables = self._load()
        if tables is None:
            return
        images, annotations, categories = tables
        self.report.splits[self.name] = len(images), len(annotations), len(categories)
        for where, category in self._items(categories, "category"):
            self.categories[category["id"]] = self._category_name(where, category)
            if self.lvis and category.get("frequency") not in ("r", "c", "f"):
                self._error("category whose frequency is not r, c or f", f"{where}: {show(category.get('frequency'))}")
        for where, image in self._items(images, "image"):
            self._image(where, image)
        for where, annotation in self._items(annotations, "annotation"):
            self._annotation(where, annotation)
        for name, count in Counter(self.names.values()).items():
            if count > 1:
                self._warning("file that several images share", f"{show(name)} ({count} images)")
        for image_id in self.sizes:
            if not self.objects[image_id]:
                self._warning("image without objects", f"image {image_id}")
        for category_id, name in self.categories.items():
            if not self.instances[category_id]:
                self._warning("category without instances", f"category {category_id} {show(name)}")

    def find_images(self) -> dict[int, str]:
        """No digests; the files that are not there become errors."""
        for image_id, name in self.names.items():
            if not os.path.isfile(f"{self.images}/{name}"):
                self._image_error("missing image file", image_id)
        return {}

    def read_images(self) -> dict[int, str]:
        """The digest of each image's file; the files that cannot be used become errors."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            outcomes = pool.map(self._read_image, self.names)
            digests = {}
            for image_id, (kind, what, digest) in zip(self.names, outcomes, strict=True):
                if kind:
                    self._image_error(kind, image_id, what)
                if digest:
                    digests[image_id] = digest
        return digests

    def _image_error(self, kind: str, image_id: int, what: str = "") -> None:
        folder = "" if self.lvis else f"{self.name}/"
        self._error(kind, f"image {image_id}: {folder}{show(self.names[image_id])}{what}")

    def _error(self, kind: str, where: str) -> None:
        self.report.error(kind, f"{self.file}: {where}")

    def _warning(self, kind: str, where: str) -> None:
        self.report.warning(kind, f"{self.file}: {where}")

    def _load(self) -> tuple[Table, Table, Table] | None:
        path = self.report.folder / "annotations" / self.file
        try:
            content = read_entries(path)
        except FileNotFoundError:
            self.report.error("no annotation file", f"expected {path}")
            return None
        except OSError as error:
            self._error("annotation file that cannot be read", str(error))
            return None
        except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError, which says where
            self._error("broken JSON", str(error))
            return None
        if not isinstance(content, dict):
            self._error("not COCO's layout", f"expected an object with images, annotations, categories; got a "
                                             f"{type(content).__name__}")
            return None
        tables = []
        for key in ("images", "annotations", "categories"):
            table = content.get(key)
            if key not in content:
                self._error(f"no {key!r} in the file", f"its keys are {show(list(content))}")
            elif not isinstance(table, Table):
                self._error(f"{key!r} is not a list", f"got {show(table)}")
            tables.append(table if isinstance(table, Table) else [])
        return tables[0], tables[1], tables[2]

    def _items(self, table: Table, what: str) -> Iterator[tuple[str, dict]]:
        """The entries that are objects with an id of their own, each with how to name it."""
        seen = set()
        for index, item in enumerate(table):
            if not isinstance(item, dict):
                self._error(f"{what} that is not an object", f"entry {index}: {show(item)}")
            elif "id" not in item:
                self._error(f"{what} without 'id'", f"entry {index}: {show(item)}")
            elif type(item["id"]) is not int:
                self._error(f"{what} id that is not a whole number", f"entry {index}: {show(item['id'])}")
            elif not -(2**63) <= item["id"] < 2**63:
                self._error(f"{what} id of more than 64 bits", f"entry {index}: {show(item['id'])}")
            elif item["id"] in seen:
                self._error(f"{what} id that comes twice", f"{what} {item['id']} (entry {index})")
            else:
                seen.add(item["id"])
                yield f"{what} {item['id']}", item

    def _has(self, where: str, item: dict, key: str) -> bool:
        if key not in item:
            self._error(f"{where.split()[0]} without {key!r}", where)
        return key in item

    def _category_name(self, where: str, category: dict) -> str:
        if self._has(where, category, "name") and not isinstance(category["name"], str):
            self._error("category name that is not text", f"{where}: {show(category['name'])}")
        elif category.get("name") in self.categories.values():
            self._warning("category name that comes twice", f"{where}: {show(category['name'])}")
        return category["name"] if isinstance(category.get("name"), str) else ""

    def _are_categories(self, ids: object) -> bool:
        return isinstance(ids, list) and all(type(one) is int and one in self.categories for one in ids)

    def _image(self, where: str, image: dict) -> None:
        image_id, place = image["id"], "coco_url" if self.lvis and image.get("coco_url") else "file_name"
        if self._has(where, image, place):
            if isinstance(image[place], str) and image[place]:
                self.names[image_id] = image_name(image, self.lvis)
            else:
                self._error("file name that is not text", f"{where}: {show(image[place])}")
        for key in LISTS if self.lvis else ():
            if self._has(where, image, key) and not self._are_categories(image[key]):
                self._error(f"{key!r} that are not categories", f"{where}: {show(image[key])}")
        present = [key for key in ("height", "width") if self._has(where, image, key)]
        wrong = [key for key in present if type(image[key]) is not int or not 0 < image[key] < 2**31]
        for key in wrong:
            self._error(f"image {key} that is not a positive whole number", f"{where}: {show(image[key])}")
        self.sizes[image_id] = None if wrong or len(present) < 2 else (image["height"], image["width"])

    def _annotation(self, where: str, annotation: dict) -> None:
        for key in ("area",) if self.lvis else ("area", "iscrowd"):
            self._has(where, annotation, key)
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        size = None
        if self._has(where, annotation, "image_id"):
            if type(image_id) is not int or image_id not in self.sizes:
                self._error("annotation of an image that does not exist", f"{where}: image {show(image_id)}")
            else:
                size = self.sizes[image_id]
                self.objects[image_id] += 1
                where = f"{where} (image {image_id})"
        known = type(category_id) is int and category_id in self.categories
        if self._has(where, annotation, "category_id") and not known:
            self._error("annotation of a category that does not exist", f"{where}: category {show(category_id)}")
        crowd, area = annotation.get("iscrowd", 0), annotation.get("area", 0)
        if type(crowd) not in (int, bool) or crowd not in (0, 1):
            self._error("iscrowd that is neither 0 nor 1", f"{where}: {show(crowd)}")
        elif crowd:
            self._warning("crowd region (training leaves it out)", where)
        if not is_number(area):
            self._error("area that is not a number", f"{where}: {show(area)}")
        zero = self._has(where, annotation, "bbox") and self._box(where, annotation["bbox"], area, size, bool(crowd))
        if self._has(where, annotation, "segmentation") and not zero:
            problem = segmentation_problem(annotation["segmentation"], size)
            if problem:
                self._error(problem[0], f"{where}: {problem[1]}")
        if known and not crowd and not zero:
            self.instances[category_id] += 1

    def _box(self, where: str, box: object, area: object, size: tuple[int, int] | None, crowd: bool) -> bool:
        """Notes what is wrong with a box; True where it has no size."""
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            self._error("bbox that is not four finite numbers", f"{where}: {show(box)}")
            return False
        x, y, width, height = box
        if width <= 0 or height <= 0:
            self._warning("box of zero size (training leaves it out)", f"{where}: {show(box)}")
            return True
        if size is not None:
            rows, columns = size
            inside = f"{where}: {show(box)} on {columns} x {rows} pixels"
            if x >= columns or y >= rows or x + width <= 0 or y + height <= 0:
                self._error("box outside its image", inside)
            elif min(x, y) < -OUTSIDE or x + width > columns + OUTSIDE or y + height > rows + OUTSIDE:
                self._warning("box partly outside its image", inside)
        if not crowd and is_number(area) and not 0.005 * width * height <= area <= 1.1 * width * height + 4:
            self._warning("area that does not fit its box", f"{where}: {show(area)} in {width:g} x {height:g}")
        return False

    def _read_image(self, image_id: int) -> tuple[str, str, str]:
        """Kind of error ('': none), its text, digest of the file's bytes ('': not read)."""
        try:
            content = (self.images / self.names[image_id]).read_bytes()
        except FileNotFoundError:
            return "missing image file", "", ""
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            return "image file that cannot be read", f": {error}", ""
        digest = hashlib.sha256(content).hexdigest()
        try:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # lies on its side
                    width, height = height, width
                image.draft("RGB", (1, 1))  # JPEG: reads every byte but computes an eighth of the resolution
                image.load()
        except Exception as error:  # whatever a decoder does with damaged bytes: it is reported
            return "image file that is truncated or no image", f": {' '.join(str(error).split())}", digest
        size = self.sizes.get(image_id)
        if size not in (None, (height, width)):
            return ("image of another size than annotated",
                    f": {width} x {height}, annotated {size[1]} x {size[0]} (width x height)", digest)
        return "", "", digest


def _compare(report: Report, first: _Split, second: _Split, first_digests: dict[int, str],
             second_digests: dict[int, str]) -> None:
    """What two splits must not share; pictures are compared where both were read, else ids and file names."""
    pair = f"{first.file} and {second.file}"
    if first.categories != second.categories and first.name in report.splits and second.name in report.splits:
        differing = sorted(set(first.categories.items()) ^ set(second.categories.items()))
        report.error("categories that differ between splits", f"{pair}: {show(differing)}")
    image_of = {digest: image_id for image_id, digest in first_digests.items()}
    for image_id, digest in second_digests.items():
        if digest in image_of:
            report.error("picture in two splits",
                  f"{pair}: image {image_of[digest]} and image {image_id}, {show(second.names[image_id])}")
    by_name = {name: image_id for image_id, name in second.names.items()}
    same_id = [("image id in two splits", str(key), key, key) for key in first.sizes.keys() & second.sizes.keys()]
    same_name = [("file name in two splits", show(name), key, by_name[name]) for key, name in first.names.items()
                 if name in by_name]
    for kind, value, one, other in sorted(same_id, key=lambda entry: entry[2]) + same_name:
        digests = first_digests.get(one), second_digests.get(other)
        if None in digests:  # not read: it may be the same picture
            report.error(kind, f"{pair}: {value}")
        elif digests[0] != digests[1]:  # two pictures under one number, which training tolerates
            report.warning(kind, f"{pair}: {value}")
