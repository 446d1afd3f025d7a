"""A simulated GPU: tensors on another device that compute on the CPU and reject mixed devices.

The device is named `meta`, the only other device type that every torch build knows. It rejects what a GPU rejects:
operands on two devices, unless one is a number. Indices on the CPU are accepted, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = "meta"
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING.add(aten._index_put_impl_.default)


class FarTensor(Tensor):
    """A tensor on the simulated device (far), which computes with the CPU tensor `near`."""

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        given = {"strides": near.stride(), "dtype": near.dtype, "device": FAR}
        return Tensor._make_wrapper_subclass(cls, near.shape, **given)

    def __init__(self, near: Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        return run(function, args, kwargs or {})


def is_far(device: object) -> bool:
    return device is not None and torch.device(device).type == FAR


def run(function: Callable, args: tuple, kwargs: dict) -> object:
    """Run an operation on the CPU; the results are FarTensors if an operand or `device` is far."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    near = [tensor for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.dim()]
    indexes = function in INDEXING and isinstance(args[0], FarTensor)
    if far and near and function not in MOVES and not indexes:
        raise RuntimeError(
            f"{function}: operands {[tuple(tensor.shape) for tensor in near]} on the CPU, "
            f"{[tuple(tensor.shape) for tensor in far]} far away"
        )
    stays_far, inner = bool(far), kwargs
    if kwargs.get("device") is not None:
        stays_far, inner = is_far(kwargs["device"]), {**kwargs, "device": torch.device("cpu")}
    if function is aten._local_scalar_dense.default:
        stays_far = False
    near_of = lambda value: value.near if isinstance(value, FarTensor) else value  # noqa: E731
    positional, named = tree_map(near_of, (args, inner))
    found = function(*positional, **named)
    if function._schema.name.endswith("_") and found is not None:
        return args[0]  # in place
    to_far = lambda value: FarTensor(value) if isinstance(value, Tensor) else value  # noqa: E731
    return tree_map(to_far, found) if stays_far else found


class Dispatch(TorchDispatchMode):
    """Intercept functions that create tensors, e.g. torch.arange(..., device=...)."""

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        return run(function, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Intercept conversions between Python numbers and tensors, which bypass dispatch."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ):
        kwargs = dict(kwargs or {})
        if function is torch.tensor:
            device = kwargs.pop("device", None)
            found = function(*args, **kwargs)
            return FarTensor(found) if is_far(device) else found
        if function is Tensor.new_tensor and isinstance(args[0], FarTensor):
            return FarTensor(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        if function is Tensor.tolist and isinstance(args[0], FarTensor):
            return args[0].near.tolist()
        return function(*args, **kwargs)


@contextmanager
def far_device() -> Iterator[str]:
    """Let `.to(name)` and `device=name` reach the simulated device."""
    with Dispatch(), Literals():
        yield FAR


def send(module: nn.Module) -> nn.Module:
    """Return the module with all of its tensors on the simulated device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(FarTensor(parameter.data))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = FarTensor(buffer)
    return module
