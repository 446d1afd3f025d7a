"""Parallel downloads and extractions with a common progress display."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from vitdet.datasets.download import Watcher

LINGER = 10.0  # seconds for the others to end after a failure
SHORT = 0.2  # seconds to end after Ctrl-C


class Stopped(Exception):
    """Another file has failed."""


class SharedProgress:
    """Progress of several files as one, of `total` bytes. Raises Stopped once `stop` is set."""

    def __init__(self, bar: Watcher, total: int, stop: threading.Event) -> None:
        self.bar, self.total, self.stop = bar, total, stop
        self.done: Counter[str] = Counter()
        self.lock = threading.Lock()

    def watcher(self, name: str) -> _One:
        """Return the progress display of one file."""
        return _One(self, name)


class _One:
    def __init__(self, every: SharedProgress, name: str) -> None:
        self.every, self.name = every, name

    def at(self, done: int, _: int | None) -> None:
        every = self.every
        if every.stop.is_set():
            raise Stopped
        with every.lock:
            every.done[self.name] = done
            every.bar.at(every.done.total(), every.total)

    def end(self) -> None:
        with self.every.lock:
            self.every.bar.end()


def run_parallel(works: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run all tasks in parallel.

    If a task fails, the others stop at the next read, and the error of the failed task is raised.
    """

    def run(work: Callable[[], None], future: Future[None]) -> None:
        try:
            work()
            future.set_result(None)
        except Exception as error:  # any error: raised below
            future.set_exception(error)

    futures: list[Future[None]] = [Future() for _ in works]
    for pair in zip(works, futures, strict=True):
        # daemons: do not wait for servers after Ctrl-C
        threading.Thread(target=run, args=pair, daemon=True).start()
    try:
        done, others = wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        stop.set()
        wait(futures, SHORT)
    wait(others, LINGER)  # a thread may be blocked in a connection; it writes nothing afterwards
    for future in done:
        future.result()
