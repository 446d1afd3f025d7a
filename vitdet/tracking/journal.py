"""The journal: a file with the records of a run that are sent to the tracking server.

FOLDER/journal/KEY.jsonl contains one record per line, e.g. the start of the run, metrics, or the
end of the run. KEY.json is the cursor: the run's ID on the server, the IDs of earlier runs that
were created from the same records, and the byte offset of the first line that has not been sent.
KEY.files/ contains copies of files that have not been uploaded.
Each line is written without buffering, so that no record is lost if the process is killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from vitdet.files import atomic_dir, locked, write_json

log = logging.getLogger(__name__)

PENDING = "pending-"  # prefix of the run's ID until a server has assigned an ID


class Journal:
    """The records of one run, each with its `time` in milliseconds since 1970.

    Each record also contains one of: `start`; `tags`; `end` (optionally `ended`); `points`
    ({metric: value}) and `step` (optionally `renew`); `resume` and `changed`; `file` and `folder`
    (only in journals of earlier versions).
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = Path(folder).resolve(), key
        self.path = self.folder / "journal" / f"{key}.jsonl"
        self.files = self.path.with_suffix(".files")
        self._cursor = self.path.with_suffix(".json")

    @property
    def run_id(self) -> str:
        """The run's ID on the server, or `pending-KEY` until a server has assigned an ID."""
        return self.cursor()[0] or PENDING + self.key

    def append(self, record: dict) -> None:
        """Append a record. If it cannot be written, it is lost and a warning is logged."""
        line = (json.dumps({**record, "time": int(time.time() * 1000)}) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # the last write was interrupted
                        line = b"\n" + line
                if file.write(line) != len(line):
                    file.truncate(size)
                    raise OSError("the disk is full")
        except OSError as error:
            log.warning("tracking: cannot write %s; a record was lost: %s", self.path, error)

    def append_file(self, path: Path, folder: str) -> None:
        """Copy a file to KEY.files/, to be uploaded to the run's artifact folder `folder`."""
        try:
            self._copy(path, folder)
        except OSError as error:
            log.warning("tracking: %s was not logged: %s", path, error)

    def adopt(self, record: dict) -> None:
        """Move the file of a record, written by an earlier version of vitdet, to KEY.files/."""
        copy = self.path.parent / record["file"]
        if copy.exists():
            self._copy(copy, record["folder"])
            shutil.rmtree(copy.parent)

    def entries(self) -> list[Path]:
        """Return the folders in KEY.files/. Each contains one file, at its artifact path."""
        for record in self._read_cursor().get("uploads", ()):  # from earlier versions of vitdet
            with suppress(OSError):
                self.adopt(record)
        return sorted(self.files.glob("[!.]*"))

    def start(self) -> dict | None:
        """Return the start record (experiment, name, params, tags, dataset, time, ...), if any."""
        for record, _ in self.records():
            if "start" in record:
                return {**record["start"], "time": record["time"]}
        return None

    def last_points(self) -> dict[str, tuple[int, float]]:
        """Return {metric: (step, value)} with the last value of each metric."""
        return {
            key: (record["step"], value)
            for record, _ in self.records()
            for key, value in record.get("points", {}).items()
        }

    def state(self) -> tuple[dict, str]:
        """Return the last start, resume or end record, and `changed` of the last resume record."""
        last, changed = {}, ""
        for record, _ in self.records():
            if record.keys() & {"start", "resume", "end"}:
                last = record
            changed = record.get("changed", changed)
        return last, changed

    def records(self, offset: int = 0) -> Iterator[tuple[dict, int]]:
        """Yield (record, offset of the next line) for each complete line, starting at `offset`."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n"):  # still being written
                    return
                try:
                    yield json.loads(line), offset
                except ValueError:
                    log.warning("tracking: %s: an unreadable line is skipped", self.path)

    def batches(self, max_points: int) -> Iterator[tuple[list[dict], int]]:
        """Yield (batch of records to send, offset of the line after the batch).

        Consecutive records of metrics are combined up to `max_points` values. Each record with
        `renew` or without metrics is a separate batch.
        """
        batch: list[dict] = []
        size, offset = 0, self.cursor()[1]
        for record, end in self.records(offset):
            points = len(record.get("points", ()))
            alone = not points or not size or "renew" in record or "renew" in batch[-1]
            if batch and (alone or size + points > max_points):
                yield batch, offset
                batch, size = [], 0
            batch.append(record)
            size, offset = size + points, end
        if batch:
            yield batch, offset

    def waiting(self) -> bool:
        """Return whether any records have not been sent."""
        return next(self.records(self.cursor()[1]), None) is not None

    def cursor(self) -> tuple[str | None, int]:
        """Return the run's ID on the server, if any, and the offset of the first line to send."""
        cursor = self._read_cursor()
        return cursor["run_id"], cursor["offset"]

    def move(self, run_id: str | None, offset: int) -> None:
        """Store the run's ID on the server, if any, and the offset of the first line to send."""
        earlier = [name for name in self.run_ids() if name != run_id]
        new = {"run_id": run_id, "earlier": earlier, "offset": offset}
        write_json(self._cursor, self._read_cursor() | new)

    def run_ids(self) -> list[str]:
        """Return the run's ID on the server, if any, and the IDs of earlier runs."""
        cursor = self._read_cursor()
        return [name for name in (cursor["run_id"], *cursor.get("earlier", ())) if name]

    def _read_cursor(self) -> dict:
        if not self._cursor.exists():
            return {"run_id": None, "offset": 0}
        return json.loads(self._cursor.read_text())

    def _copy(self, path: Path, folder: str) -> None:
        with atomic_dir(self.files / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}") as entry:
            (entry / folder).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, entry / folder / Path(path).name)

    def remove(self) -> None:
        """Remove all files of the journal."""
        for path in (self.path, self._cursor, self.path.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        for folder in (self.files, self.path.with_suffix("")):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty
            self.path.parent.rmdir()

    def locked(self) -> AbstractContextManager[None]:
        """Lock the journal for sending; raises BlockingIOError if it is already locked."""
        return locked(self.path.with_suffix(".lock"))


def find(folder: Path, run_id: str | None) -> Journal:
    """Return the journal of the run with this (server or pending) ID, or a new journal.

    Checkpoints that were saved before the run was created again contain an earlier ID.
    """
    for journal in journals(folder) if run_id else ():
        if run_id in (PENDING + journal.key, *journal.run_ids()):
            return journal
    journal = Journal(folder, uuid.uuid4().hex)
    if run_id and not run_id.startswith(PENDING):
        journal.move(run_id, 0)
    return journal


def journals(folder: Path) -> list[Journal]:
    """Return all journals in FOLDER/journal."""
    paths = sorted((Path(folder) / "journal").glob("*.jsonl"))
    return [Journal(folder, path.stem) for path in paths]


def unfinished(folder: Path, output: str, params: dict) -> str | None:
    """Return `pending-KEY` of an unfinished run with this output and params but no metrics.

    Returns None if no run matches. Marks other runs with this output as KILLED unless they ended.
    """
    found = None
    for journal in journals(folder):
        start = journal.start() or {}
        if start.get("output") != output:
            continue
        last, _ = journal.state()  # reads the whole file
        if last.get("end") == "FINISHED":
            continue
        if start["params"] == params and not journal.last_points():
            found = PENDING + journal.key
        elif "end" not in last:
            journal.append({"end": "KILLED"})
    return found
