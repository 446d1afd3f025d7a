"""The detection kernels without a GPU: in Triton's interpreter, and compiled for an H100."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.conftest import ROOT

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
FILES = ("nms", "paste", "roi_align", "rasterize")


@needs_triton
@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_tests_of_the_kernels_pass_in_the_interpreter(speed):
    options = ["-q", "-p", "no:cacheprovider", "-m", f"not cuda and {speed}"]
    files = [f"tests/kernels/test_kernels_{name}.py" for name in FILES]
    words = [sys.executable, "-m", "pytest", *options, *files]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@needs_triton
def test_kernels_compiled_for_an_h100_do_not_spill_registers():
    from tests.helpers.offline import assemble, detection_launches

    found = [assemble(launch) for launch in detection_launches(torch.bfloat16)]
    assert len(found) == 9
    assert not [kernel for kernel in found if kernel.spilled or kernel.shared > 227 * 1024]
