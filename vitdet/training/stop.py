"""The signals that ask a training to end: it saves its state at the next safe point and raises `Stopped`.

SIGTERM comes from Kubernetes, schedulers and torchrun, SIGINT from Ctrl-C, SIGHUP from a terminal
that is closed. torchrun passes all three on. A handler only notes the signal. All ranks then agree
on the step to stop at: each puts its note into a reduction before every step and reads the result
after it. The reduction is of all ranks, so they read the same result after the same step; it runs on
the CPU beside the step, whose gradients need the other ranks anyway, so nobody waits for it, neither
the main thread nor the GPU.
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
    """A signal came; the state is saved, and the same command goes on from it. signum: the signal."""

    def __init__(self, message: str, signum: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signum = signum


class Stop:
    """The signal that this process received, 0 if none, and what all ranks know of."""

    def __init__(self) -> None:
        self.received = 0

    def ask(self) -> Callable[[], int]:
        """Start asking all ranks; what is returned gives the signal that one of them has received, or 0.

        Without other ranks: the signal received until the result is asked for.
        """
        if distributed.world_size() == 1:
            return lambda: self.received
        return distributed.async_max(self.received)

    def check(self, message: str) -> None:
        """Raise Stopped in all ranks if one of them has received a signal; waits for all of them."""
        if signum := self.ask()():
            raise Stopped(message, signum)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note a signal; a second Ctrl-C raises KeyboardInterrupt."""
        if signum == self.received == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self.received = signum
        if signum == signal.SIGINT and distributed.rank() == 0:
            # not `log`: the handler may have interrupted it
            os.write(2, b"saving the state, then stopping; Ctrl-C again stops at once\n")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within it the signals are noted; those that the process was started to ignore stay ignored."""
    stop, previous = Stop(), {}
    try:
        for signum in SIGNALS:
            # nohup and a shell's background jobs; but torchrun passes on only what it was sent itself
            if signal.getsignal(signum) != signal.SIG_IGN or distributed.by_torchrun():
                previous[signum] = signal.signal(signum, stop.handle)
    except ValueError:  # not the main thread: signals are the caller's matter
        yield stop
        return
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def warn_of_short_grace() -> None:
    """Warn once if this torch's torchrun ends its processes 30 s after a signal, whatever is set."""
    if (
        distributed.by_torchrun()
        and distributed.rank() == 0
        and not distributed.has_shutdown_timeout()
    ):
        log.warning(
            "the torchrun of this torch kills its processes 30 s after SIGTERM, whatever "
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT and the pod's terminationGracePeriodSeconds are: a state that "
            "takes longer to save is lost with the steps since the one before; a newer torch has the setting"
        )
