"""Experiment tracking: one MLflow run per training, with its metrics, images and artifacts.

Every record is first written to a journal on disk (`vitdet.tracking.journal`), which takes microseconds; a thread sends
them in batches (`vitdet.tracking.shipper`). A server that is slow or unavailable therefore costs training no time: the
records are sent when it responds again, at the end, or by the next process that opens the run. Nothing is logged twice.
mlflow is imported in `vitdet.tracking` only.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.tracking.address import hide_credentials, tracking_uri
from vitdet.tracking.experiments import check_server
from vitdet.tracking.journal import Journal, find, journals, unfinished
from vitdet.tracking.naming import code_tags
from vitdet.tracking.requests import (
    RefusedError,
    RepeatingClient,
    UnknownRunError,
    first_line,
    repeating,
    using,
)
from vitdet.tracking.shipper import BACK_OFF_SECONDS, Shipper, open_client
from vitdet.tracking.system_metrics import SystemMetrics
from vitdet.tracking.tracker import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SHIP_SECONDS = 3.0  # between shipments
# The longest time that a training waits for a server: before the first step, and at the end. What is not sent by then stays in the
# journal.
START_SECONDS = 2.5
STOP_SECONDS = 2.5
# to create the tables of a new sqlite file, and to write the last values to one
CREATE_SECONDS = 60.0
CLOSE_SECONDS = 20.0  # of `log_metrics` and `connect`, whose purpose it is


class MLflowTracker(Tracker):
    """Writes to the journal at once and sends in a thread; created by `start_run`. Errors of a server are only logged.

    refusal: why the server will never accept the run, if that is known.
    """

    def __init__(self, journal: Journal, uri: str, resume: dict | None = None) -> None:
        """resume: a line for the journal before the next one, unless that is the end."""
        self._journal, self._shipper = journal, Shipper(journal, uri)
        self._last, self._resume = journal.last_steps(), resume
        self._closing, self._tried = threading.Event(), threading.Event()
        self._limit = CLOSE_SECONDS
        self.refusal = ""
        # importing MLflow takes seconds, none of which are the server's
        self._system = SystemMetrics(journal.last_value("gpu_hours"))
        self._thread = threading.Thread(target=self._ship, name="tracking", daemon=True)
        self._thread.start()
        # so that the first checkpoint has the id of the run, unless the server is slow
        self._tried.wait(CREATE_SECONDS if uri.startswith("sqlite:") else START_SECONDS)

    @property
    def run_id(self) -> str:
        return self._journal.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        if "images_per_second" in values:
            values = values | self._system.read()
        points = {
            key: float(value) for key, value in values.items() if step > self._last.get(key, -1)
        }
        if points:
            self._resumed()
            self._last |= dict.fromkeys(points, step)
            self._journal.append({"points": points, "step": step})

    def artifact(self, path: Path, folder: str = "") -> None:
        self._resumed()
        self._journal.append_file(path, folder)

    def close(self, status: str = "FINISHED") -> None:
        if not self._closing.is_set():
            is_file = self._shipper.uri.startswith("sqlite:")
            self._limit = CLOSE_SECONDS if is_file and status == "FINISHED" else STOP_SECONDS
            last, _ = self._journal.state()
            again = last.get("end") == status  # a finished run that was opened again
            ended = {"ended": last.get("ended", last["time"])} if again else {}
            self._journal.append({"end": status, **ended})
            self._closing.set()
            self._thread.join(self._limit)
            if self._thread.is_alive():
                log.warning(
                    "tracking: the last values wait in %s; the same command sends them",
                    self._journal.path,
                )

    def abandon(self) -> None:
        """Send nothing more."""
        self._limit = 0.0
        self._closing.set()
        self._thread.join()

    def _resumed(self) -> None:
        if self._resume:
            self._journal.append(self._resume)
            self._resume = None

    def _others(self) -> list[Journal]:
        """The journals of other runs of this folder that were started on this server; version 0.1 did not record it."""
        server = hide_credentials(self._shipper.uri)
        return [
            journal
            for journal in journals(self._journal.folder)
            if (journal.start() or {}).get("server", server) == server
        ]

    def _ship(self) -> None:
        pause = SHIP_SECONDS
        others = [Shipper(journal, self._shipper.uri) for journal in self._others()]
        self.refusal = self._shipper.refusal()
        if not self.refusal:
            self._shipper.deliver()
        self._tried.set()
        while not self._closing.wait(pause):
            if self._shipper.deliver():
                pause = SHIP_SECONDS
                if (
                    others
                ):  # what earlier runs could not ship; one at a time, this run's lines between them
                    other = others.pop(0)
                    if other.deliver() and other.is_uploading:
                        others.append(other)
            else:
                pause = min(2 * pause, BACK_OFF_SECONDS)
        if self._limit:
            self._shipper.deliver(0.9 * self._limit)


def start_run(
    *,
    uri: str,
    folder: Path,
    experiment: str,
    name: str,
    params: dict[str, bool | int | float | str],
    tags: dict[str, str],
    dataset: dict[str, str],
    run_id: str | None = None,
    resume_step: int = 0,
    group: str = "",
    output: str = "",
) -> Tracker:
    """A tracker of a new run, or of the run `run_id` (MLflow's id or a pending one), which goes on at `resume_step`.

    `uri` '' means a sqlite file in `folder`; the environment's MLFLOW_TRACKING_URI wins. dataset: name, digest, source.
    A run that the server does not know becomes a new one with all records of the journal. group: a new run
    becomes a child of the run in its experiment whose tag `group` has this value. output: the folder in `folder` that the
    training writes to: one that was killed before its first state is found by it and goes on as the same run.

    Raises ValueError at step 0 for what no waiting cures: a deleted experiment, or a store that MLflow does not support.
    Later, that is a warning.
    """
    server = tracking_uri(uri, folder)
    params = {
        key: hide_credentials(value) if isinstance(value, str) else value
        for key, value in params.items()
    }
    tags = {
        "mlflow.source.name": "vitdet train",
        "mlflow.source.type": "LOCAL",
        **code_tags(),
        **tags,
    }
    if revision := tags.get("git_revision"):
        tags["mlflow.source.git.commit"] = revision[:40]
    if run_id is None and output:
        run_id = unfinished(folder, output, params)
    journal = find(folder, run_id)
    is_new = journal.start() is None
    if is_new:
        what = {
            "experiment": experiment,
            "name": name,
            "params": params,
            "tags": tags,
            "dataset": dataset,
            "group": group,
            "output": output,
            "server": hide_credentials(server),
        }
        journal.append({"start": what})
    resume = None
    if run_id is not None:
        began = (journal.start() or {}).get("params", {})
        changed = "; ".join(
            f"{key}: {params[key]}, not {hide_credentials(value)}"
            for key, value in began.items()
            if params.get(key, value) not in (value, hide_credentials(value))
        )
        resume, (last, before) = {"resume": resume_step, "changed": changed}, journal.state()
        if last.get("end") != "FINISHED" or changed != before:
            journal.append(resume)
            resume = None
    tracker = MLflowTracker(journal, server, resume)
    if tracker.refusal and not resume_step:
        tracker.abandon()
        if is_new:
            journal.remove()
        raise ValueError(tracker.refusal)
    return tracker


def log_metrics(
    run_id: str,
    uri: str,
    folder: Path,
    values: dict[str, float],
    step: int,
    artifacts: dict[Path, str] | None = None,
    tags: dict[str, str] | None = None,
) -> str | None:
    """Adds values, files ({path: folder}) and tags to a run after its training, where it does not have them; its id.

    None, and a warning, if the server does not know the run.
    """
    server = tracking_uri(uri, folder)
    journal = find(folder, run_id)
    journal.append(
        {
            "points": {key: float(value) for key, value in values.items()},
            "step": step,
            "renew": True,
        }
    )
    if tags:
        journal.append({"tags": tags})
    for path, place in (artifacts or {}).items():
        journal.append_file(path, place)
    shipper = Shipper(journal, server)
    with repeating(server):
        delivered = shipper.deliver(CLOSE_SECONDS, files_too=False)
    if delivered:
        shipper.deliver(CLOSE_SECONDS)
    if shipper.is_unknown:
        journal.remove()
        return None
    return journal.run_id


def connect(
    run_id: str | None, uri: str, folder: Path, tries: int | None = None
) -> tuple[MlflowClient, str | None]:
    """(client of the server in use, MLflow's id of the run), after all records of the run's journal were sent.

    tries: of the first request; default: as of all others.
    Raises ConnectionError where the server does not answer, LookupError where it does not have the run, and ValueError
    where the store can never be used.
    """
    uri = tracking_uri(uri, folder)
    try:
        client = open_client(uri)
        with repeating(uri, tries), using(uri):
            client.search_experiments(max_results=1)
            check_server(client, uri)
    except RefusedError:
        raise
    except Exception as error:  # of MLflow, its HTTP client or a database
        problem, advice = (
            ("the file cannot be used", "check its path, its permissions and the free disk space")
            if uri.startswith("sqlite:")
            else (
                "no answer from MLflow",
                "start the server, or set MLFLOW_TRACKING_URI to one that runs",
            )
        )
        raise ConnectionError(
            f"{hide_credentials(uri)}: {problem} ({first_line(error)}); {advice}"
        ) from error
    repeated: Any = RepeatingClient(client, uri)
    if not run_id:
        return repeated, None
    shipper = Shipper(find(folder, run_id), uri)
    try:
        with repeating(uri):
            shipper.attach(client)
            delivered = shipper.deliver(CLOSE_SECONDS, files_too=False)
        if delivered:
            shipper.deliver(CLOSE_SECONDS)
    except UnknownRunError:
        shipper.journal.remove()
        raise
    return repeated, shipper.journal.run_id
