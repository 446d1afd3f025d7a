"""Memory of the main process over many evaluations."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Recorder, environment
from tests.helpers.runs import go

HOLES = """
import numpy as np
from vitdet.data.loader import configure_process, release_memory
def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
configure_process()
blocks = [np.ones(1 << 20, np.uint8) for _ in range(200)]
full = held()
blocks = blocks[::20]  # kept blocks lie between freed blocks
freed = held()
release_memory()
print(full, freed, held())
"""


def resident() -> int:
    """Return the anonymous resident memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_fragmented_free_memory_is_released(tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", HOLES], env=environment(tmp_path), capture_output=True, text=True
    )
    full, freed, released = map(int, printed.stdout.split())
    assert freed > full - 20_000 and released < full - 150_000  # KB


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_does_not_grow_with_the_number_of_evaluations(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def after(values: dict[str, float], _: int) -> None:
        if "loss" in values:
            gc.collect()
            seen.append((resident(), len(gc.get_objects())))

    go(tiny, tmp_path, Recorder(after), optim__steps=12, train__eval_every=1)
    early, last = seen[4], seen[-1]
    assert last[0] - early[0] < 16, seen
    assert last[1] - early[1] < 2000, seen
