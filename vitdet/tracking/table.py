"""The tables of a comparison, as Markdown and as an HTML page."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader

from vitdet.tracking.history import ALIAS

COLUMNS = ("box_ap", "mask_ap", "box_ap50", "box_ap75")
HEADS = [column.replace("_ap", " AP ").strip() for column in COLUMNS]
SEED = "train.seed"


@dataclass(frozen=True)
class Table:
    """A table with a title ("" for none) and links, {first cell of a row: URL}."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Mapping[str, str]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        linked = [
            [f"[{first}]({self.links[first]})" if first in self.links else first, *rest]
            for first, *rest in self.rows
        ]
        title = f"{self.title}\n\n" if self.title else ""
        return title + markdown_table(self.heads, linked)


def trainings_table(
    rows: Sequence[dict],
    failures: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
    champion: str | None,
    versions: Mapping[str, str],
    links: Mapping[str, str],
) -> Table:
    """Return a table with a row for each training run; runs without a verdict are last.

    rows, failures and settings: as for `vitdet.tracking.comparison.compare`. champion:
    the champion's version. versions: {MLflow run ID: version}. links: {row's name: URL}.
    """
    cells = []
    for row in rows:
        version = versions.get(row["run_id"], "-")
        mark = f"{version} ({ALIAS})" if version == champion else version
        values = [row["metrics"].get(key) for key in COLUMNS]
        texts = ["-" if value is None else f"{value:.2f}" for value in values]
        reason = "; ".join(filter(None, (row["reason"], failures.get(row["name"]))))
        cells.append([row["name"], *texts, mark, reason])
    finished = {row["name"] for row in rows}
    for name, reason in failures.items():
        if name not in finished:
            cells.append([name, *["-"] * len(COLUMNS), "-", reason])
    heads = ["recipe", *HEADS, "version", "gate"]
    if any(settings.values()):  # a sweep
        cells = [[first, _text(settings.get(first, {})), *rest] for first, *rest in cells]
        heads.insert(1, "settings")
    return Table("", heads, cells, links)


def seeds_table(rows: Sequence[dict], settings: Mapping[str, Mapping[str, str]]) -> Table | None:
    """Return a table of means and standard deviations over seeds; None if no seeds were varied."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        varied = settings.get(row["name"], {})
        if SEED in varied:
            rest = {key: value for key, value in varied.items() if key != SEED}
            groups[row["name"].rpartition("-")[0], _text(rest)].append(row["metrics"])
    cells = []
    for (recipe, text), metrics in groups.items():
        values = [[metric.get(key) for metric in metrics] for key in COLUMNS]
        known = [[value for value in column if value is not None] for column in values]
        texts = [mean_deviation(column) for column in known]
        cells.append([recipe, text or "-", str(len(metrics)), *texts])
    title = "Over seeds: mean ± standard deviation"
    return Table(title, ["recipe", "settings", "seeds", *HEADS], cells, {}) if cells else None


def mean_deviation(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation; only the mean of one value; `-` for no values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def page(title: str, paragraphs: Sequence[str], tables: Sequence[Table]) -> str:
    """Return a complete HTML page. paragraphs: plain text, which is escaped."""
    loader = PackageLoader("vitdet.tracking", ".")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(
        "comparison.html.jinja"
    )
    return template.render(title=title, paragraphs=paragraphs, tables=tables)


def markdown_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], padded: bool = False
) -> str:
    """Format a table as Markdown. padded: whether to align the columns for plain text."""
    lines = [heads, ["---"] * len(heads), *rows]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    if padded:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [
            [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
        ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
