"""A long list as one array of bytes."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class PackedList(Generic[T]):
    """Values of our own making, packed as they come and unpacked one at a time.

    As objects the polygons of LVIS take 6 GB, and each worker process in time a copy of them: looking at a Python
    object writes to it (its reference count). Packed they take 1 GB, which all workers of a process share.
    """

    def __init__(self, values: Iterable[T] = ()) -> None:
        self._ends = array("q", [0])
        self._bytes = bytearray()
        for value in values:
            self.append(value)

    def append(self, value: T) -> None:
        """Adds a value at the end."""
        self._bytes += pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> T:
        with memoryview(self._bytes) as content:
            return pickle.loads(content[self._ends[index] : self._ends[index + 1]])
