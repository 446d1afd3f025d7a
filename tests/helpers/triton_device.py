"""The device of the Triton kernels in tests: the GPU, or the CPU with TRITON_INTERPRET=1.

The interpreter must be enabled before Triton is imported, so the kernels' tests are skipped in a
process without it or a GPU; tests/kernels/test_kernels_without_gpu.py runs them with the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton has neither a GPU nor its interpreter here"
)
# tests of torch.library.opcheck; compiled graphs only on a GPU, as the interpreter is slow
REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor") + (
    ("test_aot_dispatch_dynamic",) if DEVICE == "cuda" else ()
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise RuntimeError for operations that make the host wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
