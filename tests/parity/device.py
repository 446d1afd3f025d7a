"""The device that a case runs on, how its results come back, and the tolerances there.

Tolerances are those of the CPU on every device. Without TF32 a GPU rounds float32 in the same way, in another order of
sums, which the tolerances were made for: on an H100 `maskrcnn_coco` and `maskrcnn_coco_resblock` held with them. 96
gradient norms of `cascade_lvis` in float64 did not (up to 15 times the tolerance), where equal scores came in another
order than on the CPU. That order follows the boxes now (`vitdet.models.boxes.largest`), so no tolerance allows for it;
it was not measured again since. What may still differ is what rounding decides: a box at a threshold of IoU, which of
the equal scores are the last that `topk` takes.
The Triton kernels take part as in training (`vitdet.kernels.enabled`); networks in float64 take the plain path.
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
    """`cpu`, or `cuda`, the current GPU. Raises ValueError for another name, and for `cuda` without a GPU."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; leave it out to use the CPU")
    return torch.device(name)


def described() -> str:
    """What a report says of the GPU."""
    return (
        f"{torch.cuda.get_device_name()}; {kernels.describe()}; TF32 off; tolerances as on the CPU"
    )


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within it a GPU computes float32 products and convolutions (TF32 by default) with all 24 bits."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def moved(found: Any, device: torch.device) -> Any:
    """The same on a device: everything with tensors in it, inside containers and dataclasses too."""
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
