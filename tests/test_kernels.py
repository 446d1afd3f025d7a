"""Where the Triton kernels run, and what the log says about it."""

from types import SimpleNamespace

import pytest
import torch

from vitdet import kernels


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU; gpu(capability) says which."""
    monkeypatch.delenv("VITDET_KERNELS", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(kernels, "find_spec", lambda _: object())
    kernels._missing.cache_clear()
    yield lambda *capability: monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _: capability
    )
    kernels._missing.cache_clear()


def test_tensors_on_the_cpu_take_the_plain_path():
    assert not kernels.enabled(torch.zeros(1))


def test_a_gpu_from_ampere_on_runs_them(gpu):
    gpu(8, 0)
    assert kernels._runs_on(0)
    assert kernels.describe() == f"Triton kernels on (NVIDIA H100): {', '.join(kernels.NAMES)}"


def test_float64_takes_the_plain_path(gpu):
    gpu(9, 0)
    one, other = (
        SimpleNamespace(is_cuda=True, dtype=kind, device=torch.device("cuda:0"))
        for kind in (torch.float32, torch.float64)
    )
    assert kernels.enabled(one) and not kernels.enabled(one, other)


def test_an_older_gpu_does_not(gpu):
    gpu(7, 5)
    assert not kernels._runs_on(0)
    assert kernels.describe() == "Triton kernels off: compute capability 7.5, they need 8.0"


def test_rocm_takes_the_plain_path(gpu, monkeypatch):
    gpu(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.describe() == "Triton kernels off: ROCm is untested"


def test_without_triton_they_are_off(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert kernels.describe() == "Triton kernels off: triton is not installed"


def test_they_can_be_turned_off(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setenv("VITDET_KERNELS", "off")
    assert not kernels._runs_on(0)
    assert kernels.describe() == "Triton kernels off: VITDET_KERNELS=off"
    monkeypatch.setenv("VITDET_KERNELS", "0")
    with pytest.raises(ValueError, match="VITDET_KERNELS must be on or off, got '0'"):
        kernels._runs_on(0)


def test_a_compiler_does_not_look_inside(monkeypatch):
    monkeypatch.setattr(kernels, "_obstacle", lambda _: None)

    def function(x):
        return x + 1 if kernels._runs_on(0) else x

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1
