"""Sending of a journal to the tracking server: each line once, regardless of failures of server or network.

Where it is unknown whether a request was carried out (it failed, or an earlier process made it), the server is queried
for what it has before anything is sent again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from functools import cache
from typing import TYPE_CHECKING

from vitdet.tracking.address import hide_credentials
from vitdet.tracking.experiments import experiment_id
from vitdet.tracking.journal import Journal
from vitdet.tracking.plugin import PARENT, plugin_run
from vitdet.tracking.requests import (
    INVALID,
    MISSING,
    RefusedError,
    UnknownRunError,
    first_line,
    permitted,
    set_defaults,
    using,
)
from vitdet.tracking.uploads import Uploads

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = 30.0  # longest pause after failures
BATCH = 1000  # metrics per request: MLflow's limit
# MLflow's own defaults make a request to a dead server wait for four minutes; here everything is tried again anyway.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # sending the same again cannot help


class Shipper:
    """Sends the lines of a journal to the server at `uri`, each once."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self.journal, self.uri, self._shown = journal, uri, hide_credentials(uri)
        self._run_id: str | None = None  # once this process has seen the run on the server
        # name -> step -> value there; None: the run is empty
        self._held: dict[str, dict[int, float]] | None = {}
        self._refused: set[str] = set()  # names that the server rejects
        self._uploads = Uploads(journal)
        self._answers = True
        self.is_unknown = False  # see UnknownRunError

    def deliver(self, seconds: float = 0.0, files_too: bool = True) -> bool:
        """Send the pending lines, retrying for this many seconds; False, with one warning, if lines are left.

        Files are uploaded in a thread, for which this also waits so many seconds and no longer.
        """
        deadline, pause = time.monotonic() + seconds, 0.5
        while self.journal.waiting() or files_too and self._uploads.is_due(deadline):
            try:
                with self.journal.locked():
                    self._ship(open_client(self.uri), files_too)
            except UnknownRunError as error:
                log.warning("tracking: %s; nothing is logged", error)
                self.is_unknown = True
                return False
            except Exception as error:
                # an error of a server, its client or a database must not stop the caller
                # the server may or may not have what was on its way
                self._run_id, self._held = (None, {})
                if self._answers:
                    log.warning(
                        "tracking: %s %s the run's metrics (%s); they are kept in %s",
                        self._shown,
                        "refuses" if isinstance(error, RefusedError) else "does not accept",
                        first_line(error),
                        self.journal.path,
                    )
                    self._answers = False
                if time.monotonic() + pause > deadline or isinstance(error, RefusedError):
                    return False
                time.sleep(pause)
                pause = min(2 * pause, BACK_OFF_SECONDS)
        if seconds and files_too and self.is_uploading:
            log.warning(
                "tracking: files are not uploaded after %g s; they are kept in %s for the next command that uses "
                "this run",
                seconds,
                self.journal.path.with_suffix(""),
            )
        if not self._answers:
            self._answers = True
            log.warning("tracking: %s answers again and has all metrics", self._shown)
        return True

    @property
    def is_uploading(self) -> bool:
        """Whether an upload is under way."""
        return self._uploads.is_running

    def refusal(self) -> str:
        """Find or create the run; return why the store will never accept it, '' if it does or may later."""
        try:
            with self.journal.locked():
                self.attach(open_client(self.uri))
        except RefusedError as error:
            return str(error)
        except Exception as error:  # `deliver` tries again, and warns
            log.debug("tracking: %s", first_line(error))
        return ""

    def attach(self, client: MlflowClient) -> str:
        """Find the run on the server, or create it; return its id. Raises what MLflow's client raises."""
        if self._run_id is None:
            with permitted(self.uri):
                self._run_id = self._known(client) or self._create(client)
        return self._run_id

    def _ship(self, client: MlflowClient, files_too: bool) -> None:
        run_id = self.attach(client)
        for records, end in self.journal.batches(BATCH):
            files = [record for record in records if "file" in record]
            if not files:
                with permitted(self.uri):
                    self._send(client, run_id, records)
            self.journal.move(run_id, end, [*self.journal.uploads(), *files])
        if files_too:
            self._uploads.advance(client, run_id)

    def _known(self, client: MlflowClient) -> str | None:
        run_id, _ = self.journal.cursor()
        try:
            if run_id is None or client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except Exception as error:
            # invalid: not an id that MLflow assigns
            if getattr(error, "error_code", None) not in MISSING | INVALID:
                raise
        return None

    def _create(self, client: MlflowClient) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        start = self.journal.start()
        if start is None:
            raise UnknownRunError(
                f"{self._shown} has no such run ({self.journal.run_id}), and {self.journal.path.parent} does "
                "not describe it"
            )
        group = start.get("group", "")
        plugin = plugin_run(client, group)
        place = (
            plugin.info.experiment_id
            if plugin
            else experiment_id(client, self.uri, self.journal.folder, start["experiment"])
        )
        tags = {**start["tags"], "journal": self.journal.key}
        if group:
            parents = [plugin] if plugin else client.search_runs([place], f"tags.group = '{group}'")
            tags |= {
                "pipeline_run": group,
                **({PARENT: parents[0].info.run_id} if parents else {}),
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
                "tracking: %s has no run %s; all records of the journal are sent to a new one",
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
            elif "tags" in record:
                for key, value in record["tags"].items():
                    client.set_tag(run_id, key, value)
            elif "end" in record:
                client.set_terminated(run_id, record["end"], record.get("ended", record["time"]))
        except Exception as error:
            if getattr(error, "error_code", None) not in REFUSED:
                raise
            names = {
                name for record in records for name in record.get("points", ())
            } - self._refused
            if len(names) > 1:  # an invalid name must not affect the other metrics
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
        """Whether the server has a value at this step; with renew, whether this value is its last one."""
        if renew:  # also what this process has sent
            there = history(client, run_id, key)
            return step in there and same_number(there[step], value)
        if self._held is None:
            return False
        if key not in self._held:
            self._held[key] = history(client, run_id, key)
        return step in self._held[key]


def history(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    """Return the last value of a metric at each step."""
    points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
    return {point.step: point.value for point in points}


def same_number(ours: float, theirs: float) -> bool:
    """Return whether two values are the same for MLflow, which stores NaN, and the largest number for infinity."""
    largest = sys.float_info.max
    return (
        ours == theirs or ours != ours and theirs != theirs or abs(ours) >= largest <= abs(theirs)
    )


def open_client(uri: str) -> MlflowClient:
    """Return MLflow's client of a server; raises RefusedError where it can be none."""
    set_defaults(CLIENT)  # each time: MLflow reads them at every request
    with using(uri):
        return _cached_client(uri)


@cache
def _cached_client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    for name in (
        "alembic",
        "mlflow.store.db.utils",
    ):  # do not log the creation of the tables of a new SQLite file
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri, uri)
