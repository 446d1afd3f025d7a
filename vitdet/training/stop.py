"""Graceful stop: on a signal, training saves its state at the next safe point and raises `Stopped`.

SIGTERM comes from Kubernetes, schedulers and torchrun, SIGINT from Ctrl-C, SIGHUP from a closed
terminal; torchrun forwards all three. The handler only records the signal. All ranks agree on the
step to stop at: before every step, they start an all-reduce of their signals, and read the result
after the step. The all-reduce runs on the CPU concurrently with the step.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vitdet import distributed

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """Raised after signal `signum`, once the state is saved; the same command resumes the run."""

    def __init__(self, message: str, signum: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signum = signum


class Stop:
    """The signal that this process received (0: none), exchanged between ranks."""

    def __init__(self) -> None:
        self.received = 0

    def ask(self) -> Callable[[], int]:
        """Start an all-reduce of the ranks' signals; return a function that waits for the result.

        With a single rank, the function returns the signal received before its call.
        """
        if distributed.world_size() == 1:
            return lambda: self.received
        return distributed.async_max(self.received)

    def check(self, message: str) -> None:
        """Raise Stopped on all ranks if any rank has received a signal; waits for all ranks."""
        if signum := self.ask()():
            raise Stopped(message, signum)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Record a signal; a second Ctrl-C raises KeyboardInterrupt."""
        if signum == self.received == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self.received = signum
        if signum == signal.SIGINT and distributed.rank() == 0:
            # not with `log`, which the handler may have interrupted
            os.write(2, b"saving the state, then stopping; Ctrl-C again stops immediately\n")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yield a `Stop` that records SIGTERM, SIGINT and SIGHUP within the context."""
    stop, previous = Stop(), {}
    try:
        for signum in SIGNALS:
            # an ignored signal, e.g. SIGHUP under nohup, stays ignored except under torchrun
            if signal.getsignal(signum) != signal.SIG_IGN or distributed.by_torchrun():
                previous[signum] = signal.signal(signum, stop.handle)
    except ValueError:  # not the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def warn_of_short_grace() -> None:
    """Warn if this version of torchrun always kills its processes 30 s after a signal."""
    is_rank0 = distributed.by_torchrun() and distributed.rank() == 0
    if is_rank0 and not distributed.has_shutdown_timeout():
        log.warning(
            "this version of torchrun kills its processes 30 s after SIGTERM, regardless of "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT and the pod's terminationGracePeriodSeconds: a state "
            "that takes longer to save is lost; newer versions of torch respect the variable"
        )
