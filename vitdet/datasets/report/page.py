"""The report of a data set: one page with counts, classes, sizes, example images and problems.

The column `objects` and the charts exclude objects that training skips. Objects with a box area
below 32 x 32 pixels are small; objects with at least 96 x 96 pixels are large.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitdet.data.check import Report, check
from vitdet.data.coco import CocoSplit, read_coco
from vitdet.data.coco_layouts import find_splits
from vitdet.data.images import DEFAULT, Reading
from vitdet.datasets.report import charts
from vitdet.datasets.report.portrait import Portrait, portrait
from vitdet.files import atomic_write
from vitdet.pages import render
from vitdet.visualize import spread

PICTURES = 12
FIRST = 30  # number of classes shown initially; a click shows all classes
# bin edges of the histograms
OBJECTS = (1, 2, 3, 5, 9, 17, 33)  # objects or classes per image
SIDES = (8, 16, 32, 64, 96, 128, 256, 512)  # pixels: square root of the box area
LENGTHS = (256, 384, 512, 640, 768, 1024, 2048)  # pixels: longer side of the image
SMALL, LARGE = 32**2, 96**2
COLUMNS = ("split", "images", "without objects", "objects", "small", "medium", "large", "skipped")


@dataclass(frozen=True)
class _Split:
    """A readable split."""

    name: str
    found: CocoSplit
    areas: np.ndarray  # (M,) area of each object's box in square pixels

    @property
    def counts(self) -> np.ndarray:
        """Number of objects in each image (N,)."""
        return self.found.records.counts()


def write_page(
    folder: Path, output: Path, images: bool = False, reading: Reading = DEFAULT
) -> tuple[int, int, Report]:
    """Write the report of a data set in COCO's or LVIS's layout as an HTML page.

    The page lists unreadable splits. With `images`, `check` reads every image file. Returns the
    number of images, the number of annotations, and the report of `check`. Raises FileNotFoundError
    if no annotation file can be read, and OSError if `output` cannot be written.
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
        "size": charts.SIZE,
        "charts": _charts(splits),
        "classes": classes,
        "most_objects": max((row[0] for _, counts in classes for row in counts), default=0) or 1,
        "first": FIRST,
        "portraits": _portraits(splits, reading),
        "findings": [("bad", error) for error in report.errors]
        + [("warn", warning) for warning in report.warnings],
    }
    page = render("datasets/report/page.html", values)
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return (*_sums(report), report)


def _sums(report: Report) -> tuple[int, int]:
    images, objects, _ = zip(*report.splits.values(), strict=True)
    return sum(images), sum(objects)


def _read(folder: Path, name: str) -> _Split:
    dataset = "lvis" if name.startswith("lvis_v1_") else "coco"
    files = find_splits(folder, dataset)[name.removeprefix("lvis_v1_")]
    found = read_coco(*files, by_url=dataset == "lvis")
    sides = [record.boxes[:, 2:] - record.boxes[:, :2] for record in found.records]
    areas = np.prod(np.concatenate([np.zeros((0, 2), np.float32), *sides]), axis=1)
    return _Split(name, found, areas)


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return (name, value, CSS class) of each key figure at the top of the page."""
    images, objects = _sums(report)
    errors, warnings = (
        sum(finding.count for finding in found) for found in (report.errors, report.warnings)
    )
    return [
        ("images", f"{images:,}", ""),
        ("annotations", f"{objects:,}", ""),
        ("classes", f"{max(counts[2] for counts in report.splits.values()):,}", ""),
        ("objects per image", f"{objects / max(images, 1):.1f}", ""),
        ("errors", f"{errors:,}", "bad" if errors else ""),
        ("warnings", f"{warnings:,}", "warn" if warnings else ""),
    ]


def _row(split: _Split) -> list[str]:
    """Return a row of the table of splits, with the columns COLUMNS."""
    total, counts = len(split.areas), split.counts
    small, large = int((split.areas < SMALL).sum()), int((split.areas >= LARGE).sum())
    sizes = (small, total - small - large, large)
    dropped = [f"{count:,} {reason}" for reason, count in sorted(split.found.dropped.items())]
    numbers = [f"{number:,}" for number in (len(counts), int((counts == 0).sum()), total)]
    shares = [f"{100 * part / total:.0f}\u00a0%" if total else "-" for part in sizes]
    return [split.name, *numbers, *shares, ", ".join(dropped) or "-"]


def _charts(splits: list[_Split]) -> list[charts.Histogram]:
    def chart(
        title: str, unit: str, edges: tuple[int, ...], values: list[np.ndarray]
    ) -> charts.Histogram:
        counts = [charts.count_bins(value, edges) for value in values]
        names = [split.name for split in splits]
        series = list(zip(names, counts, strict=True))
        labels = charts.ranges(edges)
        return charts.histogram(title, labels, series, unit, () if edges is OBJECTS else edges)

    records = [split.found.records for split in splits]
    classes = [np.array([len(np.unique(labels)) for labels in table.labels()]) for table in records]
    lengths = [table.sizes().max(axis=1, initial=0) for table in records]
    sides = [split.areas**0.5 for split in splits]
    return [
        chart("Objects per image", "objects", OBJECTS, [split.counts for split in splits]),
        chart("Classes per image", "classes", OBJECTS, classes),
        chart("Size of objects", "pixels, square root of the box area", SIDES, sides),
        chart("Size of images", "pixels, longer side", LENGTHS, lengths),
    ]


def _classes(splits: list[_Split]) -> list[tuple[str, list[list[int]]]]:
    """Return (class name, [number of objects, number of images] of each split).

    The most frequent class comes first. Classes are matched by name across splits.
    """
    names = list(dict.fromkeys(name for split in splits for name in split.found.class_names))
    row_of = {name: row for row, name in enumerate(names)}
    counts = np.zeros((len(names), len(splits), 2), np.int64)
    for number, split in enumerate(splits):
        rows = np.array([row_of[name] for name in split.found.class_names], np.int64)
        for labels in split.found.records.labels():
            np.add.at(counts[:, number, 0], rows[labels], 1)
            np.add.at(counts[:, number, 1], rows[np.unique(labels)], 1)
    order = np.argsort(-counts[:, :, 0].sum(axis=1), kind="stable")
    return [(names[row], counts[row].tolist()) for row in order]


def _portraits(splits: list[_Split], reading: Reading) -> list[Portrait]:
    shown = []
    for split in splits:
        records, names = split.found.records, split.found.class_names
        annotated = np.flatnonzero(split.counts)
        for index in annotated[spread(len(annotated), -(-PICTURES // len(splits)))].tolist():
            shown.append(portrait(records[index], names, split.name, reading))
    return shown
