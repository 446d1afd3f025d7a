"""Handling of SIGTERM and Ctrl-C in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_stop(stopped: Callable[[], None]) -> Iterator[None]:
    """Raise SystemExit on SIGTERM; call `stopped` on SystemExit and KeyboardInterrupt."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    # signal handlers can only be set in the main thread
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopped()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
