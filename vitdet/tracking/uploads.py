"""Uploads of the pending files of a journal, in a thread, so that an artifact store that hangs delays no metric."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from typing import TYPE_CHECKING

from vitdet.tracking.journal import Journal
from vitdet.tracking.requests import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0  # between tries to upload files after a failure


class Uploads:
    """Uploads the files of a journal one after another, until one fails; that one is the last to be tried again."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread: threading.Thread | None = None
        self._uploaded: set[str] = set()
        self._failed: set[str] = set()
        self._next_try = 0.0

    @property
    def is_running(self) -> bool:
        """Whether an upload is under way."""
        return self._thread is not None and self._thread.is_alive()

    def is_due(self, deadline: float) -> bool:
        """Wait until this time for an upload that is under way; return whether `advance` has something to do."""
        if self._thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            return not self.is_running
        return time.monotonic() >= self._next_try and bool(self._journal.uploads())

    def advance(self, client: MlflowClient, run_id: str) -> None:
        """Remove the uploaded files from the journal, whose lock the caller holds, and start to upload the others."""
        if self.is_running:
            return
        if self._thread:
            self._thread = None
            files = [one for one in self._journal.uploads() if one["file"] not in self._uploaded]
            # also for the next process: one file that the store refuses must not block the others
            files.sort(key=lambda one: one["file"] in self._failed)
            self._journal.move(run_id, self._journal.cursor()[1], files)
            for name in self._uploaded:
                shutil.rmtree((self._journal.path.parent / name).parent, ignore_errors=True)
            self._uploaded.clear()
        files = self._journal.uploads()
        if files and time.monotonic() >= self._next_try:
            # a daemon: a store that hangs must not keep the process from ending
            self._thread = threading.Thread(
                target=self._upload, args=(client, run_id, files), name="uploads", daemon=True
            )
            self._thread.start()

    def _upload(self, client: MlflowClient, run_id: str, files: list[dict]) -> None:
        for record in files:
            path, name = self._journal.path.parent / record["file"], record["file"]
            try:
                if path.exists():  # else another process has uploaded it
                    client.log_artifact(run_id, str(path), record["folder"] or None)
            except (
                Exception
            ) as error:  # of the server, the client of the artifact store, or the disk
                if name not in self._failed:
                    log.warning(
                        "tracking: %s cannot be uploaded (%s); it is kept in %s and tried again, also by the next "
                        "command that uses this run",
                        path.name,
                        first_line(error),
                        path.parent,
                    )
                self._failed.add(name)
                self._next_try = time.monotonic() + UPLOAD_SECONDS
                return
            self._uploaded.add(name)
