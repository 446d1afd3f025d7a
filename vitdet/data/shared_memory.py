"""Arrays that are shared with worker processes instead of copied.

Forked processes share unmodified memory. With spawn or forkserver, arrays would be pickled, e.g.
1 GB of LVIS for each worker. Instead, workers map an anonymous file in memory (memfd_create, Linux
only; on other systems the array is copied).
"""

from __future__ import annotations

import mmap
import os
import pickle
from array import array
from collections.abc import Iterable
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Shared:
    """Read-only shared array. Do not keep references to `array`: pickling replaces `array`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        return self.array[index]

    def __reduce__(self) -> tuple:
        if get_spawning_popen() is None or not self.array.size or not hasattr(os, "memfd_create"):
            return Shared, (self.array,)
        if self._file is None:
            self._file = _file_of(self.array)
            # the mapped array replaces the original, which is freed
            self.array = _mapped(self._file, self.array.dtype, self.array.shape)
        return _received, (DupFd(self._file), self.array.dtype, self.array.shape)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _file_of(array: np.ndarray) -> int:
    file = os.memfd_create("vitdet")
    os.ftruncate(file, array.nbytes)
    with mmap.mmap(file, array.nbytes) as content:
        content[:] = np.ascontiguousarray(array).tobytes()
    return file


def _mapped(file: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    content = mmap.mmap(file, os.fstat(file).st_size, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype).reshape(shape)


def _received(sent: Any, dtype: np.dtype, shape: tuple[int, ...]) -> Shared:
    file = sent.detach()
    try:
        return Shared(_mapped(file, dtype, shape))
    finally:
        os.close(file)  # the mapping keeps its own descriptor


class PackedList(Generic[T]):
    """A list that keeps its values pickled and unpickles a value on access.

    As Python objects, LVIS's polygons would occupy 6 GB in each worker, since access updates
    reference counts and thereby copies shared memory. Pickled, they occupy 1 GB, which all workers
    share. The list is read-only after it was sent to another process."""

    def __init__(self, values: Iterable[T] = ()) -> None:
        self._ends = array("q", [0])
        self._bytes = bytearray()
        self._sent: tuple[Shared, Shared] | None = None  # replaces _ends and _bytes once sent
        for value in values:
            self.append(value)

    def append(self, value: T) -> None:
        """Append a value. Raises TypeError if the list was sent to another process."""
        if self._sent is not None:
            raise TypeError("a list that was sent to another process is read-only")
        self._bytes += pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends if self._sent is None else self._sent[0]) - 1

    def __getitem__(self, index: int) -> T:
        if self._sent is None:
            return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]])
        ends, content = self._sent
        return pickle.loads(content[ends.array[index] : ends.array[index + 1]].data)

    def __getstate__(self) -> tuple[Shared, Shared]:
        if self._sent is None:
            ends, content = np.array(self._ends, np.int64), np.frombuffer(self._bytes, np.uint8)
            self._sent = Shared(ends), Shared(content)
            self._ends, self._bytes = array("q"), bytearray()
        return self._sent

    def __setstate__(self, state: tuple[Shared, Shared]) -> None:
        self._ends, self._bytes, self._sent = array("q"), bytearray(), state
