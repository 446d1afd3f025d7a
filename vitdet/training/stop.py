"""SIGTERM, with which Kubernetes, schedulers and torchrun ask a process to end: a flag, and how a training answers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitdet import distributed


class Stopped(Exception):
    """SIGTERM came; the state is saved, and the same command goes on from it."""


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM only raises a flag, which the function given asks for.

    The death of torchrun counts as SIGTERM: it cannot pass a SIGKILL on, and its processes would train on unseen.
    """
    received, parent = [], os.getppid()
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread: signals are somebody else's matter
        yield lambda: False
        return
    try:
        yield lambda: bool(received) or (distributed.world_size() > 1 and os.getppid() != parent)
    finally:
        signal.signal(signal.SIGTERM, previous)
