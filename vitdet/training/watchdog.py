"""Watchdog: if a rank stalls, all ranks exit, so that torchrun restarts them.

The main thread of each rank records its progress as a step and a `Stage`; another thread publishes
it every INTERVAL seconds in torchrun's store and reads the progress of the other ranks. All ranks
wait for the rank that is furthest behind. If that rank exceeds the time limit of its stage, every
rank writes its Python stacks and exits. A rank that stops publishing (e.g. its node is lost, or a
call holds the GIL) is reported with its last progress. faulthandler does not need the GIL to write
the stacks of a rank.

The limit is LIMIT seconds or, if longer, three times the duration of the previous step or batch.
It is at least LONG seconds for long stages, such as the first step.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from enum import IntEnum

from vitdet import distributed
from vitdet.training.stop import Stop, Stopped

INTERVAL = 5.0  # seconds between two publications of a rank's progress
LIMIT = 240.0  # seconds without progress or without a publication
LONG = distributed.COLLECTIVE_TIMEOUT.total_seconds()
ANSWER = 15.0  # seconds for the other ranks to write their stacks


class Stage(IntEnum):
    """What a rank is doing; the values increase in the order of a step's stages."""

    PREPARING = 0  # reading the data, building the model
    LOADING = 1
    COMPUTING = 2
    EXCHANGING = 3  # averaging the gradients of all ranks, during or after the backward pass
    SAVING = 4
    EVALUATING = 5
    COMPARING = 6  # comparing detections with the ground truth, on rank 0
    FINISHING = 7
    WAITING = 8  # waiting for other ranks, in a collective


@dataclass(frozen=True)
class Beat:
    """The published progress of a rank: step, stage, seconds in this stage, time limit."""

    step: int
    stage: int
    age: float
    limit: float
    host: str = ""
    pid: int = 0
    number: int = 0  # sequence number of the publication
    received: int = 0  # the signal that the rank received, or 0
    doing: str = ""
    done: bool = False
    silent: float = 0.0  # seconds since the publication, by the reader's clock

    @property
    def place(self) -> tuple[int, int]:
        """Return the sort key of this rank; the rank with the smallest key is furthest behind."""
        return self.step, self.stage

    def __str__(self) -> str:
        doing = self.doing or Stage(self.stage).name.lower()
        heard = f", last heard from {self.silent:.0f} s ago" if self.silent > LIMIT else ""
        place = f"{self.host}, pid {self.pid}: step {self.step}"
        return f"{place}, {doing} for {self.age + self.silent:.0f} s{heard}"


def stalled(beats: Mapping[int, Beat]) -> list[int]:
    """Return the ranks that cause a stall; [] if there is no stall."""
    running = {rank: beat for rank, beat in beats.items() if not beat.done}
    if silent := [rank for rank, beat in running.items() if beat.silent > LIMIT]:
        return silent
    place = min((beat.place for beat in running.values()), default=None)
    behind = {rank: beat for rank, beat in running.items() if beat.place == place}
    late = all(beat.age + beat.silent > beat.limit for beat in behind.values())
    return list(behind) if late else []


class Watchdog:
    """Watches all ranks from a thread; the main thread calls `start`, `at` and `finish`."""

    def __init__(self, stop: Stop) -> None:
        self._stop, self._parent = stop, os.getppid()
        self._place = (0, Stage.PREPARING, LONG, time.monotonic())
        # first stage and start time of the current step or evaluation batch
        self._round = Stage.PREPARING, time.monotonic()
        self._paces: dict[Stage, float] = {}  # first stage -> seconds of last step or batch
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}  # rank -> time of its last publication
        self._number, self._orphaned = 0, 0.0
        self._rank, self._shared, self._prefix = 0, False, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching; must be called on all ranks."""
        self._rank, self._shared = distributed.rank(), distributed.has_joined()
        # after a restart, torchrun's store still contains the keys of the previous processes
        self._prefix = distributed.rank0_result(lambda: uuid.uuid4().hex)
        ranks, starting = range(distributed.world_size()), Beat(0, 0, 0.0, LONG, doing="starting")
        self._beats = dict.fromkeys(ranks, starting)
        self._heard = dict.fromkeys(ranks, time.monotonic())
        self._thread.start()

    def at(self, step: int, stage: Stage, limit: float = 0.0) -> None:
        """Record the main thread's progress. limit: seconds, for a stage that may exceed LIMIT."""
        now = time.monotonic()
        if stage not in (Stage.COMPUTING, Stage.EXCHANGING):  # a new step or batch
            before, began = self._round
            self._paces[before] = now - began
            self._round = stage, now
        pace = self._paces.get(self._round[0], 0.0)
        self._place = step, stage, max(limit, LIMIT, 3 * pace), now

    def finish(self) -> None:
        """Stop watching and publish that this rank has finished."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(2 * INTERVAL)

    def beat(self) -> Beat:
        """Return the current progress of the main thread."""
        step, stage, limit, since = self._place
        name, changed = distributed.collective()
        age, doing = time.monotonic() - max(since, changed), ""
        if name:
            stage, limit = Stage.WAITING, LONG
            doing = f"waiting for the other ranks in a {name}"
        process = (socket.gethostname(), os.getpid(), self._number, self._stop.received)
        return Beat(step, stage, age, limit, *process, doing, self._end.is_set())

    def _run(self) -> None:
        store, last = None, time.monotonic()
        answered = last
        while not self._end.wait(INTERVAL):
            now = time.monotonic()
            if now - last > LIMIT / 2:  # this process was frozen, perhaps with all other ranks
                answered = now
                self._heard = dict.fromkeys(self._heard, now)
            self._watch_parent(now)
            try:
                if self._shared and not self._orphaned:  # else a single rank, or torchrun has ended
                    faulthandler.dump_traceback_later(LIMIT, file=2)
                    timeout = timedelta(seconds=3 * INTERVAL)
                    store = store or distributed.connect(self._prefix, timeout)
                    self._exchange(store)
                    answered = time.monotonic()
            except RuntimeError as error:  # network errors in torch
                store = None
                if time.monotonic() - answered > LIMIT:
                    self._give_up(None, f"torchrun's store on rank 0 does not respond: {error}")
            last = time.monotonic()
        if self._shared:
            faulthandler.cancel_dump_traceback_later()
        with suppress(RuntimeError):  # rank 0's node may have shut down the store
            if store is not None and not self._orphaned:
                self._publish(store)

    def _watch_parent(self, now: float) -> None:
        """Treat the end of torchrun as SIGTERM: a killed torchrun cannot forward a signal."""
        # a single process without torchrun may outlive its parent
        started = distributed.world_size() > 1 or distributed.by_torchrun()
        if not started or os.getppid() == self._parent:
            return
        self._stop.received = self._stop.received or signal.SIGTERM
        self._orphaned = self._orphaned or now
        if now - self._orphaned > LIMIT:
            text = f"torchrun has ended, but this rank did not stop within {LIMIT:.0f} s"
            self._give_up(None, text)

    def _publish(self, store: distributed.Store) -> None:
        self._number += 1
        store.set(f"beat {self._rank}", json.dumps(asdict(self.beat())))

    def _exchange(self, store: distributed.Store) -> None:
        self._publish(store)
        now = time.monotonic()
        keys = {rank: f"beat {rank}" for rank in self._beats}
        known = [n for n, beat in self._beats.items() if beat.number or store.check([keys[n]])]
        contents = store.multi_get([keys[rank] for rank in known])
        for rank, content in zip(known, contents, strict=True):
            beat = Beat(**json.loads(content))
            if beat.number != self._beats[rank].number:
                self._heard[rank], self._beats[rank] = now, beat
        for rank, heard in self._heard.items():
            self._beats[rank] = replace(self._beats[rank], silent=now - heard)
        signals = [beat.received for beat in self._beats.values()]
        self._stop.received = self._stop.received or max(signals)
        if store.check(["verdict"]):
            self._give_up(store, "")
        elif late := stalled(self._beats):
            first = store.add("verdict", 1) == 1
            self._give_up(store, self._verdict(late) if first else "")

    def _verdict(self, late: list[int]) -> str:
        names = ", ".join(f"rank {rank} ({self._beats[rank]})" for rank in late)
        others = [f"rank {rank}: {beat}" for rank, beat in self._beats.items() if rank not in late]
        restart = "torchrun restarts them from the last state if restarts are left"
        return "\n".join([f"no progress: {names}; ending all ranks; {restart}", *others])

    def _give_up(self, store: distributed.Store | None, message: str) -> None:
        """Write the message and this rank's stacks, wait for the other ranks' stacks, and exit."""
        lines = [f"vitdet: {message}\n"] if message else []
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            # prefix each line with the rank, since all ranks may share standard error
            lines += [f"[rank{self._rank}]: {line}" for line in file]
        if record := distributed.flight_record():
            lines.append(f"[rank{self._rank}]: NCCL's collectives in flight: {record}\n")
        os.write(2, "".join(lines).encode())
        with suppress(RuntimeError):  # some ranks may not respond
            if store is not None:
                store.set(f"written {self._rank}", "")
                answering = [rank for rank, beat in self._beats.items() if beat.silent <= LIMIT]
                store.wait([f"written {rank}" for rank in answering], timedelta(seconds=ANSWER))
        os._exit(1)


@contextmanager
def watching(stop: Stop) -> Iterator[Watchdog]:
    """Watch the ranks within the context, if torchrun started them or there are at least two."""
    watchdog = Watchdog(stop)
    if distributed.by_torchrun() or distributed.has_joined():
        watchdog.start()
    try:
        yield watchdog
    except Stopped:
        watchdog.finish()
        raise
    # skipped after other errors: the other ranks' watchdogs must notice that this rank ended
    watchdog.finish()
