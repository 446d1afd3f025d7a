"""Validation of annotation files, shared by `vitdet data check`, training, evaluation and the
report.

Errors are rejected by all of them, since results would be wrong. Warnings are skipped and counted,
or accepted, as in pycocotools, Detectron2 and mmdet. Values may be of any type; those that pass
cannot crash pycocotools."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vitdet.data.annotation_file import (
    UNKNOWN,
    Annotation,
    Entries,
    annotations_of,
    convert_annotation,
)
from vitdet.data.box_fit import are_corners, fit
from vitdet.data.flawless import LARGEST, ImageSizes, area_fits, find_flawless
from vitdet.data.header import (
    MAX_SIDE,
    Handler,
    HeaderValidator,
    Table,
    ignore_warning,
    raise_error,
)
from vitdet.data.segmentation import (
    Outline,
    inside,
    reaches_far,
    read_outline,
    show,
    whole_number,
)

OUTSIDE = 1.0  # tolerance in pixels for boxes that exceed their image: rounding by annotators
BLOCK = 1024  # annotations per block of the vectorized check
MOST = 0.5  # share of the objects from which a warning becomes an error of the whole export
# Reasons for dropping an object from training
CROWD, EMPTY, OUTSIDER = "crowd", "of zero size", "outside their images"
NO_IMAGE, NO_CATEGORY = "of unknown images", "of unknown categories"
# Reasons for training an object's box and class only
NO_OUTLINE, NO_PIXELS, OTHER_PLACE = (
    "without an outline",
    "with an outline that has no pixels in its image",
    "with an outline that does not match their box",
)
WITHOUT_AREA = "annotation without 'area' (the area of its mask or box is used)"


class Validated(NamedTuple):
    """A validated annotation.

    segmentation: usable polygons or RLE, or None. dropped: reason for dropping the object from
    training, or "". unmasked: reason for training its box and class only, or "". own_box: train on
    `bbox` instead of the box around the outline.
    """

    annotation: Annotation
    segmentation: list | dict | None
    dropped: str
    unmasked: str
    own_box: bool


def explain_dropped(dropped: Mapping[str, int]) -> str:
    """Explain why a split has no objects to train on: the number of annotations by reason."""
    causes = ", ".join(f"{count} {cause}" for cause, count in dropped.items() if cause)
    return f"its annotations are dropped: {causes}" if causes else "it has no annotations"


class AnnotationValidator(HeaderValidator):
    """Validates one annotation file: call `read_header`, then exhaust `annotations`.

    Attributes:
        instances: number of objects of each category that training uses.
        objects: number of annotations of each image.
        outlines: number of objects with a usable outline.
    """

    def __init__(
        self,
        lvis: bool,
        error: Handler = raise_error,
        warning: Handler = ignore_warning,
        files: bool = True,
    ) -> None:
        super().__init__(lvis, error, warning, files)
        self.instances: Counter[int] = Counter()
        self.objects: Counter[int] = Counter()
        self.outlines = 0
        self._suspects: Counter[str] = Counter()  # objects with a possibly systematic problem
        self._count = 0  # annotations that are not crowds

    def annotations(self, table: Table, flawless: bool = True) -> Iterator[Validated]:
        """Check each annotation, then the whole file; yield the annotations without errors.

        flawless: also yield annotations without any warning, which are the majority.
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
                where = f"annotation {annotation.id}"
                self.error("duplicate annotation id", where, f"entry {index}")
            else:
                seen.add(annotation.id)
                if (found := self._annotation(annotation)) is not None:
                    yield found
        self._systematic()
        if self._root is not None:
            del self.categories[self._root]
        for name, count in Counter(self.names.values()).items():
            if count > 1:
                self.warning("file shared by several images", show(name), f"{count} images")
        for image_id in self.sizes:
            if not self.objects[image_id]:
                self.warning("image without objects", f"image {image_id}", "")
        for category_id, name in self.categories.items():
            if not self.instances[category_id]:
                self.warning("category without instances", f"category {category_id}", show(name))

    def _sifted(
        self, table: Table, seen: set[int], flawless: bool
    ) -> Iterator[tuple[int, Any, bool]]:
        """Yield the index and entry of each annotation, and whether it is flawless.

        Counts the flawless ones, adds their ids to `seen` and yields them only with `flawless`.
        """
        if not isinstance(table, Entries):
            for index, item in enumerate(annotations_of(table)):
                yield index, item, False
            return
        images = ImageSizes(self.sizes)
        for start in range(0, len(table), BLOCK):
            stop = min(start + BLOCK, len(table))
            found = find_flawless(
                table.polygon_annotations(start, stop), images, self.categories, self.lvis, seen
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

    def _loose(self, item: object, index: int) -> Annotation | None:
        """Convert an entry whose values have other types; None after an error."""
        number = whole_number(item.get("id")) if isinstance(item, dict) else None
        if not isinstance(item, dict) or number is None:
            self._no_item(item, "annotation", index)
            return None
        found, errors, converted = convert_annotation(item)
        place = _place(number, item["image_id"]) if "image_id" in item else f"annotation {number}"
        for kind, text in errors:
            self.error(kind, place, text)
        if converted:
            self._converted(place, converted)
        return found

    def _annotation(self, annotation: Annotation) -> Validated | None:
        """Validate one annotation; None after an error.

        Speed matters: format text only if needed.
        """
        image_id, category_id = annotation.image_id, annotation.category_id
        crowd = annotation.iscrowd != 0 and self._crowd(annotation)
        self._count += not crowd
        if category_id == self._root:
            self._root = None
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
            self.warning("crowd region (ignored in training)", _place_of(annotation), "")
        elif crowd is None and not self.lvis:
            kind = "annotation without 'iscrowd' (read as 0)"
            self.warning(kind, _place_of(annotation), "")
        return bool(crowd)

    def _box(self, annotation: Annotation, size: tuple[int, int] | None, crowd: bool) -> str | None:
        """Check box and area; return the reason for dropping the object or "", None after an
        error.
        """
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
            kind = "box of zero size (ignored in training)"
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
            self._suspect("box outside its image (ignored in training)", annotation, place)
            return OUTSIDER
        if min(x, y) < -OUTSIDE or right > columns + OUTSIDE or low > rows + OUTSIDE:
            self.warning("box partly outside its image", _place_of(annotation), place)
        return ""

    def _compare(
        self, annotation: Annotation, outline: Outline, size: tuple[int, int] | None
    ) -> tuple[str, bool]:
        """Return the reason for not training a mask or "", and `Validated.own_box`."""
        if outline.left_out:
            kind = "outline with parts of fewer than 3 points (ignored)"
            self.warning(
                kind, _place_of(annotation), f"{outline.left_out} of {len(annotation.segmentation)}"
            )
        if outline.shape is None:
            kind = "object without an outline (trains box and class only)"
            self.warning(kind, _place_of(annotation), "")
            return NO_OUTLINE, True
        found = fit(annotation.bbox, outline.box, size or (MAX_SIDE, MAX_SIDE))
        if found == "fits":
            return "", False
        if found == "empty":
            kind = "outline without pixels in its image (trains box and class only)"
            self.warning(kind, _place_of(annotation), show(outline.box))
            return NO_PIXELS, True
        assert outline.box is not None
        x0, y0, x1, y1 = (round(value, 2) for value in outline.box)
        text = f"{show(annotation.bbox)}, of the outline {show([x0, y0, x1 - x0, y1 - y0])}"
        if found == "differs":
            kind = "box that differs from the one around its outline (training uses the box)"
            self.warning(kind, _place_of(annotation), text)
            return "", True
        x, y, width, height = annotation.bbox
        is_inside = inside((x, y, x + width, y + height), size or (MAX_SIDE, MAX_SIDE))
        # other boxes were counted by `_outside`
        if is_inside and are_corners(annotation.bbox, outline.box):
            self._suspects[CORNERS] += 1
        kind = "box that does not fit its outline (trains box and class only)"
        self._suspect(kind, annotation, text)
        return OTHER_PLACE, True

    def _suspect(self, kind: str, annotation: Annotation, text: str) -> None:
        """Warn of a problem that is an error if most objects have it."""
        self._suspects[kind] += 1
        self.warning(kind, _place_of(annotation), text)

    def _systematic(self) -> None:
        for kind, count in sorted(self._suspects.items(), key=lambda one: one[0] != CORNERS):
            if count >= MOST * self._count:
                text = f"{count} of {self._count}{HINTS.get(kind, '')}"
                self.error(f"most objects: {kind}", "annotations", text)


CORNERS = "bbox that looks like corners"
HINTS = {
    CORNERS: "; COCO's bbox is x, y, width, height; these look like x0, y0, x1, y1",
    "box smaller than a pixel": "; are the coordinates normalized to 0..1? COCO's are in pixels",
}


def _place_of(annotation: Annotation) -> str:
    return _place(annotation.id, annotation.image_id)


def _place(annotation_id: int, image_id: object) -> str:
    image = f" (image {show(image_id)})" if image_id != UNKNOWN else ""
    return f"annotation {annotation_id}{image}"
