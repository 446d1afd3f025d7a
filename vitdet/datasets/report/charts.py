"""Charts of counts as HTML and SVG that need nothing from outside, in the colours of the page they stand on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

WIDE, HIGH, LEFT, FOOT = 460, 170, 6, 24  # pixels of a histogram: its sides, its margins


def text(value: object) -> str:
    """Any value as HTML."""
    return escape(str(value).encode("utf-8", "backslashreplace").decode())


def share(part: float, whole: float) -> str:
    """A share in per cent."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def histogram(
    title: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, np.ndarray]],
    unit: str,
    edges: Sequence[int] = (),
) -> str:
    """Bars of shares over bins; a series (name, counts a bin) has the colours --s0, --s1, ...; hovering says counts.

    edges: numbers to write below the borders of the bins, instead of the bins' names below them.
    """
    shares = [counts / max(counts.sum(), 1) for _, counts in series]
    top = max((float(one.max(initial=0)) for one in shares), default=0) or 1
    step = (WIDE - 2 * LEFT) / max(len(labels), 1)
    bar = step * 0.84 / max(len(series), 1)
    parts = []
    for place, label in enumerate(labels):
        x = LEFT + place * step
        for number, ((name, counts), one) in enumerate(zip(series, shares, strict=True)):
            tall = (HIGH - FOOT - 14) * float(one[place]) / top
            tip = text(f"{name}, {label} {unit}: {int(counts[place]):,} ({100 * one[place]:.1f} %)")
            parts.append(
                f'<rect x="{x + step * 0.08 + number * bar:.1f}" y="{HIGH - FOOT - tall:.1f}" rx="2" '
                f'width="{bar * 0.92:.1f}" height="{tall:.1f}" fill="var(--s{number % 4})">'
                f"<title>{tip}</title></rect>"
            )
    marks = [(float(place), str(edge)) for place, edge in enumerate(edges, 1)]
    marks = marks or [(place + 0.5, label) for place, label in enumerate(labels)]
    parts += [
        f'<text x="{LEFT + place * step:.1f}" y="{HIGH - 8}" text-anchor="middle">{text(mark)}</text>'
        for place, mark in marks
    ]
    line = f'<line x1="{LEFT}" x2="{WIDE - LEFT}" y1="{HIGH - FOOT}" y2="{HIGH - FOOT}"/>'
    return (
        f'<figure class="card"><figcaption>{text(title)} <small>{text(unit)}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(parts)}{line}</svg></figure>'
    )


def doubling(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """How many values lie below edges[0], from there below edges[1], ..., and from the last one up."""
    return np.bincount(
        np.searchsorted(np.array(edges), values, side="right"), minlength=len(edges) + 1
    )


def ranges(edges: Sequence[int]) -> list[str]:
    """The names of the bins of `doubling`; of whole numbers a bin of one is that number."""
    pairs = zip(edges[:-1], edges[1:], strict=True)
    between = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairs]
    first = "0" if edges[0] == 1 else f"<{edges[0]}"
    return [first, *between, f"{edges[-1]}+"]


def bars(
    names: Sequence[str],
    columns: Sequence[tuple[str, Sequence[int]]],
    images: Sequence[Sequence[int]],
) -> str:
    """A table of classes: the objects of each split as a bar and a number, and the images that hold the class."""
    top = max((max(counts, default=0) for _, counts in columns), default=0) or 1
    head = "".join(
        f"<th>{text(split)}: objects</th><th class='n'>images</th>" for split, _ in columns
    )
    rows = []
    for label, name in enumerate(names):
        cells = []
        for number, ((_, counts), holding) in enumerate(zip(columns, images, strict=True)):
            wide = 100 * counts[label] / top
            cells.append(
                f'<td><div class="bar"><i style="width:{wide:.2f}%;background:var(--s{number % 4})"></i>'
                f'<b>{counts[label]:,}</b></div></td><td class="n">{holding[label]:,}</td>'
            )
        rows.append(f"<tr><th>{text(name)}</th>{''.join(cells)}</tr>")
    return f'<table class="classes"><thead><tr><th>class</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
