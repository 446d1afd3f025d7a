"""The tests of the Triton kernels, in a process in which Triton's interpreter runs them on the CPU."""

import os
import subprocess
import sys

from tests.conftest import ROOT

FILES = ("nms", "paste", "roi_align", "rasterize")


def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda"]
        + [f"tests/test_kernels_{name}.py" for name in FILES],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
