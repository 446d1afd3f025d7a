"""An array that goes to another process as memory which both look at, not as a copy.

A process that is forked shares what nobody writes to. One that starts afresh (spawn, or forkserver, which Python takes
from 3.14 on) gets its data pickled: LVIS's 1 GB once more for each worker of a data loader. Here it gets a file without
a name that lies in memory (memfd_create, Linux; elsewhere it is a copy), and maps it.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd

import numpy as np


class Shared:
    """`array` is not to be written to, and to be looked at anew each time: it moves when it is first sent."""

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
            self.array = _mapped(
                self._file, self.array.dtype, self.array.shape
            )  # our copy is no longer needed
        return _received, (DupFd(self._file), self.array.dtype, self.array.shape)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _file_of(array: np.ndarray) -> int:
    file = os.memfd_create("vitdet")
    os.ftruncate(file, array.nbytes)
    with mmap.mmap(file, array.nbytes) as content:
        content[:] = memoryview(np.ascontiguousarray(array)).cast("B")
    return file


def _mapped(file: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    content = mmap.mmap(file, os.fstat(file).st_size, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype).reshape(shape)


def _received(sent: object, dtype: np.dtype, shape: tuple[int, ...]) -> Shared:
    file = sent.detach()
    try:
        return Shared(_mapped(file, dtype, shape))
    finally:
        os.close(file)  # the mapping has its own
