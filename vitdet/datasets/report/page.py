"""A data set on one HTML page: how much there is, of which classes and sizes, some pictures, and what is wrong.

The page is one file and asks for nothing from outside. What it counts is what training can use; what it leaves out
(crowds, boxes without size) stands beside. Sizes are COCO's: small below 32 x 32 pixels of box, large from 96 x 96.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitdet.data.check import Finding, Report, check
from vitdet.data.coco import CocoSplit, read_coco
from vitdet.data.coco_layouts import find_splits
from vitdet.data.images import DEFAULT, Reading
from vitdet.datasets.report.charts import bars, doubling, histogram, ranges, share, text
from vitdet.datasets.report.portrait import portrait
from vitdet.files import atomic_write
from vitdet.visualize import spread

PICTURES = 12
FIRST = 30  # classes shown at once; the others open with a click
OBJECTS = (1, 2, 3, 5, 9, 17, 33)  # an image
SIDES = (8, 16, 32, 64, 96, 128, 256, 512)  # pixels: the root of a box's area
LENGTHS = (256, 384, 512, 640, 768, 1024, 2048)  # pixels of an image's longer side
SMALL, LARGE = 32**2, 96**2
STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2330;--dim:#677083;--line:#e3e6ec;--s0:#3b6fe0;--s1:#f0913a;--s2:#2fa57a;
--s3:#b45bcf;--bad:#c8322b;--warn:#a86a00}
@media(prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1b2029;--ink:#e6e9ef;--dim:#98a2b5;--line:#2c3340;
--s0:#6f9bff;--s1:#ffb066;--s2:#5fd0a4;--s3:#d391ea;--bad:#ff7a70;--warn:#e5b04c}}
*{box-sizing:border-box}body{margin:0 auto;padding:32px 24px 64px;max-width:1180px;background:var(--bg);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{margin:0;font-size:28px;overflow-wrap:anywhere}h2{margin:40px 0 12px;font-size:19px}small,.dim{color:var(--dim);
font-weight:400;font-size:13px}.card,.tile{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile{padding:14px 18px}.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile.bad b{color:var(--bad)}.tile.warn b{color:var(--warn)}.card{padding:16px 18px;margin:0;overflow-x:auto}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:12px}figcaption{font-weight:600}
.card svg{width:100%;display:block;margin-top:8px}svg text{font-size:10.5px;fill:var(--dim)}line{stroke:var(--line)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:5px 10px;text-align:left;
border-bottom:1px solid var(--line);font-weight:400}thead th{color:var(--dim);font-size:13px}tr:last-child>*{border:0}
.n{text-align:right;width:90px}.classes tbody th{width:190px;overflow-wrap:anywhere}.bar{display:flex;gap:8px;
align-items:center}.bar i{height:12px;border-radius:3px;min-width:1px;flex:none;max-width:calc(100% - 80px)}
.bar b{font-weight:400;font-size:13px}summary{cursor:pointer;padding:10px 0;color:var(--dim)}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 6px 0 14px}
.photos{margin-top:12px;column-width:340px;column-gap:12px}
.photo{break-inside:avoid;margin:0 0 12px;background:var(--card);
border:1px solid var(--line);border-radius:12px;overflow:hidden}.photo div{position:relative}
.photo img{display:block;width:100%}.photo div svg{position:absolute;inset:0;width:100%;height:100%}
.photo figcaption{padding:8px 12px;font-size:13px;overflow-wrap:anywhere}.photo small{display:block}
.mask{fill:var(--c);fill-opacity:.38;fill-rule:evenodd;stroke:var(--c);stroke-width:1;
vector-effect:non-scaling-stroke}.box{fill:none;stroke:var(--c);
stroke-width:2;vector-effect:non-scaling-stroke}.name rect{fill:var(--c)}.photo svg .name text{font-size:inherit;
fill:#10131a}.photo svg>g:hover .mask{fill-opacity:.65}label{margin-left:4px;font-size:14px;font-weight:400}
#m:not(:checked)~.photos .mask,#b:not(:checked)~.photos .box,#n:not(:checked)~.photos .name{display:none}
#m,#b,#n{accent-color:var(--s0);margin-left:14px}.error{color:var(--bad);padding:0 12px}code{font-size:13px;
overflow-wrap:anywhere}.finding{padding:8px 0;border-bottom:1px solid var(--line)}.finding:last-child{border:0}
.finding b{display:inline-block;min-width:64px}.finding code{display:block;margin-left:64px;color:var(--dim)}
"""


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


def write_page(
    folder: Path, output: Path, images: bool = False, reading: Reading = DEFAULT
) -> tuple[int, int, Report]:
    """Writes the page of a folder in COCO's or LVIS's layout; its images, its objects, and what `check` found.

    images: read every image file, as `check` does; reading: how these are read. What cannot be read is said on the page, not raised.
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
    body = [_head(folder, report, splits), _table(report, splits, broken)]
    if splits:
        body += [_charts(splits), _classes(splits), _pictures(splits, reading)]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{text(folder.resolve().name)}</title><style>{STYLE}</style></head><body>'
        f"{''.join(body)}{_problems(report)}</body></html>\n"
    )
    _write(output, page)
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


def _head(folder: Path, report: Report, splits: list[_Split]) -> str:
    images, objects = _sums(report)
    errors, warnings = (
        sum(one.count for one in found) for found in (report.errors, report.warnings)
    )
    tiles = [
        ("images", f"{images:,}", ""),
        ("annotations", f"{objects:,}", ""),
        ("classes", f"{max(one[2] for one in report.splits.values()):,}", ""),
        ("objects an image", f"{objects / max(images, 1):.1f}", ""),
        ("errors", f"{errors:,}", "bad" if errors else ""),
        ("warnings", f"{warnings:,}", "warn" if warnings else ""),
    ]
    cells = "".join(
        f'<div class="tile {kind}"><b>{value}</b>{name}</div>' for name, value, kind in tiles
    )
    key = "".join(
        f'<i style="background:var(--s{number % 4})"></i>{text(split.name)}'
        for number, split in enumerate(splits)
    )
    return (
        f'<h1>{text(folder.resolve().name)}</h1><span class="dim">{text(folder)}</span>'
        f'<span class="key dim">{key}</span><div class="tiles">{cells}</div>'
    )


def _table(report: Report, splits: list[_Split], broken: list[tuple[str, str]]) -> str:
    names = (
        "split",
        "images",
        "without objects",
        "objects",
        "small",
        "medium",
        "large",
        "left out",
    )
    rows = [
        f"<tr><th>{text(name)}</th><td colspan='7' class='error'>{text(reason)}</td></tr>"
        for name, reason in broken
    ]
    for split in splits:
        total, left = len(split.areas), split.found.dropped
        small, large = int((split.areas < SMALL).sum()), int((split.areas >= LARGE).sum())
        values = [
            f"{len(split.counts):,}",
            f"{int((split.counts == 0).sum()):,}",
            f"{total:,}",
            share(small, total),
            share(total - small - large, total),
            share(large, total),
            ", ".join(f"{count:,} {reason}" for reason, count in sorted(left.items())) or "-",
        ]
        rows.append(
            f"<tr><th>{text(split.name)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<h2>Splits</h2><div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _charts(splits: list[_Split]) -> str:
    def chart(title: str, unit: str, edges: tuple[int, ...], values: list[np.ndarray]) -> str:
        series = [
            (split.name, doubling(one, edges)) for split, one in zip(splits, values, strict=True)
        ]
        return histogram(title, ranges(edges), series, unit, () if edges is OBJECTS else edges)

    kinds = [
        np.array([len(np.unique(labels)) for labels in split.found.records.labels()])
        for split in splits
    ]
    charts = [
        chart("Objects of an image", "objects", OBJECTS, [split.counts for split in splits]),
        chart("Classes of an image", "classes", OBJECTS, kinds),
        chart(
            "Size of objects",
            "pixels, root of the box's area",
            SIDES,
            [split.areas**0.5 for split in splits],
        ),
        chart(
            "Size of images",
            "pixels, longer side",
            LENGTHS,
            [split.found.records.sizes().max(axis=1, initial=0) for split in splits],
        ),
    ]
    return f'<h2>Distributions</h2><div class="two">{"".join(charts)}</div>'


def _classes(splits: list[_Split]) -> str:
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

    def table(part: np.ndarray) -> str:
        columns = [
            (split.name, counts[part].tolist())
            for split, counts in zip(splits, objects, strict=True)
        ]
        return bars([names[row] for row in part], columns, images[:, part].tolist())

    more = f"<details><summary>{len(order) - FIRST:,} more classes</summary>{table(order[FIRST:])}</details>"
    return (
        f'<h2>Classes <small>{len(names):,}, the most frequent first</small></h2><div class="card">'
        f"{table(order[:FIRST])}{more if len(order) > FIRST else ''}</div>"
    )


def _pictures(splits: list[_Split], reading: Reading) -> str:
    each = -(-PICTURES // len(splits))
    shown = []
    for split in splits:
        held = np.flatnonzero(split.counts)
        shown += [
            portrait(
                split.found.records[int(held[one])], split.found.class_names, split.name, reading
            )
            for one in spread(len(held), each)
        ]
    boxes = "".join(
        f'<input type="checkbox" id="{name[0]}" checked><label for="{name[0]}">{name}</label>'
        for name in ("masks", "boxes", "names")
    )
    return (
        "<h2>Pictures <small>evenly spread over those with objects</small></h2>"
        f'<section>{boxes}<div class="photos">{"".join(shown)}</div></section>'
    )


def _problems(report: Report) -> str:
    def lines(findings: list[Finding], color: str) -> str:
        return "".join(
            f'<div class="finding"><b style="color:var(--{color})">{one.count:,}</b>{text(one.kind)}'
            f"{''.join(f'<code>{text(example)}</code>' for example in one.examples)}</div>"
            for one in findings
        )

    found = lines(report.errors, "bad") + lines(report.warnings, "warn")
    return (
        f'<h2>Problems <small>errors stop training, warnings do not</small></h2><div class="card">'
        f"{found or 'None.'}</div>"
    )


def _write(output: Path, page: str) -> None:
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
