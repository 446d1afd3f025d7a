"""Parallel downloads and extractions with a common progress display."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from vitdet.datasets.download import Watcher

LINGER = 10.0  # maximum seconds to wait for running tasks after another task has failed
SHORT = 0.2  # maximum seconds to wait for running tasks after Ctrl-C


class Stopped(Exception):
    """Raised in a running task after another task has failed."""


class SharedProgress:
    """A progress display shared by several files; `total` is the sum of their sizes in bytes."""

    def __init__(self, bar: Watcher, total: int, stop: threading.Event) -> None:
        self.bar, self.total, self.stop = bar, total, stop
        self.done: Counter[str] = Counter()
        self.lock = threading.Lock()

    def watcher(self, name: str) -> _FileProgress:
        """Return the progress display of one file."""
        return _FileProgress(self, name)


class _FileProgress:
    def __init__(self, shared: SharedProgress, name: str) -> None:
        self.shared, self.name = shared, name

    def at(self, done: int, _: int | None) -> None:
        shared = self.shared
        if shared.stop.is_set():
            raise Stopped
        with shared.lock:
            shared.done[self.name] = done
            shared.bar.at(shared.done.total(), shared.total)

    def end(self) -> None:
        with self.shared.lock:
            self.shared.bar.end()


def run_parallel(tasks: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run all tasks in parallel; raise the error of a task that fails.

    After a failure, `stop` is set; tasks with a `SharedProgress` end at their next progress report.
    """

    def run(task: Callable[[], None], future: Future[None]) -> None:
        try:
            task()
            future.set_result(None)
        except Exception as error:  # re-raised in the calling thread
            future.set_exception(error)

    futures: list[Future[None]] = [Future() for _ in tasks]
    for pair in zip(tasks, futures, strict=True):
        # daemon threads, so that the process does not wait for a server after Ctrl-C
        threading.Thread(target=run, args=pair, daemon=True).start()
    try:
        done, others = wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        stop.set()
        wait(futures, SHORT)
    wait(others, LINGER)  # a task blocked in a read ends at its next progress report
    for future in done:
        future.result()
