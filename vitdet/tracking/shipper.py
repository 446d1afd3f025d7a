"""Delivery of a journal to the tracking server: each record exactly once, despite failures.

If it is unknown whether a request succeeded, e.g. because the response was lost, the shipper
queries the server and sends only the data that the server lacks.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import time
from contextlib import suppress

from vitdet.tracking.address import hide_credentials
from vitdet.tracking.client import (
    Client,
    InvalidRequestError,
    RefusedError,
    UnknownRunError,
    first_line,
    open_client,
)
from vitdet.tracking.experiments import PARENT, find_experiment, plugin_run
from vitdet.tracking.journal import Journal

log = logging.getLogger(__name__)

BACK_OFF_SECONDS = 30.0  # maximum pause between attempts
UPLOAD_SECONDS = 60.0  # pause after a failed upload
BATCH = 1000  # metrics per request: MLflow's limit


class Shipper:
    """Sends the records and files of a journal to the server at `uri`."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self.journal, self.uri, self._shown = journal, uri, hide_credentials(uri)
        self._run_id: str | None = None  # set when this process has found or created the run
        # {metric: {step: value}} on the server; None: this process created the run
        self._stored: dict[str, dict[int, float]] | None = {}
        self._rejected: set[str] = set()  # names of metrics that the server rejects
        self._is_accepting = True
        self._uploading: threading.Thread | None = None
        self._next_upload = 0.0
        self._failed: set[str] = set()  # files for which a warning was logged
        self.is_unknown = False  # see UnknownRunError

    def deliver(self, seconds: float = 0.0) -> bool:
        """Send the pending records; after a temporary failure, retry for up to `seconds`.

        Returns whether all records were sent. Logs only the first of consecutive failures.
        """
        deadline, pause = time.monotonic() + seconds, 0.5
        while self.journal.waiting():
            try:
                with self.journal.locked():
                    self._ship(open_client(self.uri))
            except UnknownRunError as error:
                log.warning("tracking: %s; nothing is logged", error)
                self.is_unknown = True
                return False
            except Exception as error:  # an error of a server, its client or a database
                self._run_id, self._stored = None, {}  # the request may have succeeded
                is_refused = isinstance(error, RefusedError)
                if self._is_accepting:
                    self._is_accepting = False
                    what = "are rejected" if is_refused else "cannot be sent now"
                    reason = first_line(error).removeprefix(f"{self._shown}: ")
                    kept = f"{what} ({reason}); they are kept in {self.journal.path}"
                    log.warning("tracking: %s: the run's records %s", self._shown, kept)
                if time.monotonic() + pause > deadline or is_refused:
                    return False
                time.sleep(pause)
                pause = min(2 * pause, BACK_OFF_SECONDS)
        if not self._is_accepting:
            self._is_accepting = True
            log.warning("tracking: all of the run's records have now been sent to %s", self._shown)
        return True

    def upload(self, seconds: float = 0.0) -> None:
        """Upload the pending files in a thread; wait up to `seconds` for the thread to finish.

        An artifact store that hangs therefore blocks neither metrics nor the end of the process.
        """
        deadline = time.monotonic() + seconds
        while (thread := self._start_upload()) and seconds:  # again, if files were added
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                log.warning(
                    f"tracking: files were not uploaded within {seconds:g} s; they are kept in "
                    f"{self.journal.files}, and the next command that uses this run uploads them"
                )
                break

    def refusal(self) -> str:
        """Find or create the run; return why the server will never accept it, or "" otherwise."""
        try:
            with self.journal.locked():
                self.attach(open_client(self.uri))
        except InvalidRequestError as error:  # possibly a temporary response from a proxy
            log.debug("tracking: %s", error)
        except RefusedError as error:
            return str(error)
        except Exception as error:  # `deliver` tries again and logs a warning
            log.debug("tracking: %s", first_line(error))
        return ""

    def attach(self, client: Client) -> str:
        """Find or create the run; return its ID. Raises UnknownRunError and `Client`'s errors."""
        if self._run_id is None:
            self._run_id = self._known(client) or self._create(client)
        return self._run_id

    def _start_upload(self) -> threading.Thread | None:
        """Return the running upload thread, or start one; None if nothing can be uploaded now."""
        if self._uploading is not None and self._uploading.is_alive():
            return self._uploading
        if time.monotonic() < self._next_upload or not self.journal.entries():
            return None
        if self.refusal() or self._run_id is None:
            return None
        self._uploading = threading.Thread(target=self._upload, name="uploads", daemon=True)
        self._uploading.start()
        return self._uploading

    def _upload(self) -> None:
        """Upload the files in order until an upload fails; move the failed file to the end."""
        run_id, client = self.journal.run_id, open_client(self.uri)
        for entry in self.journal.entries():
            path, key = None, entry.name[-8:]
            try:
                path = next((file for file in entry.rglob("*") if file.is_file()), None)
                if path is not None:
                    folder = path.parent.relative_to(entry).as_posix()
                    client.log_artifact(run_id, str(path), None if folder == "." else folder)
                shutil.rmtree(entry)
            # an error of the server, the artifact store's client, or the disk
            except Exception as error:
                if not entry.exists():  # another process has uploaded the file
                    continue
                if key not in self._failed:
                    log.warning(
                        f"tracking: {(path or entry).name} cannot be uploaded "
                        f"({first_line(error)}); the file is kept in {self.journal.files}, and "
                        "this process or the next command that uses this run retries the upload"
                    )
                self._failed.add(key)
                self._next_upload = time.monotonic() + UPLOAD_SECONDS
                with suppress(OSError):  # a file that the store rejects must not block other files
                    entry.rename(entry.with_name(f"{time.time_ns()}-{key}"))
                return

    def _ship(self, client: Client) -> None:
        run_id = self.attach(client)
        for records, end in self.journal.batches(BATCH):
            self._send(client, run_id, records)
            self.journal.move(run_id, end)

    def _known(self, client: Client) -> str | None:
        run_id, _ = self.journal.cursor()
        try:
            if run_id is None or client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except (LookupError, InvalidRequestError):  # no such run, or an invalid run ID
            pass
        return None

    def _create(self, client: Client) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        start = self.journal.start()
        if start is None:
            raise UnknownRunError(
                f"{self._shown} has no run {self.journal.run_id}, and "
                f"{self.journal.path.parent} contains no journal of this run"
            )
        group, key = start.get("group", ""), self.journal.key
        tags = {**start["tags"], "journal": key}
        if plugin := plugin_run(client, group):
            experiment = plugin.info.experiment_id
        else:
            experiment = find_experiment(client, self.journal.folder, start["experiment"])
        if group:
            query = f"tags.group = '{group}'"
            parents = [plugin] if plugin else client.search_runs([experiment], query)
            tags["pipeline_run"] = group
            if parents:
                tags[PARENT] = parents[0].info.run_id
        # the run exists already if only the response to an earlier request was lost
        found = client.search_runs([experiment], f"tags.journal = '{key}'")
        new = experiment, start["time"], tags, start["name"]
        run_id = (found[0] if found else client.create_run(*new)).info.run_id
        self._stored = {} if found else None
        params = [Param(key, str(value)[:6000]) for key, value in start["params"].items()]
        for first in range(0, len(params), 100):  # MLflow's limits
            client.log_batch(run_id, params=params[first : first + 100])
        if data := start["dataset"]:
            source = json.dumps({"uri": data["source"]})
            dataset = Dataset(data["name"], data["digest"][:36], "local", source)
            context = InputTag("mlflow.data.context", "training")
            client.log_inputs(run_id, [DatasetInput(dataset, [context])])
        if before := self.journal.cursor()[0]:
            again = "all records of the journal are sent to a new run"
            log.warning("tracking: %s has no run %s; %s", self._shown, before, again)
        self.journal.move(run_id, 0)
        return run_id

    def _send(self, client: Client, run_id: str, records: list[dict]) -> None:
        """Send one batch of the journal: records of metrics, or a single record without metrics."""
        record = records[0]
        try:
            if "points" in record:
                self._send_points(client, run_id, records)
            elif "resume" in record:
                client.update_run(run_id, "RUNNING")
                client.set_tag(run_id, "resumed_at_step", record["resume"])
                # settings that differ from the run's parameters, which MLflow cannot update
                name, changed = "resumed_settings", record.get("changed", "")
                if changed or name in client.get_run(run_id).data.tags:
                    client.set_tag(run_id, name, changed[:5000])  # within MLflow's limit
            elif "tags" in record:
                for key, value in record["tags"].items():
                    client.set_tag(run_id, key, value)
            elif "end" in record:
                client.set_terminated(run_id, record["end"], record.get("ended", record["time"]))
            elif "file" in record:
                self.journal.adopt(record)
        except InvalidRequestError as error:  # sending the same record again cannot succeed
            if client.get_run(run_id).info.lifecycle_stage != "active":
                raise LookupError(f"run {run_id} was deleted") from None
            names = {name for item in records for name in item.get("points", ())} - self._rejected
            if len(names) > 1:  # an invalid name must not affect the other metrics
                for name in sorted(names):
                    named = [item for item in records if name in item["points"]]
                    single = [{**item, "points": {name: item["points"][name]}} for item in named]
                    self._send(client, run_id, single)
            else:
                self._rejected |= names
                what = next(iter(names), record)
                log.warning("tracking: the server rejects %s: %s", what, first_line(error))

    def _send_points(self, client: Client, run_id: str, records: list[dict]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["points"].items()
            if key not in self._rejected
            if not self._has(client, run_id, key, record["step"], value, "renew" in record)
        ]
        for first in range(0, len(metrics), BATCH):
            client.log_batch(run_id, metrics[first : first + BATCH])

    def _has(
        self, client: Client, run_id: str, key: str, step: int, value: float, renew: bool
    ) -> bool:
        """Return whether the server has the metric at this step; if `renew`, with this value."""
        if renew:  # not from `_stored`, which lacks values that this process has sent
            stored = history(client, run_id, key)
            return step in stored and same_number(stored[step], value)
        if self._stored is None:
            return False
        if key not in self._stored:
            self._stored[key] = history(client, run_id, key)
        return step in self._stored[key]


def history(client: Client, run_id: str, key: str) -> dict[int, float]:
    """Return {step: value} of a metric, with the latest value of each step."""
    points = sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
    return {point.step: point.value for point in points}


def same_number(ours: float, theirs: float) -> bool:
    """Return whether two values are equal in MLflow, which stores infinity as the largest float."""
    largest = sys.float_info.max
    both_nan = ours != ours and theirs != theirs
    return both_nan or min(max(ours, -largest), largest) == min(max(theirs, -largest), largest)
