"""Selection of the Triton kernels by device, and CUDA graphs."""

from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from vitdet import kernels
from vitdet.kernels import attention, nms, rasterize, roi_align
from vitdet.kernels.cuda_graph import LIMIT, CudaGraph, NoRoom, NotRecorded, OutOfMemory


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU; gpu(capability) sets its compute capability."""
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


def test_cpu_tensors_use_the_plain_path():
    assert not kernels.enabled(torch.zeros(1))


def test_ampere_and_later_gpus_run_the_kernels(gpu):
    gpu(8, 0)
    assert kernels._runs_on(0)
    assert kernels.describe() == f"Triton kernels on (NVIDIA H100): {', '.join(kernels.NAMES)}"


def test_float64_uses_the_plain_path(gpu):
    gpu(9, 0)
    first, other = (
        SimpleNamespace(is_cuda=True, dtype=kind, device=torch.device("cuda:0"))
        for kind in (torch.float32, torch.float64)
    )
    assert kernels.enabled(first) and not kernels.enabled(first, other)


@pytest.mark.parametrize(
    ("capability", "hip", "spec", "reason"),
    [
        ((7, 5), None, True, "compute capability 7.5 is below 8.0"),
        ((9, 4), "6.4", True, "ROCm is untested"),
        ((9, 0), None, None, "triton is not installed"),
    ],
)
def test_unsupported_devices_use_the_plain_path(gpu, monkeypatch, capability, hip, spec, reason):
    gpu(*capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(kernels, "find_spec", lambda _: spec)
    assert not kernels._runs_on(0) and kernels.describe() == f"Triton kernels off: {reason}"


def test_the_kernels_can_be_turned_off(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setenv("VITDET_KERNELS", "off")
    assert not kernels._runs_on(0)
    assert kernels.describe() == "Triton kernels off: VITDET_KERNELS=off"
    monkeypatch.setenv("VITDET_KERNELS", "0")
    with pytest.raises(ValueError, match="VITDET_KERNELS must be on or off, got '0'"):
        kernels._runs_on(0)


def test_a_compiled_function_may_select_the_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_obstacle", lambda _: None)

    def function(x):
        return x + 1 if kernels._runs_on(0) else x

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


def zeros(*shape):
    return torch.zeros(shape)


QKV = zeros(1, 4, 48), zeros(48), zeros(3, 16), zeros(3, 16)  # 2 x 2 tokens, a 16-channel head
MAP, BOXES, NUMBERS = zeros(1, 8, 4, 4), zeros(1, 4), torch.zeros(1, dtype=torch.int64)
# a call of the operator, the function that launches its kernels, and a result of this function
LAUNCHES = {
    "attention": (
        lambda: attention.attention(*QKV, [2, 2, 1, 0, 0]),
        ("attention_kernels", "forward"),
        lambda: (zeros(1, 4, 16), zeros(1, 4)),
    ),
    "its gradient": (
        lambda: attention.attention_backward(
            zeros(1, 4, 16), *QKV, zeros(1, 4, 16), zeros(1, 4), [2, 2, 1, 0, 0]
        ),
        ("attention_kernels", "backward"),
        lambda: tuple(torch.zeros_like(tensor) for tensor in QKV),
    ),
    "NMS": (
        lambda: nms.suppress(BOXES[None], None, 0.5, 1),
        ("nms_kernels", "launch"),
        lambda: torch.zeros(1, 1, dtype=torch.bool),
    ),
    "mask targets": (
        lambda: rasterize.rasterize(zeros(1, 4), torch.zeros(1, 2, dtype=torch.int64), BOXES, 28),
        ("rasterize_kernels", "launch"),
        lambda: torch.zeros(1, 28, 28, dtype=torch.bool),
    ),
    "RoIAlign": (
        lambda: roi_align.roi_align([MAP], BOXES, NUMBERS, NUMBERS, [4], 7, 2),
        ("roi_align_kernels", "forward"),
        lambda: zeros(1, 7, 7, 8),
    ),
    "its gradients": (
        lambda: roi_align.roi_align_backward(
            zeros(1, 8, 7, 7), BOXES, NUMBERS, NUMBERS, [4], [4], 1, [4], 2
        ),
        ("roi_align_kernels", "backward"),
        lambda: [zeros(1, 4, 4, 8)],
    ),
}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_run_on_the_device_of_their_tensors(name, monkeypatch):
    """Triton launches a kernel on the current device, not on that of its tensors."""
    run, (module, launch), result = LAUNCHES[name]
    current: list[object] = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    devices = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    module = import_module(f"vitdet.kernels.{module}")
    monkeypatch.setattr(module, launch, lambda *_: devices.append(list(current)) or result())
    run()
    assert devices == [[torch.device("cpu")]]


class OnSecondGpu:
    """The attributes of a tensor that `CudaGraph` reads."""

    is_cuda, dtype, device = True, torch.float32, torch.device("cuda:1")

    def __init__(self, size: int) -> None:
        self.shape = (size,)
        self.inference = False

    def to(self, device: torch.device, copy: bool) -> "OnSecondGpu":
        assert device == self.device and copy
        copied = OnSecondGpu(*self.shape)
        copied.inference = torch.is_inference_mode_enabled()
        return copied


@pytest.fixture
def second_gpu(monkeypatch):
    """Simulate streams, graphs and the current device."""
    current = SimpleNamespace(device=torch.device("cuda:0"), streams=[])

    @contextmanager
    def device(wanted):
        before, current.device = current.device, torch.device(wanted)
        yield
        current.device = before

    @contextmanager
    def graph(_, pool, stream, capture_error_mode):
        current.streams.append((stream, pool, current.device))
        yield

    def make_stream(wanted):
        return SimpleNamespace(device=wanted, wait_stream=lambda _: None)

    for name, value in {
        "device": device,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(pool=lambda: "pool"),
        "Stream": make_stream,
        "stream": lambda _: device(current.device),
        "current_stream": make_stream,
        "synchronize": lambda _: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda _: None,
        "set_rng_state": lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return current


def test_graphs_are_captured_on_their_device_in_one_stream(second_gpu):
    """A memory pool that was used in another stream cannot be reused."""
    devices = []
    graphs = CudaGraph()
    for size in (1, 2):
        graphs.record(lambda _: devices.append(second_gpu.device), OnSecondGpu(size))
    assert set(devices) == {torch.device("cuda:1")}
    (first, no_pool, device), (second, pool, other) = second_gpu.streams
    assert first is second and first.device == device == other == torch.device("cuda:1")
    assert no_pool is None and pool == "pool"
    assert second_gpu.device == torch.device("cuda:0")


def test_a_graphs_inputs_can_be_written_outside_inference_mode(second_gpu):
    """Inference tensors cannot be written outside it, and other threads are not in this mode."""
    graphs, inference = CudaGraph(), []
    with torch.inference_mode():
        graphs.record(lambda tensor: inference.append(tensor.inference), OnSecondGpu(1))
    assert set(inference) == {False}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("one\ntwo"), "one"), (NotImplementedError(), "NotImplementedError")],
)
def test_a_failed_capture_is_reported_in_one_line(second_gpu, error, reason):
    def function(_):
        raise error

    with pytest.raises(NotRecorded, match=f"^{reason}$"):
        CudaGraph().record(function, OnSecondGpu(1))


def test_graphs_are_dropped_when_memory_is_short_and_limited_in_number(second_gpu):
    def function(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    graphs = CudaGraph()
    graphs.record(lambda _: None, OnSecondGpu(1))
    with pytest.raises(OutOfMemory, match=r"^CUDA out of memory. Tried to allocate 2.00 GiB.$"):
        graphs.record(function, OnSecondGpu(2))
    assert not graphs.has(OnSecondGpu(1)) and graphs.pool is None
    for size in range(LIMIT):
        graphs.record(lambda _: None, OnSecondGpu(size))
    with pytest.raises(NoRoom, match=f"{LIMIT} graphs are already recorded"):
        graphs.record(lambda _: None, OnSecondGpu(LIMIT))
    assert graphs.has(OnSecondGpu(0))
