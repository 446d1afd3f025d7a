"""Comparison of the trainings of a pipeline run: the MLflow parent run and a table."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config import Config, flatten
from vitdet.data.protocol import SETTINGS
from vitdet.tracking.champion import ALIAS
from vitdet.tracking.experiments import experiment_id
from vitdet.tracking.mlflow import connect, tracking_uri
from vitdet.tracking.requests import create

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATA = ("data.root", "data.train_split", "data.val_split", "data.max_images")
PLACE = ("tracking.uri", "tracking.experiment", "tracking.model_name")
COLUMNS = ("box_ap", "mask_ap", "box_ap50", "box_ap75")
# KFP's final state of a run -> MLflow's. KFP servers report COMPLETE or SUCCEEDED; some report
# RUNNING while the exit handler runs: then the state depends on the table of the last step.
ENDS = {
    "SUCCEEDED": "FINISHED",
    "COMPLETE": "FINISHED",
    "CACHED": "FINISHED",
    "FAILED": "FAILED",
    "CANCELLED": "KILLED",
    "CANCELED": "KILLED",
}


def check_comparable(
    first: Config, other: Config, name: str, other_name: str, unknown: Collection[str] = ()
) -> None:
    """Check that two configs can be compared in one table. unknown: settings that are unresolved.

    Raises ValueError if they have different data, evaluation settings or MLflow destinations.
    """
    ours, theirs = flatten(first), flatten(other)
    differing = [
        f"{key} is {theirs[key]}, not {ours[key]}"
        for key in (*DATA, *SETTINGS, *PLACE)
        if ours[key] != theirs[key] and key not in unknown
    ]
    if differing:
        raise ValueError(
            f"{other_name} and {name} cannot be compared: in {other_name}, {'; '.join(differing)}; "
            "run them one by one, or set the same for both"
        )


def start_parent_run(
    group: str, names: Sequence[str], *, uri: str, folder: Path, experiment: str
) -> str:
    """Return the MLflow id of a group's parent run; create the run if it does not exist.

    Raises ConnectionError if MLflow does not respond.
    """
    client, _ = connect(None, uri, folder)
    place = experiment_id(client, tracking_uri(uri, folder), folder, experiment)
    tags = {
        "group": group,
        "pipeline_run": group,
        "mlflow.source.name": "pipeline",
        "mlflow.source.type": "JOB",
        "recipes": " ".join(names),
    }
    name = " / ".join(names) if len(names) < 4 else f"{len(names)} recipes"
    return create(
        lambda: _parent(client, place, group),
        lambda: client.create_run(place, None, tags, f"pipeline {name}").info.run_id,
    )


def end_parent_run(group: str, state: str, *, uri: str, folder: Path, experiment: str) -> None:
    """End the parent run; state: the final state in KFP. Raises like `start_parent_run`."""
    client, _ = connect(None, uri, folder)
    place = experiment_id(client, tracking_uri(uri, folder), folder, experiment)
    if parent := _parent(client, place, group):
        unknown = "FINISHED" if "best" in client.get_run(parent).data.tags else "FAILED"
        client.set_terminated(parent, ENDS.get(state.upper(), unknown))


def compare(
    group: str, rows: Sequence[dict], *, uri: str, folder: Path, experiment: str, model_name: str
) -> str:
    """Create a Markdown table of a group, best box AP first, and log it to the parent run.

    rows: {"name", "val_fingerprint", "evaluate_settings", "run_id", "passed", "reason", "metrics"}
    of each training. Raises ValueError if they were evaluated on different data or with different
    settings, ConnectionError if MLflow does not respond.
    """
    for key, what in (
        ("val_fingerprint", "on different data"),
        ("evaluate_settings", "differently"),
    ):
        values = sorted({row[key] for row in rows})
        if len(values) != 1:
            raise ValueError(
                f"the trainings were evaluated {what} ({', '.join(values)}): not comparable"
            )
    client, _ = connect(None, uri, folder)
    champion, versions = _versions(client, model_name)
    ordered = sorted(rows, key=lambda row: -_metric(row, "box_ap"))
    text = table(ordered, champion, versions)
    parent = start_parent_run(
        group, [row["name"] for row in rows], uri=uri, folder=folder, experiment=experiment
    )
    for row in ordered:
        for key in COLUMNS[:2]:
            if row["metrics"].get(key) is not None:
                client.log_metric(parent, f"{key}/{row['name']}", row["metrics"][key])
    client.set_tag(parent, "val_fingerprint", ordered[0]["val_fingerprint"])
    client.set_tag(parent, "best", ordered[0]["name"])
    client.set_tag(parent, "mlflow.note.content", text)
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "comparison.md").write_text(text)
        client.log_artifact(parent, str(Path(work) / "comparison.md"))
    return text


def table(rows: Sequence[dict], champion: str | None, versions: dict[str, str]) -> str:
    """Format the rows as a Markdown table. versions: MLflow run id -> model version."""
    heads = [
        "recipe",
        *(column.replace("_ap", " AP ").strip() for column in COLUMNS),
        "version",
        "gate",
    ]
    cells = []
    for row in rows:
        version = versions.get(row["run_id"], "-")
        mark = f"{version} ({ALIAS})" if version == champion else version
        values = [
            "-" if row["metrics"].get(key) is None else f"{row['metrics'][key]:.2f}"
            for key in COLUMNS
        ]
        cells.append([row["name"], *values, mark, row["reason"]])
    return f"Data {rows[0]['val_fingerprint']}\n\n{markdown_table(heads, cells)}"


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


def _metric(row: dict, key: str) -> float:
    value = row["metrics"].get(key)
    return -1.0 if value is None else value


def _parent(client: MlflowClient, place: str, group: str) -> str | None:
    found = client.search_runs([place], f"tags.group = '{group}'")
    return found[0].info.run_id if found else None


def _versions(client: MlflowClient, model_name: str) -> tuple[str | None, dict[str, str]]:
    """Return (the champion's version, {run id: its newest version})."""
    models = client.search_registered_models(f"name = '{model_name}'")
    found = sorted(
        client.search_model_versions(f"name = '{model_name}'"), key=lambda one: int(one.version)
    )
    alias = models[0].aliases.get(ALIAS) if models else None
    return (None if alias is None else str(alias)), {
        one.run_id: str(one.version) for one in found if one.run_id
    }
