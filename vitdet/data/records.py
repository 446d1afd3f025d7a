"""Images of a split with their objects, stored in arrays that worker processes share.

Notation: N images, M objects in the split, G objects in one image.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from vitdet.data.shared_memory import PackedList, Shared


@dataclass(frozen=True)
class Record:
    """An image with its objects.

    boxes (G, 4) are float32 xyxy in pixels, labels (G,) int64 class indices. A segmentation is a
    list of COCO polygons (flat x, y lists), an RLE dict or None. own_box (G,) bool marks objects
    whose training target is the annotated box instead of the box around the outline."""

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list
    own_box: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Objects:
    """Objects of a split in file order."""

    def __init__(self) -> None:
        self.rows, self.categories, self.boxes = array("q"), array("q"), array("d")
        self.own_boxes = bytearray()
        self.segmentations: PackedList[list | dict | None] = PackedList()

    def append(
        self,
        row: int,
        category_id: int,
        box: Sequence[float],
        segmentation: list | dict | None,
        own_box: bool,
    ) -> None:
        """Add an object of the image at index `row`.

        `box` is (left, top, width, height) in pixels; `own_box` is as in `Record`.
        """
        self.rows.append(row)
        self.categories.append(category_id)
        self.boxes.extend(box)
        self.segmentations.append(segmentation)
        self.own_boxes.append(own_box)


@dataclass(frozen=True)
class _Columns:
    """Arrays of a split, which all selections of its records share."""

    folder: Path
    names: PackedList[str]
    heads: Shared  # (N, 3) int64: image id, height, width
    starts: Shared  # (N + 1,) int64: image n has the objects starts[n] : starts[n + 1]
    boxes: Shared  # (M, 4) float32
    labels: Shared  # (M,) int64
    own_boxes: Shared  # (M,) bool
    shapes: Shared  # (M,) int64: index of each object in `segmentations`
    segmentations: PackedList[list | dict | None]


class Records(Sequence[Record]):
    """A sequence of records, which are created on access; slices share the arrays."""

    def __init__(self, columns: _Columns, rows: np.ndarray) -> None:
        self._columns = columns
        self._rows = rows

    @classmethod
    def of(
        cls,
        folder: Path,
        names: Sequence[str],
        heads: Sequence[tuple[int, int, int]],
        objects: Objects,
        category_ids: Sequence[int],
    ) -> Records:
        """Build records of images in `folder` from names, heads (id, height, width) and objects.

        An object's label is the index of its category in `category_ids`, which must be ascending.
        """
        rows = np.array(objects.rows, np.int64)
        order = np.argsort(rows, kind="stable")
        boxes = np.array(objects.boxes).reshape(-1, 4).astype(np.float32)[order]
        boxes[:, 2:] += boxes[:, :2]
        starts = np.append(0, np.cumsum(np.bincount(rows, minlength=len(names))))
        columns = _Columns(
            folder,
            PackedList(names),
            heads=Shared(np.array(heads, np.int64).reshape(-1, 3)),
            starts=Shared(starts),
            boxes=Shared(boxes),
            labels=Shared(np.searchsorted(np.array(category_ids), objects.categories)[order]),
            own_boxes=Shared(np.array(objects.own_boxes, bool)[order]),
            shapes=Shared(order),
            segmentations=objects.segmentations,
        )
        return cls(columns, np.arange(len(names)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row, columns = self._rows[index], self._columns
        image_id, height, width = columns.heads[row].tolist()
        part = slice(columns.starts[row], columns.starts[row + 1])
        segmentations = [columns.segmentations[i] for i in columns.shapes[part].tolist()]
        return Record(
            image_id,
            columns.folder / columns.names[row],
            height,
            width,
            columns.boxes[part].copy(),
            columns.labels[part].copy(),
            segmentations,
            columns.own_boxes[part].copy(),
        )

    def select(self, indices: np.ndarray) -> Records:
        """Return the records at these indices."""
        return Records(self._columns, self._rows[indices])

    def counts(self) -> np.ndarray:
        """Return the number of objects in each image (N,)."""
        return np.diff(self._columns.starts.array)[self._rows]

    def sizes(self) -> np.ndarray:
        """Return the height and width of each image (N, 2)."""
        return self._columns.heads.array[self._rows, 1:]

    def labels(self) -> list[np.ndarray]:
        """Return the object labels (G,) of each image."""
        starts, labels = self._columns.starts.array, self._columns.labels.array
        return [labels[starts[row] : starts[row + 1]] for row in self._rows]

    def names(self) -> Iterator[str]:
        """Yield the path of each image, relative to the split's image folder."""
        return (self._columns.names[row] for row in self._rows)

    def paths(self) -> Iterator[Path]:
        """Yield the full path of each image."""
        return (self._columns.folder / self._columns.names[row] for row in self._rows)
