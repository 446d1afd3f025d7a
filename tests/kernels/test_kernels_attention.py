"""The attention kernels: in Triton's interpreter, compiled for an H100, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.conftest import ROOT
from tests.helpers import parts
from tests.helpers.attention_cases import (
    CASES,
    OUTPUTS,
    Case,
    fused,
    inputs,
    reference,
    relative_errors,
    results,
)
from vitdet.config import BackboneConfig, ModelConfig
from vitdet.kernels.attention import fits
from vitdet.models import build_backbone

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def cuda(test):
    """Mark a test that needs an NVIDIA GPU, Ampere or later."""
    absent = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0)
    return pytest.mark.cuda(pytest.mark.skipif(absent, reason="needs an NVIDIA GPU")(test))


def interpreted(what):
    """Return the output of tests/helpers/attention_cases.py in Triton's interpreter."""
    words = [sys.executable, "-m", "tests.helpers.attention_cases", str(what)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("start", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_values_and_gradients_are_exact_in_the_interpreter(start):
    for case, errors in zip(CASES[start::2], interpreted(start), strict=True):
        assert max(errors) <= 2e-6, (case, dict(zip(OUTPUTS, errors, strict=True)))


@needs_triton
@pytest.mark.slow
def test_the_operator_is_registered_and_compiles_in_a_block():
    assert interpreted("operator") < 1e-5


def test_only_supported_sizes_fit_the_kernels():
    assert fits(64, 0, 64) and fits(1000, 14, 80) and not fits(64, 33, 64)
    assert not fits(129, 0, 16) and not fits(64, 0, 12) and not fits(64, 0, 136)


@needs_triton
def test_a_gpu_with_little_shared_memory_gets_fewer_stages():
    from triton.runtime.errors import OutOfResources

    from vitdet.kernels.attention_kernels import launch

    class Kernel:
        def __init__(self, most):
            self.most, self.ran = most, []

        def __getitem__(self, programs):
            def run(*tensors, num_stages):
                if num_stages > self.most:
                    raise OutOfResources(131_200, 101_376, "shared memory")
                self.ran.append((programs, tensors, num_stages))

            return run

    kernel = Kernel(2)
    launch(kernel, 3, "ab", {"num_stages": 3})
    assert kernel.ran == [((3,), ("a", "b"), 2)]
    with pytest.raises(OutOfResources):
        launch(Kernel(0), 3, "ab", {"num_stages": 2})


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("heads", "depth", "window"), [(12, 64, 0), (16, 80, 14)])
def test_kernels_compiled_for_an_h100_spill_at_most_64_bytes(heads, depth, window):
    from tests.helpers.offline import assemble, attention_launches

    found = [assemble(launch) for launch in attention_launches(heads, depth, window)]
    assert len(found) == 9
    assert not [kernel for kernel in found if kernel.spilled > 64 or kernel.shared > 227 * 1024]


CUDA_CASES = (
    Case(1, 64, 64, 12, 64),
    Case(2, 64, 64, 12, 64, window=14),
    Case(1, 50, 64, 12, 64),
    Case(1, 33, 47, 16, 80, scaled=True),
    Case(1, 37, 50, 16, 80, window=14, scaled=True),
    Case(2, 8, 8, 4, 32),
)


@cuda
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CUDA_CASES), (CUDA_CASES[-1], torch.float16)],
    ids=str,
)
def test_errors_on_a_gpu_are_no_larger_than_those_of_plain_torch(case, dtype):
    def plain(qkv, bias, rel_h, rel_w, sizes):
        return reference(qkv, *(table.to(qkv.dtype) for table in (bias, rel_h, rel_w)), sizes)

    ours, theirs = relative_errors(case, dtype, "cuda", fused, plain)
    print(case, dtype, dict(zip(OUTPUTS, zip(ours, theirs, strict=True), strict=True)))
    # The results themselves are rounded to 16 bits.
    allowed = [max(error, torch.finfo(dtype).eps) for error in theirs]
    pairs = zip(OUTPUTS, ours, allowed, strict=True)
    assert not [(name, error, limit) for name, error, limit in pairs if not error <= limit]


@cuda
def test_float32_on_a_gpu_is_exact():
    (errors,) = relative_errors(Case(1, 9, 20, 2, 32, window=7), torch.float32, "cuda", fused)
    assert max(errors) < 1e-5, errors


@cuda
@pytest.mark.parametrize("case", CUDA_CASES[:2], ids=str)
def test_results_on_a_gpu_are_deterministic(case):
    given, gradient = inputs(case, torch.bfloat16, "cuda")
    first, second = (results(fused, case, given, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@cuda
def test_a_backbone_on_a_gpu_is_as_exact_with_kernels_as_without(monkeypatch):
    """Compare the errors with and without kernels, both against float32."""
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone=BackboneConfig(name="vit_b"))).cuda().eval()
    for name, parameter in backbone.named_parameters():
        if ".rel_pos_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(1, 3, 1024, 1024, device="cuda")
    with torch.no_grad():
        exact, found = backbone(images), {}
        for switch in ("on", "off"):
            monkeypatch.setenv("VITDET_KERNELS", switch)
            with torch.autocast("cuda", torch.bfloat16):
                found[switch] = backbone(images)
    on, off = ((found[key] - exact).norm() / exact.norm() for key in ("on", "off"))
    print("error of the features with kernels", on.item(), "and without", off.item())
    assert on <= 1.1 * off < 0.1


@cuda
def test_a_block_on_a_gpu_is_compiled_captured_and_checkpointed():
    torch.manual_seed(0)
    block = parts.block(dim=128, heads=2, window=14, grid=16).cuda()
    x = torch.randn(2, 16, 16, 128, device="cuda", requires_grad=True)
    leaves = [x, *block.parameters()]

    def gradients(function):
        with torch.autocast("cuda", torch.bfloat16):
            return torch.autograd.grad(function(x).square().sum(), leaves)

    def differ(found):
        return max((a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True))

    wanted = gradients(block)
    assert differ(gradients(lambda y: checkpoint(block, y, use_reentrant=False))) == 0
    assert differ(gradients(torch.compile(block, fullgraph=True))) < 0.05
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(block)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert differ(captured) < 1e-3
