"""Writing training states in the background."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vitdet.checkpoint import Checkpoints

ABANDONED = 5.0  # seconds to wait for a write after a second Ctrl-C


class Saver:
    """Writes training states in a background thread, one after the other.

    `save` copies the tensors to host memory, so that the next step can change them. The buffers of
    the copies are reused. They have the size of a state (16 bytes per trained weight with AdamW and
    weight averaging), and are pinned if the tensors are on a GPU. Only the background thread waits
    for copies from a GPU.

    An error in the thread is raised by the next call of `check`, `save` or `wait`. On exit from the
    context, a pending write is completed; KeyboardInterrupt limits the wait to ABANDONED seconds.
    """

    def __init__(self, states: Checkpoints) -> None:
        self.states = states
        self._copies: dict[tuple, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, content: dict) -> None:
        """Wait for the previous write, then start writing the state reached after `step` steps."""
        self.wait()
        host = self._host(content, ())
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        # a daemon thread, so that a hanging write does not prevent the process from ending
        self._thread = threading.Thread(
            target=self._write, args=(step, host, copied), name="saver", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a failed write."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until a pending state is written; raises the error of a failed write."""
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
        except BaseException as error:  # `check` raises the error in the main thread
            self._error = error

    def _host(self, value: Any, path: tuple) -> Any:
        """Copy tensors in nested dicts and lists to host memory; path: the keys down to `value`."""
        if isinstance(value, dict):
            return {key: self._host(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._host(item, (*path, i)) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        copy = self._copies.get(path)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[path] = copy
        return copy.copy_(value.detach(), non_blocking=True)
