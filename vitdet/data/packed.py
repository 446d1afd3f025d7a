"""A long list as one array of bytes."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class PackedList(Generic[T]):
    """Values of our own making, unpacked one at a time.

    As objects the annotations of LVIS take 6 GB, and each worker process in time a copy of them: looking at a Python
    object writes to it (its reference count). Packed they take 1 GB, which all workers of a process share.
    """

    def __init__(self, values: Iterable[T]) -> None:
        pieces = [pickle.dumps(value, pickle.HIGHEST_PROTOCOL) for value in values]
        self._ends = np.cumsum([0, *map(len, pieces)])
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> T:
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]].data)
