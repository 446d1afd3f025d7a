"""Training states that are written while the training goes on."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vitdet.checkpoint import Checkpoints

ABANDONED = 5.0  # seconds that a write may still take after a second Ctrl-C


class Saver:
    """Writes states in a thread, at most one at a time.

    `save` copies the tensors to host memory, so that the next step may change them, and returns. The
    copies are kept and reused: they cost as much memory as a state has bytes (16 per trained weight
    with AdamW and an average of the weights), pinned where the tensors are on a GPU. There the copying
    is queued behind the step, the next step behind it, and the thread waits for it: not this one.

    An error of the thread is raised by the next call of `check`, `save` or `wait`. At the end of the
    context the state in flight is written to its end.
    """

    def __init__(self, states: Checkpoints) -> None:
        self.states = states
        self._copies: dict[tuple, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, content: dict) -> None:
        """Start to write the state after `step` steps; first waits for the one before."""
        self.wait()
        host = self._host(content, ())
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        # a daemon, or a write to storage that hangs would keep the process from ending
        self._thread = threading.Thread(
            target=self._write, args=(step, host, copied), name="saver", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that failed."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until the state in flight is on the disk, if there is one; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(ABANDONED if issubclass(kind, KeyboardInterrupt) else None)
        self._copies.clear()

    def _write(self, step: int, content: dict, copied: torch.cuda.Event | None) -> None:
        try:
            if copied:
                copied.synchronize()
            self.states.save(step, content)
        except BaseException as error:  # raised in the main thread
            self._error = error

    def _host(self, value: Any, place: tuple) -> Any:
        """Copy nested dicts and lists and the tensors in them; place: the keys that lead there."""
        if isinstance(value, dict):
            return {key: self._host(one, (*place, key)) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._host(one, (*place, i)) for i, one in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        copy = self._copies.get(place)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = torch.empty(
                value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda
            )
            self._copies[place] = copy
        return copy.copy_(value.detach(), non_blocking=True)
