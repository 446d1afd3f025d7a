"""The journal of a run on disk: its records for the tracking server, and which of them were sent.

FOLDER/journal/KEY.jsonl grows by one line per event: the run's start, points, files, its end. KEY.json is the cursor:
the run's id on the server, the offset of the first line that still has to be sent, and the lines of files before it that
are still to be uploaded. KEY/ contains copies of these files. A line is one unbuffered write, so a killed process loses none; this module uses the standard library only.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vitdet.files import is_abandoned, locked, write_json, writer

log = logging.getLogger(__name__)

PENDING = "pending-"  # a run id of ours, until a server has given one


class Journal:
    """One run's lines: {"start": {...}}, {"points": {name: value}, "step"}, {"file", "folder"}, {"resume", "changed"},
    {"tags"}, {"end"}.

    Each line also contains its time in ms since 1970.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = Path(folder).resolve(), key
        self.path = self.folder / "journal" / f"{key}.jsonl"
        self._cursor = self.path.with_suffix(".json")

    @property
    def run_id(self) -> str:
        """The server's id of the run, or `pending-...` until one has answered; `find` knows both."""
        return self.cursor()[0] or PENDING + self.key

    def append(self, record: dict) -> None:
        """One more line; a full disk costs the line and a warning, not the training."""
        line = (json.dumps({**record, "time": int(time.time() * 1000)}) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) != len(line):
                    file.truncate(size)
                    raise OSError("the disk is full")
        except OSError as error:
            log.warning("tracking: cannot write %s, a record is lost: %s", self.path, error)

    def append_file(self, path: Path, folder: str) -> None:
        """A file for this folder of the run's artifacts; a copy waits, so the original may change or go."""
        folder_name = f".{uuid.uuid4().hex[:8]}.{writer()}.tmp"
        copy = self.path.with_suffix("") / folder_name / Path(path).name
        try:
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            log.warning("tracking: %s is not logged: %s", path, error)
            return
        self.append({"file": str(copy.relative_to(self.path.parent)), "folder": folder})

    def start(self) -> dict | None:
        """What the run is, from its first line: experiment, name, params, tags, dataset, time."""
        for record, _ in self.records():
            if "start" in record:
                return {**record["start"], "time": record["time"]}
        return None

    def last_steps(self) -> dict[str, int]:
        """The last step of each name."""
        return {
            key: record["step"] for record, _ in self.records() for key in record.get("points", ())
        }

    def last_value(self, key: str) -> float:
        """Return the last value of a metric, 0 without one."""
        value = 0.0
        for record, _ in self.records():
            value = record.get("points", {}).get(key, value)
        return value

    def records(self, offset: int = 0) -> Iterator[tuple[dict, int]]:
        """(record, offset behind it) of each whole line from this offset on."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                # being written, or the machine went down: `repair` ends it
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line), offset
                except ValueError:
                    log.warning("tracking: %s: an unreadable line is skipped", self.path)

    def batches(self, most: int) -> Iterator[tuple[list[dict], int]]:
        """What waits, with the offset behind it: neighbouring points together (at most so many), the rest alone."""
        batch: list[dict] = []
        size, offset = 0, self.cursor()[1]
        for record, end in self.records(offset):
            points = len(record.get("points", ()))
            alone = not points or not size or "renew" in record or "renew" in batch[-1]
            if batch and (alone or size + points > most):
                yield batch, offset
                batch, size = [], 0
            batch.append(record)
            size, offset = size + points, end
        if batch:
            yield batch, offset

    def waiting(self) -> bool:
        """Whether any lines were not sent yet, apart from files to upload."""
        return next(self.records(self.cursor()[1]), None) is not None

    def cursor(self) -> tuple[str | None, int]:
        """(the run's id on the server or None, offset of the first line to send)."""
        cursor = self._read_cursor()
        return cursor["run_id"], cursor["offset"]

    def uploads(self) -> list[dict]:
        """The lines before the cursor whose files are still to be uploaded."""
        return self._read_cursor().get("uploads", [])

    def move(self, run_id: str | None, offset: int, uploads: list[dict] | None = None) -> None:
        """Set the cursor. uploads: see the method of that name; None: unchanged."""
        uploads = self.uploads() if uploads is None else uploads
        cursor = {"run_id": run_id, "offset": offset}
        write_json(self._cursor, cursor | ({"uploads": uploads} if uploads else {}))

    def _read_cursor(self) -> dict:
        if not self._cursor.exists():
            return {"run_id": None, "offset": 0}
        return json.loads(self._cursor.read_text())

    def state(self) -> tuple[dict, str]:
        """The last line of the run's start, of a resumption or its end, and the changed settings of the last resumption."""
        last, changed = {}, ""
        for record, _ in self.records():
            if record.keys() & {"start", "resume", "end"}:
                last = record
            changed = record.get("changed", changed)
        return last, changed

    def remove(self) -> None:
        """Removes all of it, of a run that no server has."""
        for path in (self.path, self._cursor, self.path.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path.with_suffix(""), ignore_errors=True)
        with suppress(OSError):  # not empty
            self.path.parent.rmdir()

    def repair(self) -> None:
        """Ends a line that was left half-written; removes the copies of files that a killed process did not journal."""
        lines = [record for record, _ in self.records(self.cursor()[1])] + self.uploads()
        waiting = {Path(record["file"]).parent.name for record in lines if "file" in record}
        for copy in self.path.with_suffix("").glob("*"):
            if copy.name not in waiting and is_abandoned(copy):
                shutil.rmtree(copy, ignore_errors=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "ab", buffering=0) as file:
                file.write(b"\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While one process ships; raises BlockingIOError in the others."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path.with_suffix(".lock")))
            except BlockingIOError as error:
                raise BlockingIOError("another process is sending them") from error
            yield


def find(folder: Path, run_id: str | None) -> Journal:
    """The journal of a run, by the server's id or the pending one; a new journal where there is none."""
    for journal in journals(folder) if run_id else ():
        if run_id in (PENDING + journal.key, journal.cursor()[0]):
            journal.repair()
            return journal
    journal = Journal(folder, uuid.uuid4().hex)
    if run_id and not run_id.startswith(PENDING):
        journal.move(run_id, 0)
    return journal


def journals(folder: Path) -> list[Journal]:
    """All journals of a work folder."""
    return [
        Journal(folder, path.stem) for path in sorted((Path(folder) / "journal").glob("*.jsonl"))
    ]


def unfinished(folder: Path, output: str, params: dict) -> str | None:
    """The run of an earlier start in this output that has no metrics yet; others that were killed are ended."""
    found = None
    for journal in journals(folder):
        start = journal.start() or {}
        if start.get("output") != output or journal.state()[0].get("end") == "FINISHED":
            continue
        if start["params"] == params and not journal.last_steps():
            found = PENDING + journal.key
        elif "end" not in journal.state()[0]:
            journal.repair()
            journal.append({"end": "KILLED"})
    return found
