"""The device of the Triton kernels in tests: the GPU, or the CPU with TRITON_INTERPRET=1.

The interpreter has to be chosen before Triton is imported, so the kernels' tests are skipped in a
process that has neither; tests/kernels/test_kernels_without_gpu.py runs them in one that has it.
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
# tests of torch.library.opcheck; compiled graphs on a GPU only, as they are slow in the interpreter
REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor") + (
    ("test_aot_dispatch_dynamic",) if DEVICE == "cuda" else ()
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


@contextmanager
def no_waits() -> Iterator[None]:
    """Within it, an operation that makes the host wait for the GPU raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
