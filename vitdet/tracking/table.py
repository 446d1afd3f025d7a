"""The tables of a comparison, as Markdown and as an HTML page."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vitdet.tracking.champion import ALIAS

COLUMNS = ("box_ap", "mask_ap", "box_ap50", "box_ap75")
HEADS = [column.replace("_ap", " AP ").strip() for column in COLUMNS]
SEED = "train.seed"
STYLE = (
    "body{font:14px sans-serif;margin:1em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #999;padding:.3em .6em;text-align:left}"
)


@dataclass(frozen=True)
class Table:
    """A table with a title, "" for none. links: {first cell of a row: address}."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Mapping[str, str]

    def markdown(self) -> str:
        """Format as Markdown."""
        linked = [
            [f"[{first}]({self.links[first]})" if first in self.links else first, *rest]
            for first, *rest in self.rows
        ]
        title = f"{self.title}\n\n" if self.title else ""
        return title + markdown_table(
            self.heads, [[cell.replace("|", "\\|") for cell in row] for row in linked]
        )

    def html(self) -> str:
        """Format as HTML."""
        lines = [f"<h2>{escape(self.title)}</h2>"] if self.title else []
        lines += ["<table>", _row("th", map(escape, self.heads))]
        for first, *rest in self.rows:
            name = escape(first)
            if first in self.links:
                name = f'<a target="_blank" href="{escape(self.links[first])}">{name}</a>'
            lines.append(_row("td", [name, *map(escape, rest)]))
        return "\n".join([*lines, "</table>"])


def trainings_table(
    rows: Sequence[dict],
    failures: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
    champion: str | None,
    versions: Mapping[str, str],
    links: Mapping[str, str],
) -> Table:
    """Return a row for each training, those without a verdict last.

    rows, failures and settings as of `vitdet.tracking.comparison.compare`. versions: MLflow run id ->
    model version. links: name -> address of its run.
    """
    swept = any(settings.values())
    cells = []
    for row in rows:
        version = versions.get(row["run_id"], "-")
        mark = f"{version} ({ALIAS})" if version == champion else version
        texts = [
            "-" if row["metrics"].get(key) is None else f"{row['metrics'][key]:.2f}"
            for key in COLUMNS
        ]
        reason = "; ".join(filter(None, (row["reason"], failures.get(row["name"]))))
        cells.append([row["name"], *texts, mark, reason])
    finished = {row["name"] for row in rows}
    for name, reason in failures.items():
        if name not in finished:
            cells.append([name, *["-"] * len(COLUMNS), "-", reason])
    if swept:
        cells = [[first, _text(settings.get(first, {})), *rest] for first, *rest in cells]
    heads = ["recipe", *(["settings"] if swept else []), *HEADS, "version", "gate"]
    return Table("", heads, cells, links)


def seeds_table(rows: Sequence[dict], settings: Mapping[str, Mapping[str, str]]) -> Table | None:
    """Return mean and standard deviation of trainings that only differ by seed; None without such."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        own = settings.get(row["name"], {})
        if SEED in own:
            rest = {key: value for key, value in own.items() if key != SEED}
            groups[row["name"].rpartition("-")[0], _text(rest)].append(row)
    cells = []
    for (recipe, text), members in groups.items():
        values = [[row["metrics"].get(key) for row in members] for key in COLUMNS]
        texts = [mean_deviation([one for one in column if one is not None]) for column in values]
        cells.append([recipe, text or "-", str(len(members)), *texts])
    heads = ["recipe", "settings", "seeds", *HEADS]
    title = "Over seeds: mean ± standard deviation"
    return Table(title, heads, cells, {}) if cells else None


def mean_deviation(values: Sequence[float]) -> str:
    """Format mean and sample standard deviation, which one value does not have."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def page(title: str, paragraphs: Sequence[str], tables: Sequence[Table]) -> str:
    """Return a complete HTML page. paragraphs: plain text."""
    body = [f"<p>{escape(one)}</p>" for one in paragraphs] + [one.html() for one in tables]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n{head}\n" + "\n".join(body) + "\n"


def markdown_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], padded: bool = False
) -> str:
    """Format a table as Markdown. padded: with columns of equal width, to be read as text."""
    lines = [heads, ["---"] * len(heads), *rows]
    if padded:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [
            [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
        ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(tag: str, cells: Sequence[str] | map) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _text(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
