"""The report of a data set: one HTML page with counts, classes, sizes, some images and problems, from `page.html`.

Only what training can use is counted; what it leaves out (crowds, boxes without size) is listed as well. Sizes are
COCO's: small below 32 x 32 pixels of the box, large from 96 x 96.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitdet.data.check import Report, check
from vitdet.data.coco import CocoSplit, read_coco
from vitdet.data.coco_layouts import find_splits
from vitdet.data.images import DEFAULT, Reading
from vitdet.datasets.report.charts import (
    FOOT,
    HEIGHT,
    MARGIN,
    WIDTH,
    Histogram,
    doubling,
    histogram,
    ranges,
)
from vitdet.datasets.report.portrait import Portrait, portrait
from vitdet.files import written
from vitdet.pages import render
from vitdet.visualize import spread

PICTURES = 12
FIRST = 30  # classes shown at once; the others open with a click
OBJECTS = (1, 2, 3, 5, 9, 17, 33)  # per image
SIDES = (8, 16, 32, 64, 96, 128, 256, 512)  # pixels: the root of a box's area
LENGTHS = (256, 384, 512, 640, 768, 1024, 2048)  # pixels of an image's longer side
SMALL, LARGE = 32**2, 96**2
COLUMNS = ("split", "images", "without objects", "objects", "small", "medium", "large", "left out")


@dataclass(frozen=True)
class _Split:
    """A split that could be read."""

    name: str
    found: CocoSplit
    areas: np.ndarray  # (M,) pixels of each object's box

    @property
    def counts(self) -> np.ndarray:
        """(N,) objects of each image."""
        return self.found.records.counts()


class _Class(NamedTuple):
    """A class; counts: of each split (objects, images with the class)."""

    name: str
    counts: list[tuple[int, int]]


def write_page(
    folder: Path, output: Path, images: bool = False, reading: Reading = DEFAULT
) -> tuple[int, int, Report]:
    """Write the page of a folder in COCO's or LVIS's layout; return its images, its objects, and what `check` found.

    images: read every image file, as `check` does; reading: how these are read. The page states what cannot be read.
    Raises FileNotFoundError if there is nothing to show, and OSError if `output` cannot be written.
    """
    report = check(folder, images=images, reading=reading)
    if not report.splits:
        first = report.errors[0]
        raise FileNotFoundError(f"{folder}: {first.kind}: {first.examples[0]}")
    splits, broken = [], []
    for name in report.splits:
        try:
            splits.append(_read(folder, name))
        except ValueError as error:
            broken.append((name, str(error)))
    classes = _classes(splits)
    values = {
        "title": folder.resolve().name,
        "folder": str(folder),
        "tiles": _tiles(report),
        "columns": COLUMNS,
        "broken": broken,
        "rows": [_row(split) for split in splits],
        "splits": [split.name for split in splits],
        "size": {"width": WIDTH, "height": HEIGHT, "margin": MARGIN, "foot": FOOT},
        "charts": _charts(splits),
        "classes": classes,
        "most_objects": max((one[0] for row in classes for one in row.counts), default=0) or 1,
        "first": FIRST,
        "portraits": _portraits(splits, reading),
        "findings": [
            *(("bad", one) for one in report.errors),
            *(("warn", one) for one in report.warnings),
        ],
    }
    page = render("datasets/report/page.html", values)
    with written(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return (*_sums(report), report)


def _sums(report: Report) -> tuple[int, int]:
    return sum(one[0] for one in report.splits.values()), sum(
        one[1] for one in report.splits.values()
    )


def _read(folder: Path, name: str) -> _Split:
    dataset = "lvis" if name.startswith("lvis_v1_") else "coco"
    files = find_splits(folder, dataset)[name.removeprefix("lvis_v1_")]
    found = read_coco(*files, by_url=dataset == "lvis")
    sides = [record.boxes[:, 2:] - record.boxes[:, :2] for record in found.records]
    return _Split(
        name, found, np.prod(np.concatenate([np.zeros((0, 2), np.float32), *sides]), axis=1)
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(name, value, CSS class) of the numbers at the top."""
    images, objects = _sums(report)
    errors, warnings = (
        sum(one.count for one in found) for found in (report.errors, report.warnings)
    )
    return [
        ("images", f"{images:,}", ""),
        ("annotations", f"{objects:,}", ""),
        ("classes", f"{max(one[2] for one in report.splits.values()):,}", ""),
        ("objects per image", f"{objects / max(images, 1):.1f}", ""),
        ("errors", f"{errors:,}", "bad" if errors else ""),
        ("warnings", f"{warnings:,}", "warn" if warnings else ""),
    ]


def _row(split: _Split) -> list[str]:
    """The values of COLUMNS."""
    total, left = len(split.areas), split.found.dropped
    small, large = int((split.areas < SMALL).sum()), int((split.areas >= LARGE).sum())
    sizes = (small, total - small - large, large)
    return [
        split.name,
        f"{len(split.counts):,}",
        f"{int((split.counts == 0).sum()):,}",
        f"{total:,}",
        *(f"{100 * part / total:.0f}\u00a0%" if total else "-" for part in sizes),
        ", ".join(f"{count:,} {reason}" for reason, count in sorted(left.items())) or "-",
    ]


def _charts(splits: list[_Split]) -> list[Histogram]:
    def chart(title: str, unit: str, edges: tuple[int, ...], values: list[np.ndarray]) -> Histogram:
        series = [
            (split.name, doubling(one, edges)) for split, one in zip(splits, values, strict=True)
        ]
        return histogram(title, ranges(edges), series, unit, () if edges is OBJECTS else edges)

    kinds = [
        np.array([len(np.unique(labels)) for labels in split.found.records.labels()])
        for split in splits
    ]
    sizes = [split.found.records.sizes().max(axis=1, initial=0) for split in splits]
    areas = [split.areas**0.5 for split in splits]
    return [
        chart("Objects per image", "objects", OBJECTS, [split.counts for split in splits]),
        chart("Classes per image", "classes", OBJECTS, kinds),
        chart("Size of objects", "pixels, square root of the box area", SIDES, areas),
        chart("Size of images", "pixels, longer side", LENGTHS, sizes),
    ]


def _classes(splits: list[_Split]) -> list[_Class]:
    """By name, as the splits may name different ones; the most frequent first."""
    names = list(dict.fromkeys(name for split in splits for name in split.found.class_names))
    place = {name: row for row, name in enumerate(names)}
    objects, images = (np.zeros((len(splits), len(names)), np.int64) for _ in range(2))
    for number, split in enumerate(splits):
        rows = np.array([place[name] for name in split.found.class_names], np.int64)
        for labels in split.found.records.labels():
            np.add.at(objects[number], rows[labels], 1)
            np.add.at(images[number], rows[np.unique(labels)], 1)
    order = np.argsort(-objects.sum(axis=0), kind="stable")
    counts = np.stack([objects, images], axis=-1).swapaxes(0, 1).tolist()  # class, split, both
    return [_Class(names[row], [(one[0], one[1]) for one in counts[row]]) for row in order]


def _portraits(splits: list[_Split], reading: Reading) -> list[Portrait]:
    shown = []
    for split in splits:
        held = np.flatnonzero(split.counts)
        shown += [
            portrait(
                split.found.records[int(held[one])], split.found.class_names, split.name, reading
            )
            for one in spread(len(held), -(-PICTURES // len(splits)))
        ]
    return shown
