"""Validation of annotation files in COCO's or LVIS's format.

A file with errors is rejected, since the results would be wrong. An object with a warning is either
skipped and counted, or accepted, as in pycocotools, Detectron2 and mmdet. Values that pass the
validation cannot crash pycocotools.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vitdet.data.annotation_file import UNKNOWN, Annotation, annotations_of, convert_annotation
from vitdet.data.flawless import LARGEST, area_fits, find_flawless, image_table
from vitdet.data.header import MAX_SIDE, HeaderValidator, Table
from vitdet.data.segmentation import (
    Outline,
    are_corners,
    fit,
    inside,
    reaches_far,
    read_outline,
    show,
    whole_number,
)

OUTSIDE = 1.0  # tolerance in pixels for boxes that extend beyond their image due to rounding
BLOCK = 1024  # annotations per block of the vectorized check
MOST = 0.5  # a problem in `suspects` is an error if at least this fraction of objects has it
# Reasons for dropping an object from training
CROWD, EMPTY, OUTSIDER = "marked as crowd", "of zero size", "outside the image"
NO_IMAGE, NO_CATEGORY = "without a known image", "without a known category"
# Reasons for using only the box and class of an object in training
NO_OUTLINE, NO_PIXELS, OTHER_PLACE = (
    "without an outline",
    "with an outline that has no pixels in the image",
    "with an outline that does not match the box",
)
WITHOUT_AREA = "annotation without 'area' (the area of its mask or box is used)"
CORNERS = "bbox that looks like corners"
HINTS = {
    CORNERS: "; COCO's bbox is x, y, width, height; these look like x0, y0, x1, y1",
    "box smaller than a pixel": "; are the coordinates normalized to 0..1? COCO's are in pixels",
}


class Validated(NamedTuple):
    """A validated annotation.

    Attributes:
        segmentation: usable polygons or RLE, or None.
        dropped: reason for dropping the object from training, or "".
        unmasked: reason for using only the box and class of the object, or "".
        own_box: whether to train on `bbox` instead of the box around the outline.
    """

    annotation: Annotation
    segmentation: list | dict | None
    dropped: str = ""
    unmasked: str = ""
    own_box: bool = False


def explain_dropped(dropped: Mapping[str, int]) -> str:
    """Explain why a split has no objects to train on, with the number of annotations by reason."""
    causes = ", ".join(f"{count} {cause}" for cause, count in dropped.items() if cause)
    return f"all annotations are dropped: {causes}" if causes else "there are no annotations"


@dataclass
class AnnotationValidator(HeaderValidator):
    """Validates one annotation file: call `read_header`, then iterate over `annotations`.

    Attributes:
        instances: number of objects that training uses, by category id.
        objects: number of annotations by image id.
        outlines: number of objects with a usable outline.
        suspects: number of objects with a problem that may be systematic, by problem.
        count: number of annotations that are not crowds.
    """

    instances: Counter[int] = field(default_factory=Counter, init=False)
    objects: Counter[int] = field(default_factory=Counter, init=False)
    outlines: int = field(default=0, init=False)
    suspects: Counter[str] = field(default_factory=Counter, init=False)
    count: int = field(default=0, init=False)

    def annotations(self, table: Table, flawless: bool = True) -> Iterator[Validated]:
        """Validate each annotation, then the whole file; yield the annotations without errors.

        flawless: whether to also yield the annotations that `find_flawless` returns (usually most).
        """
        seen: set[int] = set()
        images = image_table(self.sizes)
        for start in range(0, len(table), BLOCK):
            rows: Sequence[int] = range(start, min(start + BLOCK, len(table)))
            block = annotations_of(table, rows)
            found = find_flawless(block, images, self.categories, self.lvis, seen)
            seen.update(found.ids)
            self.objects.update(found.image_ids)
            self.instances.update(found.category_ids)
            self.outlines += len(found.ids)
            self.count += len(found.ids)
            if self.root in found.category_ids:
                self.root = None
            passed = {start + row for row in found.rows}
            if not flawless:
                rows = [row for row in rows if row not in passed]
            for row, item in zip(rows, annotations_of(table, rows), strict=True):
                if row in passed:
                    yield Validated(item, item.segmentation)
                elif (validated := self._entry(item, row, seen)) is not None:
                    yield validated
        self._whole_file()

    def _whole_file(self) -> None:
        for kind, count in sorted(self.suspects.items(), key=lambda item: item[0] != CORNERS):
            if count >= MOST * self.count:
                text = f"{count} of {self.count}{HINTS.get(kind, '')}"
                self.error(f"most objects: {kind}", "annotations", text)
        if self.root is not None:
            del self.categories[self.root]
        for name, count in Counter(self.names.values()).items():
            if count > 1:
                self.warning("file shared by several images", show(name), f"{count} images")
        for image_id in self.sizes:
            if not self.objects[image_id]:
                self.warning("image without objects", f"image {image_id}", "")
        for category_id, name in self.categories.items():
            if not self.instances[category_id]:
                self.warning("category without instances", f"category {category_id}", show(name))

    def _entry(self, item: object, index: int, seen: set[int]) -> Validated | None:
        """Validate an entry of the table; return None after an error."""
        annotation = item if isinstance(item, Annotation) else self._convert(item, index)
        if annotation is None:
            return None
        if not self._add_id(annotation.id, seen):
            self._invalid({"id": annotation.id}, "annotation", index)
            return None
        return self._annotation(annotation)

    def _convert(self, item: object, index: int) -> Annotation | None:
        number = whole_number(item.get("id")) if isinstance(item, dict) else None
        if not isinstance(item, dict) or number is None:
            self._invalid(item, "annotation", index)
            return None
        found, errors, converted = convert_annotation(item)
        where = _location(number, item.get("image_id", UNKNOWN))
        for kind, text in errors:
            self.error(kind, where, text)
        if converted:
            self._converted(where, converted)
        return found

    def _annotation(self, annotation: Annotation) -> Validated | None:
        image_id, category_id = annotation.image_id, annotation.category_id
        crowd = annotation.iscrowd != 0 and self._crowd(annotation)
        self.count += not crowd
        if category_id == self.root:
            self.root = None
        if image_id not in self.sizes:
            value = f"image {image_id}" if image_id != UNKNOWN else "no image"
            self._suspect("annotation of an unknown image (dropped)", annotation, value)
            return Validated(annotation, None, NO_IMAGE, "", True)
        self.objects[image_id] += 1
        if category_id not in self.categories:
            value = f"category {category_id}" if category_id != UNKNOWN else "no category"
            self._suspect("annotation of an unknown category (dropped)", annotation, value)
            return Validated(annotation, None, NO_CATEGORY, "", True)
        size = self.sizes[image_id]
        outline = read_outline(annotation.segmentation, size, boxed=not crowd)
        if outline.problem:
            self._wrong(outline.problem[0], annotation, outline.problem[1])
        dropped = self._box(annotation, size, crowd)
        if dropped is None or outline.problem:
            return None
        if crowd or dropped:
            return Validated(annotation, outline.shape, CROWD if crowd else dropped, "", True)
        self.instances[category_id] += 1
        unmasked, own_box = self._compare(annotation, outline, size or (MAX_SIDE, MAX_SIDE))
        self.outlines += not unmasked
        return Validated(annotation, None if unmasked else outline.shape, "", unmasked, own_box)

    def _crowd(self, annotation: Annotation) -> bool:
        crowd = annotation.iscrowd
        if crowd not in (0, 1, None):
            self._wrong("iscrowd that is neither 0 nor 1", annotation, show(crowd))
            return False
        if crowd:
            self._warn("crowd region (ignored in training)", annotation)
        elif crowd is None and not self.lvis:
            self._warn("annotation without 'iscrowd' (read as 0)", annotation)
        return bool(crowd)

    def _box(self, annotation: Annotation, size: tuple[int, int] | None, crowd: bool) -> str | None:
        """Validate box and area; return `Validated.dropped`, or None if the box is invalid."""
        area, bbox = annotation.area, annotation.bbox
        if area is None:
            self._warn(WITHOUT_AREA, annotation)
        elif not 0 <= area <= LARGEST:
            self._wrong("area that is not a number of pixels", annotation, show(area))
            area = None
        x, y, width, height = bbox
        if not math.isfinite(x + y + width + height):
            self._wrong("bbox that is not four finite numbers", annotation, show(bbox))
            return None
        empty = width <= 0 or height <= 0
        dropped: str | None = EMPTY if empty else ""
        if empty:
            self._warn("box of zero size (ignored in training)", annotation, show(bbox))
        elif width < 1 and height < 1:
            self._suspect("box smaller than a pixel", annotation, show(bbox))
        if size is not None and not (
            0 <= x <= x + width <= size[1] and 0 <= y <= y + height <= size[0]
        ):
            dropped = self._outside(annotation, size, empty)
        if area is not None and not empty and not area_fits(area, width * height) and not crowd:
            text = f"area {area:g}, box {width:g} x {height:g}"
            self._warn("area that does not fit its box", annotation, text)
        return dropped

    def _outside(self, annotation: Annotation, size: tuple[int, int], empty: bool) -> str | None:
        x, y, width, height = annotation.bbox
        right, bottom = x + width, y + height
        rows, columns = size
        text = f"{show(annotation.bbox)} on {columns} x {rows} pixels"
        if reaches_far((x, y, right, bottom), size):
            self._wrong("box far outside its image", annotation, text)
            return None
        if empty:
            return EMPTY
        if x < width <= columns and y < height <= rows:
            self.suspects[CORNERS] += 1
        if x >= columns or y >= rows or right <= 0 or bottom <= 0:
            self._suspect("box outside its image (ignored in training)", annotation, text)
            return OUTSIDER
        if min(x, y) < -OUTSIDE or right > columns + OUTSIDE or bottom > rows + OUTSIDE:
            self._warn("box partly outside its image", annotation, text)
        return ""

    def _compare(
        self, annotation: Annotation, outline: Outline, size: tuple[int, int]
    ) -> tuple[str, bool]:
        """Compare box and outline; return `Validated.unmasked` and `Validated.own_box`."""
        if outline.left_out:
            text = f"{outline.left_out} of {len(annotation.segmentation or ())} parts"
            kind = "outline with parts of fewer than 3 points or an odd length (ignored)"
            self._warn(kind, annotation, text)
        if outline.shape is None:
            self._warn("object without an outline (used for box and class only)", annotation)
            return NO_OUTLINE, True
        found = fit(annotation.bbox, outline.box, size)
        if found == "fits":
            return "", False
        if found == "empty" or outline.box is None:
            kind = "outline without pixels in its image (object used for box and class only)"
            self._warn(kind, annotation, show(outline.box))
            return NO_PIXELS, True
        x0, y0, x1, y1 = (round(value, 2) for value in outline.box)
        text = f"{show(annotation.bbox)}, outline in {show([x0, y0, x1 - x0, y1 - y0])}"
        if found == "differs":
            kind = "bbox that differs from the box around its outline (training uses bbox)"
            self._warn(kind, annotation, text)
            return "", True
        x, y, width, height = annotation.bbox
        # `_outside` has already counted boxes that extend beyond the image
        if inside((x, y, x + width, y + height), size) and are_corners(
            annotation.bbox, outline.box
        ):
            self.suspects[CORNERS] += 1
        kind = "box that does not fit its outline (object used for box and class only)"
        self._suspect(kind, annotation, text)
        return OTHER_PLACE, True

    def _wrong(self, kind: str, annotation: Annotation, text: str) -> None:
        self.error(kind, _location(annotation.id, annotation.image_id), text)

    def _warn(self, kind: str, annotation: Annotation, text: str = "") -> None:
        self.warning(kind, _location(annotation.id, annotation.image_id), text)

    def _suspect(self, kind: str, annotation: Annotation, text: str) -> None:
        """Warn about a problem that becomes an error if most objects have it."""
        self.suspects[kind] += 1
        self._warn(kind, annotation, text)


def _location(annotation_id: int, image_id: object) -> str:
    image = f" (image {show(image_id)})" if image_id != UNKNOWN else ""
    return f"annotation {annotation_id}{image}"
