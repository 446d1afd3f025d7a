"""Triton kernels for operations without a fast implementation in PyTorch, as custom operators.

Triton launches kernels on the current device, so each operator first selects its tensors' device.
The operators do not check their arguments: `vitdet.models` and `vitdet.evaluation`, which call
them, guarantee valid shapes and dtypes.

The kernels run on NVIDIA GPUs of the Ampere generation or later. On other devices, without Triton,
for unsupported dtypes or sizes, and if VITDET_KERNELS=off is set, callers use plain torch.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SWITCH = "VITDET_KERNELS"
CAPABILITY = (8, 0)  # Ampere: asynchronous copies and bf16 matrix products
NAMES = ("attention (bf16, fp16)", "NMS", "RoIAlign", "mask targets", "pasted masks")


def enabled(*tensors: Tensor) -> bool:
    """Return whether the kernels run on these tensors; float64 is not supported.

    Raises ValueError if VITDET_KERNELS is neither `on` nor `off`.
    """
    supported = all(tensor.is_cuda and tensor.dtype != torch.float64 for tensor in tensors)
    return supported and _runs_on(tensors[0].device.index)


def describe() -> str:
    """Return a log line that states which kernels can run on the current GPU, or why none can.

    Raises ValueError if VITDET_KERNELS is neither `on` nor `off`.
    """
    reason = _obstacle(torch.cuda.current_device() if torch.cuda.is_available() else None)
    if reason:
        return f"Triton kernels off: {reason}"
    return f"Triton kernels on ({torch.cuda.get_device_name()}): {', '.join(NAMES)}"


@torch.compiler.assume_constant_result
def _runs_on(device: int) -> bool:
    """Return whether the kernels run on a device; torch.compile treats this as a constant."""
    return _obstacle(device) is None


def _obstacle(device: int | None) -> str | None:
    """Return why the kernels do not run on GPU `device` (None: no GPU), or None if they run."""
    setting = os.environ.get(SWITCH, "on")
    if setting not in ("on", "off"):
        raise ValueError(f"{SWITCH} must be on or off, got {setting!r}")
    if setting == "off":
        return f"{SWITCH}=off"
    return _missing(device)


@cache
def _missing(device: int | None) -> str | None:
    if torch.version.hip is not None:
        return "ROCm is untested"
    if device is None:
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        return f"compute capability {found} is below {needed}"
    return None if find_spec("triton") else "triton is not installed"
