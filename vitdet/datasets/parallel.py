"""Parallel downloads and extractions with a common progress display."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from vitdet.datasets.download import Watcher

LINGER = 10.0  # seconds for the others to end after a failure
SHORT = 0.2  # seconds for each to end after Ctrl-C
log = logging.getLogger(__name__)


class Stopped(Exception):
    """Another file has failed."""


class SharedProgress:
    """Progress of several files as one."""

    def __init__(self, bar: Watcher, total: int, stop: threading.Event) -> None:
        self.bar, self.total, self.stop = bar, total, stop
        self.done: dict[str, int] = {}
        self.lock = threading.Lock()

    def watcher(self, name: str) -> _One:
        """Return the progress display of one file."""
        return _One(self, name)


class _One:
    def __init__(self, progress: SharedProgress, name: str) -> None:
        self.progress, self.name = progress, name

    def at(self, done: int, _: int | None) -> None:
        """Report the bytes of this file."""
        every = self.progress
        if every.stop.is_set():
            raise Stopped
        with every.lock:
            every.done[self.name] = done
            every.bar.at(sum(every.done.values()), every.total)

    def end(self) -> None:
        """End the progress line, before other output."""
        with self.progress.lock:
            self.progress.bar.end()


def run_parallel(works: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run all tasks in parallel; if one fails, the others stop at their next byte, and its error is
    raised.
    """
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run(work: Callable[[], None]) -> None:
        try:
            work()
            ended.put(None)
        except Exception as error:  # any error: raised below
            ended.put(error)

    # do not wait for servers after Ctrl-C
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    failed = None
    try:
        for _ in works:
            try:
                error = ended.get(timeout=LINGER if failed else None)
            except queue.Empty:
                break  # blocked in a connection; it writes nothing afterwards
            failed = failed or error
            if failed:
                stop.set()
    finally:
        stop.set()
        for thread in threads:
            thread.join(SHORT)
    if failed:
        raise failed
