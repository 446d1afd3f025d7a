"""Experiment tracking: one MLflow run a training, its points, pictures and registered model.

Everything is first a line of a journal on disk (`vitdet.tracking.journal`), which takes microseconds; a thread ships the lines
in batches. So a server that is slow, dead or not there yet costs training nothing: what waits is sent when it answers
again, at the end, or by the next process that opens the run. Nothing is logged twice: a step that the journal holds is
not journaled again, and where a shipment's fate is unknown (a failed request, an earlier process) the server is asked
for what it has. mlflow is imported in `vitdet.tracking` only.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.tracking.address import hide_credentials, tracking_uri
from vitdet.tracking.experiments import check_server, experiment_id
from vitdet.tracking.journal import Journal, find, journals, unfinished
from vitdet.tracking.points import history, same_number
from vitdet.tracking.requests import (
    INVALID,
    MISSING,
    RefusedError,
    RepeatingClient,
    UnknownRunError,
    first_line,
    permitted,
    repeating,
    set_defaults,
    using,
)
from vitdet.tracking.revision import git_revision
from vitdet.tracking.tracker import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SHIP_SECONDS = 3.0  # between shipments
BACK_OFF_SECONDS = 30.0  # longest pause after failures
# Longest waits of a training for a server: before the first step, and at the end. What is not sent by then stays in the
# journal.
START_SECONDS = 2.5
STOP_SECONDS = 2.5
# to create the tables of a new sqlite file, and to write the last values to one
CREATE_SECONDS = 60.0
CLOSE_SECONDS = 20.0  # of `log_metrics` and `connect`, whose purpose it is
UPLOAD_SECONDS = 60.0  # between tries to upload a file after a failure
BATCH = 1000  # points a request: MLflow's limit
# MLflow's own defaults make a request to a dead server wait for four minutes; here everything is tried again anyway.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # sending the same again cannot help


class MLflowTracker(Tracker):
    """Journals at once and ships in a thread; made by `start_run`. Never raises for a server's sake.

    refusal: why the store will never take the run, if that is known.
    """

    def __init__(self, journal: Journal, uri: str, resume: dict | None = None) -> None:
        """resume: a line for the journal before the next one, unless that is the end."""
        self._journal, self._shipper = journal, _Shipper(journal, uri)
        self._last, self._resume = journal.last_steps(), resume
        self._closing, self._tried = threading.Event(), threading.Event()
        self._limit = CLOSE_SECONDS
        self.refusal = ""
        import_module("mlflow")  # takes seconds, none of which are the server's
        self._thread = threading.Thread(target=self._ship, name="tracking", daemon=True)
        self._thread.start()
        # so that the first checkpoint has the id of the run, unless the server is slow
        self._tried.wait(CREATE_SECONDS if uri.startswith("sqlite:") else START_SECONDS)

    @property
    def run_id(self) -> str:
        return self._journal.run_id

    def log(self, values: dict[str, float], step: int) -> None:
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
        pause, others = SHIP_SECONDS, self._others()
        self.refusal = self._shipper.refusal()
        if not self.refusal:
            self._shipper.deliver()
        self._tried.set()
        while not self._closing.wait(pause):
            if self._shipper.deliver():
                pause = SHIP_SECONDS
                for journal in others:  # what earlier runs of this folder could not ship
                    _Shipper(journal, self._shipper.uri).deliver()
                others = []
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
    A run that the server does not know becomes a new one with everything that the journal holds. group: a new run
    becomes a child of the run in its experiment whose tag `group` says so. output: the folder in `folder` that the
    training writes to: one that was killed before its first state is found by it and goes on as the same run.

    Raises ValueError at step 0 for what no waiting cures: a deleted experiment, or a store that MLflow does not support.
    Later, that is a warning.
    """
    server = tracking_uri(uri, folder)
    params = {
        key: hide_credentials(value) if isinstance(value, str) else value
        for key, value in params.items()
    }
    if revision := git_revision():
        tags = {"git_revision": revision, "mlflow.source.git.commit": revision[:40], **tags}
    tags = {"mlflow.source.name": "vitdet train", "mlflow.source.type": "LOCAL", **tags}
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
) -> str | None:
    """Adds values and files ({path: folder}) to a run after its training, where it does not have them; its id.

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
    for path, place in (artifacts or {}).items():
        journal.append_file(path, place)
    shipper = _Shipper(journal, server)
    with repeating(server):
        shipper.deliver(CLOSE_SECONDS)
    if shipper.is_unknown:
        journal.remove()
        return None
    return journal.run_id


def connect(run_id: str | None, uri: str, folder: Path) -> tuple[MlflowClient, str | None]:
    """(client of the server in use, MLflow's id of the run), after all that the run's journal holds is there.

    Raises ConnectionError where the server does not answer, LookupError where it does not have the run, and ValueError
    where the store can never be used.
    """
    uri = tracking_uri(uri, folder)
    try:
        client = _client(uri)
        with repeating(uri), using(uri):
            client.search_experiments(max_results=1)
            check_server(client, uri)
    except RefusedError:
        raise
    except Exception as error:  # of MLflow, its HTTP client or a database
        raise ConnectionError(
            f"{hide_credentials(uri)}: no answer from MLflow ({first_line(error)}); start the server, or set "
            "MLFLOW_TRACKING_URI to one that runs"
        ) from error
    repeated: Any = RepeatingClient(client, uri)
    if not run_id:
        return repeated, None
    shipper = _Shipper(find(folder, run_id), uri)
    try:
        with repeating(uri):
            shipper.attach(client)
            shipper.deliver(CLOSE_SECONDS)
    except UnknownRunError:
        shipper.journal.remove()
        raise
    return repeated, shipper.journal.run_id


class _Shipper:
    """Brings a journal's lines to the server at `uri`, each once."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self.journal, self.uri, self._shown = journal, uri, hide_credentials(uri)
        self._run_id: str | None = None  # once this process has seen the run on the server
        # name -> step -> value there; None: the run is empty
        self._held: dict[str, dict[int, float]] | None = {}
        self._refused: set[str] = set()  # names that the server does not take
        self._uploads: dict[str, float] = {}  # file that failed -> time of the next try
        self._answers = True
        self.is_unknown = False  # see UnknownRunError

    def deliver(self, seconds: float = 0.0) -> bool:
        """Ships what waits, trying again for so many seconds; False, and once a warning, where lines are left."""
        deadline, pause = time.monotonic() + seconds, 0.5
        while self.journal.waiting() or self._due():
            try:
                with self.journal.locked():
                    self._ship(_client(self.uri))
            except UnknownRunError as error:
                log.warning("tracking: %s; nothing is logged", error)
                self.is_unknown = True
                return False
            except Exception as error:
                # whatever a server, its client or a database does, the caller goes on
                # the server may or may not have what was on its way
                self._run_id, self._held = (None, {})
                if self._answers:
                    log.warning(
                        "tracking: %s %s the run's metrics (%s); they are kept in %s",
                        self._shown,
                        "refuses" if isinstance(error, RefusedError) else "does not take",
                        first_line(error),
                        self.journal.path,
                    )
                    self._answers = False
                if time.monotonic() + pause > deadline or isinstance(error, RefusedError):
                    return False
                time.sleep(pause)
                pause = min(2 * pause, BACK_OFF_SECONDS)
        if not self._answers:
            self._answers = True
            log.warning("tracking: %s answers again and has all metrics", self._shown)
        return True

    def refusal(self) -> str:
        """Look for the run or make it; why the store will never take it, '' if it does or may later."""
        try:
            with self.journal.locked():
                self.attach(_client(self.uri))
        except RefusedError as error:
            return str(error)
        except Exception as error:  # `deliver` tries again, and warns
            log.debug("tracking: %s", first_line(error))
        return ""

    def attach(self, client: MlflowClient) -> str:
        """Finds the run on the server, or makes it. Raises what MLflow's client raises."""
        if self._run_id is None:
            with permitted(self.uri):
                self._run_id = self._known(client) or self._create(client)
        return self._run_id

    def _ship(self, client: MlflowClient) -> None:
        run_id = self.attach(client)
        for records, end in self.journal.batches(BATCH):
            files = [record for record in records if "file" in record]
            if not files:
                with permitted(self.uri):
                    self._send(client, run_id, records)
            self.journal.move(run_id, end, [*self.journal.uploads(), *files])
        for record in self._due():
            self._upload(client, run_id, record)

    def _due(self) -> list[dict]:
        """The files that are to be uploaded now."""
        now = time.monotonic()
        return [one for one in self.journal.uploads() if self._uploads.get(one["file"], 0) <= now]

    def _upload(self, client: MlflowClient, run_id: str, record: dict) -> None:
        """Upload a file; if that fails, it is tried again later and holds nothing back."""
        path, name = self.journal.path.parent / record["file"], record["file"]
        try:
            if path.exists():
                client.log_artifact(run_id, str(path), record["folder"] or None)
        except (
            Exception
        ) as error:  # of the server, of the client of the artifact store, or of the disk
            if name not in self._uploads:
                log.warning(
                    "tracking: %s cannot be uploaded (%s); it is kept in %s and tried again, also by the next "
                    "command that uses this run",
                    path.name,
                    first_line(error),
                    path.parent,
                )
            self._uploads[name] = time.monotonic() + UPLOAD_SECONDS
            return
        shutil.rmtree(path.parent, ignore_errors=True)
        left = [one for one in self.journal.uploads() if one["file"] != name]
        self.journal.move(run_id, self.journal.cursor()[1], left)

    def _known(self, client: MlflowClient) -> str | None:
        run_id, _ = self.journal.cursor()
        try:
            if run_id is None or client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except Exception as error:
            # invalid: not an id that MLflow gives
            if getattr(error, "error_code", None) not in MISSING | INVALID:
                raise
        return None

    def _create(self, client: MlflowClient) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        start = self.journal.start()
        if start is None:
            raise UnknownRunError(
                f"{self._shown} has no such run ({self.journal.run_id}), and {self.journal.path.parent} does "
                "not say what it was"
            )
        place = experiment_id(client, self.uri, self.journal.folder, start["experiment"])
        tags = {**start["tags"], "journal": self.journal.key}
        if group := start.get("group"):
            parents = client.search_runs([place], f"tags.group = '{group}'")
            tags |= {
                "pipeline_run": group,
                **({"mlflow.parentRunId": parents[0].info.run_id} if parents else {}),
            }
        made = client.search_runs([place], f"tags.journal = '{self.journal.key}'")
        run_id = (
            made[0] if made else client.create_run(place, start["time"], tags, start["name"])
        ).info.run_id
        # made: an earlier request arrived, though its answer did not
        self._held = {} if made else None
        params = [Param(key, str(value)[:6000]) for key, value in start["params"].items()]
        for first in range(0, len(params), 100):  # MLflow's limits
            client.log_batch(run_id, params=params[first : first + 100])
        if data := start["dataset"]:
            data = Dataset(
                data["name"], data["digest"][:36], "local", json.dumps({"uri": data["source"]})
            )
            client.log_inputs(
                run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
            )
        if before := self.journal.cursor()[0]:
            log.warning(
                "tracking: %s has no run %s; a new one gets all that the journal holds",
                self._shown,
                before,
            )
        self.journal.move(run_id, 0, [])
        return run_id

    def _send(self, client: MlflowClient, run_id: str, records: list[dict]) -> None:
        record = records[0]
        try:
            if "points" in record:
                self._send_points(client, run_id, records)
            elif "resume" in record:
                client.update_run(run_id, "RUNNING")
                client.set_tag(run_id, "resumed_at_step", record["resume"])
                self._send_changes(client, run_id, record.get("changed", ""))
            elif "end" in record:
                client.set_terminated(run_id, record["end"], record.get("ended", record["time"]))
        except Exception as error:
            if getattr(error, "error_code", None) not in REFUSED:
                raise
            names = {
                name for record in records for name in record.get("points", ())
            } - self._refused
            if len(names) > 1:  # one bad name must not take its neighbours along
                for name in sorted(names):
                    self._send(
                        client,
                        run_id,
                        [
                            {**record, "points": {name: record["points"][name]}}
                            for record in records
                            if name in record["points"]
                        ],
                    )
            else:
                self._refused |= names
                log.warning(
                    "tracking: the server refuses %s: %s", *names or [record], first_line(error)
                )

    def _send_changes(self, client: MlflowClient, run_id: str, changed: str) -> None:
        """Tag the run with the settings that differ from its parameters, which MLflow keeps as they are."""
        name = "resumed_settings"
        if changed or name in client.get_run(run_id).data.tags:
            client.set_tag(run_id, name, changed[:5000])  # MLflow's limit

    def _send_points(self, client: MlflowClient, run_id: str, records: list[dict]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["points"].items()
            if key not in self._refused
            if not self._has(client, run_id, key, record["step"], value, "renew" in record)
        ]
        for first in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics[first : first + BATCH])

    def _has(
        self, client: MlflowClient, run_id: str, key: str, step: int, value: float, renew: bool
    ) -> bool:
        """Whether the server has a value at this step; with renew, whether this value is the last one there."""
        if renew:  # also what this process has sent
            there = history(client, run_id, key)
            return step in there and same_number(there[step], value)
        if self._held is None:
            return False
        if key not in self._held:
            self._held[key] = history(client, run_id, key)
        return step in self._held[key]


def _client(uri: str) -> MlflowClient:
    set_defaults(CLIENT)  # each time: MLflow reads them at every request
    with using(uri):
        return _cached_client(uri)


@cache
def _cached_client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # the tables of a new sqlite file are no news
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)
