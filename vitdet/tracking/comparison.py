"""Comparison of a pipeline's training runs: the MLflow parent run and its tables."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vitdet.tracking.address import run_page, tracking_uri
from vitdet.tracking.client import Client, create
from vitdet.tracking.experiments import find_experiment, plugin_run
from vitdet.tracking.history import champion_of
from vitdet.tracking.mlflow import connect
from vitdet.tracking.model_card import shortened
from vitdet.tracking.runs import metric_name
from vitdet.tracking.table import COLUMNS, page, seeds_table, trainings_table

# {KFP's final state of a run: MLflow's status}. Some KFP servers report RUNNING while the exit
# handler runs; the tag `best` then indicates success.
ENDS = {
    **dict.fromkeys(("SUCCEEDED", "COMPLETE", "CACHED"), "FINISHED"),
    **dict.fromkeys(("CANCELLED", "CANCELED"), "KILLED"),
    "FAILED": "FAILED",
}


def start_parent_run(
    group: str, names: Sequence[str], *, uri: str, folder: Path, experiment: str
) -> str:
    """Find or create the MLflow parent run of the pipeline run `group`; return its ID.

    With the MLflow plugin of Kubeflow Pipelines, the plugin's run is the parent run. Raises
    ConnectionError if MLflow does not respond.
    """
    client = connect(uri, folder)
    tags = {"group": group, "pipeline_run": group, "recipes": " ".join(names)}
    if run := plugin_run(client, group):
        for key, value in tags.items():
            client.set_tag(run.info.run_id, key, value)
        return run.info.run_id
    experiment_id = find_experiment(client, folder, experiment)
    tags |= {"mlflow.source.name": "pipeline", "mlflow.source.type": "JOB"}
    listed = " / ".join(names) if len(names) < 4 else f"{len(names)} training runs"
    name = f"pipeline {listed}"[:250]  # MLflow's limit
    return create(
        lambda: _parent(client, experiment_id, group),
        lambda: client.create_run(experiment_id, None, tags, name).info.run_id,
    )


def end_parent_run(group: str, state: str, *, uri: str, folder: Path, experiment: str) -> None:
    """End the MLflow parent run with the status for `state`, KFP's final state of the pipeline run.

    The MLflow plugin ends a parent run that it created. Raises the errors of `start_parent_run`.
    """
    client = connect(uri, folder)
    if plugin_run(client, group):
        return
    if parent := _parent(client, find_experiment(client, folder, experiment), group):
        default = "FINISHED" if "best" in client.get_run(parent).data.tags else "FAILED"
        client.set_terminated(parent, ENDS.get(state.upper(), default))


def page_of_run(run_id: str | None, *, uri: str, folder: Path) -> str:
    """Return the URL of a run in MLflow's UI; "" if there is no run or no UI."""
    address = tracking_uri(uri, folder)
    if not run_id or not run_page(address, "", run_id):
        return ""
    run = connect(uri, folder).get_run(run_id)
    return run_page(address, run.info.experiment_id, run_id)


def compare(
    group: str,
    rows: Sequence[dict],
    failures: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
    *,
    uri: str,
    folder: Path,
    experiment: str,
    model_name: str,
) -> tuple[str, str, str]:
    """Compare a pipeline's training runs, best box AP first; log the tables to the parent run.

    Args:
        rows: For each training run with a verdict, its name, val_fingerprint, evaluate_settings,
            run_id, passed, reason and metrics.
        failures: {name: reason} of the training runs that did not succeed.
        settings: {name: {setting: value}} of the settings that vary among a recipe's training runs.

    Returns the tables as Markdown, as Markdown with links to MLflow, and as an HTML page. Raises
    ValueError if the detectors were evaluated on different data or with different settings, and
    ConnectionError if MLflow does not respond.
    """
    kinds = {"val_fingerprint": "on different data", "evaluate_settings": "with different settings"}
    for key, what in kinds.items():
        values = sorted({row[key] for row in rows})
        if len(values) > 1:
            raise ValueError(
                "the training runs cannot be compared, as they were evaluated "
                f"{what} ({', '.join(values)})"
            )
    client = connect(uri, folder)
    found = client.search_model_versions(f"name = '{model_name}'")
    found = sorted(found, key=lambda version: int(version.version))
    # later entries replace earlier ones, so that each run has its newest version
    versions = {version.run_id: str(version.version) for version in found if version.run_id}
    ordered = sorted(rows, key=_box_ap, reverse=True)
    names = list(dict.fromkeys([*(row["name"] for row in ordered), *failures]))
    parent = start_parent_run(group, names, uri=uri, folder=folder, experiment=experiment)
    experiment_id = client.get_run(parent).info.experiment_id
    links = {
        row["name"]: link
        for row in ordered
        if row["run_id"] and (link := run_page(client.uri, experiment_id, row["run_id"]))
    }
    champion = champion_of(client, model_name)
    tables = [trainings_table(ordered, failures, settings, champion, versions, links)]
    if over_seeds := seeds_table(ordered, settings):
        tables.insert(0, over_seeds)
    data = f"Data {ordered[0]['val_fingerprint']}" if ordered else "No training run succeeded"
    address = run_page(client.uri, experiment_id, parent)
    text = "\n".join([f"{data}\n", *(replace(table, links={}).markdown() for table in tables)])
    linked = "\n".join([f"{data}\n", *(table.markdown() for table in tables)])
    paragraphs = [data]
    if address:
        linked += f"\n[MLflow]({address})"
        paragraphs.append(f"MLflow: {address}")
    for row in ordered:
        for key in COLUMNS[:2]:
            if row["metrics"].get(key) is not None:
                client.log_metric(parent, metric_name(f"{key}/{row['name']}"), row["metrics"][key])
    if ordered:
        client.set_tag(parent, "val_fingerprint", ordered[0]["val_fingerprint"])
    if ordered and not failures:
        client.set_tag(parent, "best", ordered[0]["name"])
    client.set_tag(parent, "mlflow.note.content", shortened(text, "comparison.md"))
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "comparison.md").write_text(text)
        client.log_artifact(parent, str(Path(work) / "comparison.md"))
    return text, linked, page("Comparison", paragraphs, tables)


def _box_ap(row: dict) -> float:
    value = row["metrics"].get("box_ap")
    return -1.0 if value is None else value


def _parent(client: Client, experiment_id: str, group: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.group = '{group}'")
    return found[0].info.run_id if found else None
