"""The device that a case runs on, and the transfer of its results.

The CPU's tolerances apply on every device: without TF32, a GPU rounds float32 in the same way and only adds in another
order. On an H100, `maskrcnn_coco` and `maskrcnn_coco_resblock` were within them; 96 gradient norms of `cascade_lvis` in
float64 were not (up to 15 times the tolerance), because equal scores were ordered differently than on the CPU. Boxes
now decide the order of equal scores (`vitdet.models.boxes.largest`), so no tolerance allows for it; the case was not
measured again. Results may still differ where rounding decides: for a box at an IoU threshold, or for which of several
equal scores `topk` still returns.
The Triton kernels are used as in training (`vitdet.kernels.enabled`); networks in float64 use the plain path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from vitdet import kernels

CPU = torch.device("cpu")


def device_named(name: str) -> torch.device:
    """Return `cpu`, or `cuda`, the current GPU. Raises ValueError for other names, or without a GPU."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; leave it out to use the CPU")
    return torch.device(name)


def described() -> str:
    """Return the report's description of the GPU."""
    return (
        f"{torch.cuda.get_device_name()}; {kernels.describe()}; TF32 off; tolerances as on the CPU"
    )


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products and convolutions in full precision on a GPU, instead of in TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def moved(found: Any, device: torch.device) -> Any:
    """Return the object with its tensors on a device, also those in containers and dataclasses."""
    if hasattr(found, "to"):
        return found.to(device)
    if isinstance(found, dict):
        return {name: moved(value, device) for name, value in found.items()}
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return type(found)(*(moved(value, device) for value in found))
    if isinstance(found, list | tuple):
        return type(found)(moved(value, device) for value in found)
    if is_dataclass(found):
        names = [field.name for field in fields(found)]
        return replace(found, **{name: moved(getattr(found, name), device) for name in names})
    return found
