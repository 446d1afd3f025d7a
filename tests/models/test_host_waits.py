"""A training step and detection never wait for the GPU; fake tensors check this without a GPU.

Fake tensors raise at operations that need a value (the number of true entries, a scalar).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import vitdet.kernels
from tests.helpers.small import images, small_detector, target
from vitdet.models import mask_head, roi_pool
from vitdet.types import Targets

CUDA = torch.device("cuda")
META = torch.device("meta")  # for backward passes, which need a GPU with CUDA tensors


class Transfers(TorchDispatchMode):
    """Raise at operations that copy between the CPU and the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        found = func(*args, **(kwargs or {}))
        if "copy" in func.__name__:
            devices = {value.device.type for value in (*args, found) if isinstance(value, Tensor)}
            devices |= {device.type for device in [(kwargs or {}).get("device")] if device}
            assert len(devices) == 1, f"{func} copies between devices"
        return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A simulated GPU with the Triton kernels enabled."""
    enabled = lambda *tensors: all(tensor.device.type != "cpu" for tensor in tensors)  # noqa: E731
    for module in (vitdet.kernels, mask_head, roi_pool, vitdet.kernels.nms):
        monkeypatch.setattr(module, "enabled", enabled)
    return FakeTensorMode(allow_non_fake_inputs=True)


def on_gpu(mode: FakeTensorMode, module: nn.Module, device: torch.device = CUDA) -> nn.Module:
    """Return the module with its tensors on the simulated GPU."""

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    with mode:
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(move(parameter)))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, move(buffer))
    return module


KINDS = [((0.5,), "softmax"), ((0.5, 0.6, 0.7), "federated")]


@pytest.mark.parametrize(("ious", "loss"), KINDS)
@pytest.mark.parametrize("device", [CUDA, META], ids=str)
def test_a_training_step_never_waits(
    gpu: FakeTensorMode, ious: tuple[float, ...], loss: str, device: torch.device
) -> None:
    detector = on_gpu(gpu, small_detector(ious=ious, loss=loss).train(), device)
    made = Targets.of([target([[10, 10, 50, 60]], [1]), target([], [])], slots=4)
    with gpu:
        pixels = torch.empty(images(2).shape, dtype=torch.uint8, device=device)
        sizes = torch.empty(2, 2, dtype=torch.int64, device=device)
        batch = made.to(device)
        with Transfers():
            with torch.autocast("cuda", torch.bfloat16):
                losses = detector(pixels, batch, sizes)
            if device == META:
                optimizer = torch.optim.AdamW(detector.parameters(), foreach=True)
                sum(losses.values()).backward()
                nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
                optimizer.step()
                assert all(parameter.grad is not None for parameter in detector.parameters())
    assert all(value.device.type == device.type for value in losses.values())


@pytest.mark.parametrize(("ious", "loss"), KINDS)
def test_detection_does_not_wait_before_its_results(
    gpu: FakeTensorMode, ious: tuple[float, ...], loss: str
) -> None:
    detector = on_gpu(gpu, small_detector(ious=ious, loss=loss).eval())
    with gpu, torch.no_grad():
        pixels = torch.empty(images(2).shape, dtype=torch.uint8, device=CUDA)
        sizes = torch.empty(2, 2, dtype=torch.int64, device=CUDA)
        with Transfers():
            features, _, found = detector.find(pixels, sizes)
            masks = detector.roi_heads.masks(features, found)
    assert found.boxes.shape == (2, 20, 4) and masks.shape == (2, 20, 28, 28)
    assert found.filled.device.type == "cuda"


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: float(x.max()),
        lambda x: torch.tensor([1.0]).to(x.device),
        lambda x: x.cpu(),
    ],
)
def test_waits_are_detected(gpu: FakeTensorMode, waits: object) -> None:
    errors = DataDependentOutputException, DynamicOutputShapeException, AssertionError
    with gpu, Transfers(), pytest.raises(errors):
        waits(torch.empty(4, device=CUDA))
