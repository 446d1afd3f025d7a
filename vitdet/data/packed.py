"""A long list as one array of bytes."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np

from vitdet.data.shared import Shared

T = TypeVar("T")


class PackedList(Generic[T]):
    """Values of our own making, packed as they come and unpacked one at a time.

    As objects the polygons of LVIS take 6 GB, and each worker process in time a copy of them: looking at a Python
    object writes to it (its reference count). Packed they take 1 GB, which all workers of a process share. Once sent
    to one, the list takes no more values.
    """

    def __init__(self, values: Iterable[T] = ()) -> None:
        self._ends: array[int] | Shared = array("q", [0])
        self._bytes: bytearray | Shared = bytearray()
        for value in values:
            self.append(value)

    def append(self, value: T) -> None:
        """Adds a value at the end."""
        self._bytes += pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> T:
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]])

    def __getstate__(self) -> tuple[Shared, Shared]:
        if not isinstance(self._bytes, Shared):
            self._ends = Shared(np.frombuffer(self._ends, np.int64))
            self._bytes = Shared(np.frombuffer(self._bytes, np.uint8))
        return self._ends, self._bytes

    def __setstate__(self, state: tuple[Shared, Shared]) -> None:
        self._ends, self._bytes = state
