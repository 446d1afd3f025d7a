"""Experiment tracking: one MLflow run per training run, with metrics and artifacts.

Every record is first written to a journal on disk (`vitdet.tracking.journal`), which takes
microseconds; a thread sends the records in batches (`vitdet.tracking.shipper`). A server that is
slow or unavailable therefore hardly delays training: the records are sent when the server responds
again, at the end of training, or by the next process that opens the run.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from vitdet.tracking.address import hide_credentials, tracking_uri
from vitdet.tracking.client import (
    Client,
    RefusedError,
    UnknownRunError,
    first_line,
    open_client,
    repeating,
)
from vitdet.tracking.experiments import check_server
from vitdet.tracking.journal import Journal, find, journals, unfinished
from vitdet.tracking.naming import code_tags
from vitdet.tracking.shipper import BACK_OFF_SECONDS, Shipper
from vitdet.tracking.system_metrics import SystemMetrics
from vitdet.tracking.tracker import Tracker

log = logging.getLogger(__name__)

SHIP_SECONDS = 3.0  # pause between deliveries
# Maximum seconds that a training run waits for a server, before the first step and at the end.
START_SECONDS = 2.5
STOP_SECONDS = 2.5
CREATE_SECONDS = 60.0  # used instead of START_SECONDS for SQLite, as tables may have to be created
CLOSE_SECONDS = 20.0  # at the end of a FINISHED run in SQLite; in `log_metrics` and `connect_run`


class MLflowTracker(Tracker):
    """A tracker that writes records to a journal; a thread sends them and only logs server errors.

    resume: a record that is written before the next metric or artifact. The attribute `refusal` is
    the reason why the server will never accept the run, "" if no such reason is known.
    """

    def __init__(self, journal: Journal, uri: str, resume: dict | None = None) -> None:
        self._journal, self._shipper, self._resume = journal, Shipper(journal, uri), resume
        self._is_file = uri.startswith("sqlite:")
        points = journal.last_points()
        self._last = {name: step for name, (step, _) in points.items()}
        self._closing, self._tried = threading.Event(), threading.Event()
        self._limit = CLOSE_SECONDS
        self.refusal = ""
        # imports MLflow, which takes seconds, before the wait of START_SECONDS begins
        self._system = SystemMetrics(points.get("gpu_hours", (0, 0.0))[1])
        self._thread = threading.Thread(target=self._ship, name="tracking", daemon=True)
        self._thread.start()
        # wait for the run's ID on the server, which the first checkpoint should contain
        self._tried.wait(CREATE_SECONDS if self._is_file else START_SECONDS)

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
            self._write_resume()
            self._last |= dict.fromkeys(points, step)
            self._journal.append({"points": points, "step": step})

    def artifact(self, path: Path, folder: str = "") -> None:
        self._write_resume()
        self._journal.append_file(path, folder)

    def close(self, status: str = "FINISHED") -> None:
        if self._closing.is_set():
            return
        last, _ = self._journal.state()
        had_ended = last.get("end") == status  # not resumed since: keep the end time
        ended = {"ended": last.get("ended", last["time"])} if had_ended else {}
        self._journal.append({"end": status, **ended})
        finishes = self._is_file and status == "FINISHED"
        self._stop(CLOSE_SECONDS if finishes else STOP_SECONDS)
        if self._thread.is_alive():
            log.warning(
                "tracking: unsent records are kept in %s; run the same command again to send them",
                self._journal.path,
            )

    def abandon(self) -> None:
        """Stop the thread without sending the remaining records."""
        self._stop(0.0)
        self._thread.join()

    def _stop(self, limit: float) -> None:
        self._limit = limit
        self._closing.set()
        self._thread.join(limit)

    def _write_resume(self) -> None:
        if self._resume:
            self._journal.append(self._resume)
            self._resume = None

    def _others(self) -> list[Shipper]:
        """Return shippers for the other runs in this folder that were started on this server."""
        server = hide_credentials(self._shipper.uri)
        return [
            Shipper(journal, self._shipper.uri)
            for journal in journals(self._journal.folder)
            if journal.key != self._journal.key
            # vitdet 0.1 did not record the server
            if (journal.start() or {}).get("server", server) == server
        ]

    def _ship(self) -> None:
        pause, others = SHIP_SECONDS, self._others()
        self.refusal = self._shipper.refusal()
        if not self.refusal:
            self._shipper.deliver()
        self._tried.set()
        while not self._closing.wait(pause):
            if not self._shipper.deliver():
                pause = min(2 * pause, BACK_OFF_SECONDS)
                continue
            pause = SHIP_SECONDS
            self._shipper.upload()
            if others:  # send another run's records after each delivery of this run
                other = others.pop(0)
                if other.deliver():
                    other.upload()
        seconds = 0.9 * self._limit
        deadline = time.monotonic() + seconds
        if self._limit and self._shipper.deliver(seconds):
            self._shipper.upload(max(deadline - time.monotonic(), 0.0))


def start_run(
    uri: str, folder: Path, what: dict[str, Any], run_id: str | None = None, resume_step: int = 0
) -> Tracker:
    """Start a tracker for a new run, or for the run `run_id`, which continues at `resume_step`.

    Args:
        uri: The store; "": an SQLite file in `folder`. MLFLOW_TRACKING_URI takes precedence.
        folder: The folder of the journal.
        what: The experiment, name, params, tags and dataset (name, digest and source) of a new run.
            Optionally, `group` is the parent run's tag `group`, and `output` is the name of the
            output folder, by which a run without a checkpoint is found and continued.
        run_id: A run ID on the server or a pending ID (see `Journal.run_id`). If the server does
            not have this run, a new run is created from all records of the journal.

    Raises ValueError if `resume_step` is 0 and the server will never accept the run, e.g. because
    the experiment was deleted.
    """
    server = tracking_uri(uri, folder)
    params = {
        key: hide_credentials(value) if isinstance(value, str) else value
        for key, value in what["params"].items()
    }
    source = {"mlflow.source.name": "vitdet train", "mlflow.source.type": "LOCAL"}
    tags = source | code_tags() | what["tags"]
    if revision := tags.get("git_revision"):
        tags["mlflow.source.git.commit"] = revision[:40]
    if run_id is None and what.get("output"):
        run_id = unfinished(folder, what["output"], params)
    journal, resume = find(folder, run_id), None
    start = journal.start()
    if start is None:
        new = {"params": params, "tags": tags, "server": hide_credentials(server)}
        journal.append({"start": what | new})
    if run_id is not None:
        changed = "; ".join(
            f"{key}: {params[key]}, not {hide_credentials(value)}"
            for key, value in (start["params"] if start else {}).items()
            if params.get(key, value) not in (value, hide_credentials(value))
        )
        resume, (last, before) = {"resume": resume_step, "changed": changed}, journal.state()
        if last.get("end") != "FINISHED" or changed != before:
            journal.append(resume)
            resume = None
    tracker = MLflowTracker(journal, server, resume)
    if tracker.refusal and not resume_step:
        tracker.abandon()
        if start is None:
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
    """Add metrics, files ({path: artifact folder}) and tags to an ended run; return its ID.

    Values that the run already has are not added again. Logs a warning and returns None if the run
    is neither on the server nor in a journal.
    """
    server, journal = tracking_uri(uri, folder), find(folder, run_id)
    points = {key: float(value) for key, value in values.items()}
    journal.append({"points": points, "step": step, "renew": True})
    if tags:
        journal.append({"tags": tags})
    for path, artifact_folder in (artifacts or {}).items():
        journal.append_file(path, artifact_folder)
    shipper = Shipper(journal, server)
    _send(shipper)
    if shipper.is_unknown:
        journal.remove()
        return None
    return journal.run_id


def connect(uri: str, folder: Path, tries: int | None = None) -> Client:
    """Return a client with retries for the address that `tracking_uri` returns.

    tries: attempts for each request of the connection check; default: TRIES. Raises
    ConnectionError if the server does not respond, and ValueError if the store can never be used.
    """
    uri = tracking_uri(uri, folder)
    try:
        client = open_client(uri)
        with repeating(uri, tries):
            client.search_experiments(max_results=1)
            check_server(client)
    except RefusedError:
        raise
    except Exception as error:  # raised by MLflow, its HTTP client or a database
        if uri.startswith("sqlite:"):
            problem = "the file cannot be used"
            advice = "check its path, its permissions and the free disk space"
        else:
            problem = "no valid response from MLflow"
            advice = "start the server, or set MLFLOW_TRACKING_URI to a running server"
        reason = first_line(error).removeprefix(f"{hide_credentials(uri)}: ")
        raise ConnectionError(f"{hide_credentials(uri)}: {problem} ({reason}); {advice}") from error
    return client.repeating()


def connect_run(run_id: str | None, uri: str, folder: Path) -> tuple[Client, str | None]:
    """Send the remaining records of a run; return a client and the run's ID on the server.

    Without a `run_id`, the returned ID is None. Raises the errors of `connect`, and UnknownRunError
    if the run is neither on the server nor in a journal.
    """
    client = connect(uri, folder)
    if not run_id:
        return client, None
    shipper = Shipper(find(folder, run_id), client.uri)
    try:
        shipper.attach(client)
    except UnknownRunError:
        shipper.journal.remove()
        raise
    _send(shipper)
    return client, shipper.journal.run_id


def _send(shipper: Shipper) -> None:
    with repeating(shipper.uri):
        delivered = shipper.deliver(CLOSE_SECONDS)
    if delivered:
        shipper.upload(CLOSE_SECONDS)
