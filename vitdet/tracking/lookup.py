"""Lookup of MLflow runs by ID or name, and download of their artifacts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vitdet.tracking.address import hide_credentials, tracking_uri
from vitdet.tracking.client import Client
from vitdet.tracking.mlflow import connect


@dataclass(frozen=True)
class StoredRun:
    """A run on the server, with its settings as text and the last value of each metric."""

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def open_store(uri: str, folder: Path, tries: int | None = None) -> Client:
    """Return a client for the address that `tracking_uri` returns. tries: as in `connect`.

    Raises the errors of `connect`, and FileNotFoundError instead of creating an SQLite file.
    """
    server = tracking_uri(uri, folder)
    kind, _, path = server.partition(":///")
    if kind == "sqlite" and not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: no such MLflow store; set MLFLOW_TRACKING_URI, or specify the store on the "
            "command line (see --help)"
        )
    return connect(uri, folder, tries)


def find_run(client: Client, name: str) -> StoredRun:
    """Return the run with this ID, or the only run with this name.

    Raises LookupError if there is no such run, and ValueError if several runs have this name.
    """
    if re.fullmatch(r"[0-9a-f]{32}", name):
        found = [client.get_run(name)]
    else:
        quote = '"' if "'" in name else "'"
        listed = client.search_experiments(max_results=50_000)  # MLflow's limit; default: 1000
        experiments = [experiment.experiment_id for experiment in listed]
        query = f"attributes.run_name = {quote}{name}{quote}"
        found = client.search_runs(experiments, query)
    if not found:
        raise LookupError(
            f"{name}: neither a file nor the ID or name of an MLflow run; specify a run, a "
            "checkpoint or a results.json"
        )
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found[:5])
        raise ValueError(f"{name}: {len(found)} runs have this name; use an ID: {ids}")
    (run,) = found
    return StoredRun(run.info.run_id, run.info.run_name, run.data.params, run.data.metrics)


def download_file(
    client: Client, uri: str, folder: Path, run_id: str, path: str, target: Path
) -> Path | None:
    """Download a run's artifact to folder `target`; return its path, or None if it is missing."""
    parent = path.rpartition("/")[0]
    if all(artifact.path != path for artifact in client.list_artifacts(run_id, parent or None)):
        return None
    try:
        return Path(client.download_artifacts(run_id, path, str(target)))
    except OSError as error:
        server = hide_credentials(tracking_uri(uri, folder))
        raise OSError(f"{server}: {path} of run {run_id}: {error}") from error
