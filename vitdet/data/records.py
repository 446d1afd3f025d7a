"""The images of a split with their objects, as a few arrays that all workers of a process share.

Letters: N images, M objects of all of them, G of one.
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
    """One image: boxes (G, 4) float32 xyxy in its pixels, labels (G,) int64 contiguous, a segmentation per object.

    own_box (G,) bool: whether a training takes the box of the file and not the one around the outline.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: (
        list  # COCO's polygons (a list of flat x, y lists) or an RLE dict; None: no outline
    )
    own_box: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Objects:
    """Objects as they come in a file: each of an image, that is a row of the split, and of a category."""

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
        """Adds an object; box: left, top, width, height; own_box: as in `Record`."""
        self.rows.append(row)
        self.categories.append(category_id)
        self.boxes.extend(box)
        self.segmentations.append(segmentation)
        self.own_boxes.append(own_box)


@dataclass(frozen=True)
class _Columns:
    """What stands behind the records of a split and behind any selection of them."""

    folder: Path
    names: PackedList[str]
    heads: Shared  # (N, 3) int64: image id, height, width
    starts: Shared  # (N + 1,) int64: the objects of image n are starts[n] .. starts[n + 1]
    boxes: Shared  # (M, 4) float32
    labels: Shared  # (M,) int64
    own_boxes: Shared  # (M,) bool
    places: Shared  # (M,) int64: where the object's segmentation stands
    segmentations: PackedList[list | dict | None]


class Records(Sequence[Record]):
    """Records that exist for as long as they are looked at; a slice shares the arrays of the whole."""

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
        """Images in `folder` by name and (id, height, width), with the objects whose `row` says which of them.

        The label of an object is the place of its category in category_ids, which rise.
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
            places=Shared(order),
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
        segmentations = [columns.segmentations[place] for place in columns.places[part].tolist()]
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
        """The records at these indices."""
        return Records(self._columns, self._rows[indices])

    def counts(self) -> np.ndarray:
        """(N,) objects of each image."""
        return np.diff(self._columns.starts.array)[self._rows]

    def sizes(self) -> np.ndarray:
        """(N, 2) height and width of each image."""
        return self._columns.heads.array[self._rows, 1:]

    def labels(self) -> list[np.ndarray]:
        """The labels (G,) of each image."""
        starts, labels = self._columns.starts.array, self._columns.labels.array
        return [labels[starts[row] : starts[row + 1]] for row in self._rows]

    def names(self) -> Iterator[str]:
        """The path of each image, relative to the folder of the split."""
        return (self._columns.names[row] for row in self._rows)

    def paths(self) -> Iterator[Path]:
        """The file of each image."""
        return (self._columns.folder / self._columns.names[row] for row in self._rows)
