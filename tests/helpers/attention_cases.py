"""Attention kernels against `reference` in float64: forward pass and all gradients.

Run as a script with the argument START, it prints the errors of CASES[START::2] as JSON; with
the argument "operator", it checks the operator's registration and prints the error of a compiled
block. With TRITON_INTERPRET=1 in the environment, the kernels run on the CPU.
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from tests.helpers import parts
from vitdet import kernels
from vitdet.kernels.attention import attention, attention_backward
from vitdet.models import attention as model
from vitdet.models.attention import join_heads, join_windows, split_heads, split_windows, widen


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    heads: int
    depth: int
    window: int = 0
    scaled: bool = False


CASES = (  # CASES[::2] and CASES[1::2] each cover every code path of the kernels
    Case(2, 2, 5, 1, 32),
    Case(1, 3, 17, 1, 80, scaled=True),
    Case(1, 3, 2, 1, 80, window=2, scaled=True),
    Case(1, 3, 3, 2, 32, window=3),
)
OUTPUTS = ("out", "qkv", "bias", "rel_h", "rel_w")


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Return qkv, bias and tables as in a model under autocast, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    tokens, channels = case.height * case.width, case.heads * case.depth
    rows, columns = case.window or case.height, case.window or case.width
    # Products of queries and tables are of order 1, whether or not the queries are scaled.
    scale = 0.2 if not case.scaled else 0.2 * case.depth**0.5
    given = [
        random(case.batch, tokens, 3 * channels).to(dtype),
        random(3 * channels, scale=0.5),
        random(2 * rows - 1, case.depth, scale=scale),
        random(2 * columns - 1, case.depth, scale=scale),
    ]
    return given, random(case.batch, tokens, channels).to(dtype)


def sizes(case: Case) -> list[int]:
    return [case.height, case.width, case.heads, case.window, int(case.scaled)]


def fused(*given) -> Tensor:
    """Return the output of the kernels."""
    return attention(*given)[0]


def reference(qkv: Tensor, bias: Tensor, rel_h: Tensor, rel_w: Tensor, sizes: list[int]) -> Tensor:
    """Return the output of the unfused path, with all logits in memory."""
    height, width, heads, window, scaled = sizes
    qkv = qkv.unflatten(1, (height, width))
    if window:
        inside = split_windows(torch.ones_like(qkv[..., :1]), window)
        qkv = torch.where(inside > 0, split_windows(qkv, window), bias)
    q, k, v = split_heads(qkv, heads)
    query, key = widen(q, k, rel_h, rel_w, *qkv.shape[1:3], bool(scaled))
    y = join_heads((query @ key.transpose(-1, -2)).softmax(dim=-1) @ v, qkv.shape[1])
    return (join_windows(y, (height, width)) if window else y).flatten(1, 2)


def results(function, case: Case, given: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs, zeros for unused inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    out = function(*leaves, sizes(case))
    found = torch.autograd.grad(out, leaves, gradient, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [out.detach(), *(torch.zeros_like(leaf) if g is None else g for g, leaf in pairs)]


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Return each tensor's relative error: norm of the difference / norm of the expected tensor."""
    pairs = zip(found, wanted, strict=True)
    return [((tensor - true).norm() / true.norm().clamp(min=1e-6)).item() for tensor, true in pairs]


def relative_errors(case: Case, dtype: torch.dtype, device: str, *functions) -> list[list[float]]:
    """Return the relative errors of each function's results."""
    given, gradient = inputs(case, dtype, device)
    exact = results(reference, case, [tensor.double() for tensor in given], gradient.double())
    return [distances(results(function, case, given, gradient), exact) for function in functions]


def check_operator(case: Case) -> None:
    """Check schema and autograd, and fake tensors' shapes, dtypes and strides against real ones."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    given, gradient = inputs(case, torch.float32, "cpu")
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    torch.library.opcheck(attention, (*leaves, sizes(case)), test_utils=tests)
    saved = attention(*given, sizes(case))
    again = (gradient, *given, *saved, sizes(case))
    torch.library.opcheck(attention_backward, again, test_utils=tests)


def compiled_block() -> float:
    """Return the largest relative error of a compiled block's values and gradients, with kernels."""
    torch.manual_seed(0)
    block = parts.block(dim=16, heads=1, window=2, grid=2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    leaves = [x, *block.parameters()]
    plain = block(x)
    wanted = [plain, *torch.autograd.grad(plain.square().sum(), leaves)]
    # a simulated GPU in half precision
    with (
        patch.object(kernels, "enabled", lambda *_: True),
        patch.object(model, "in_half", lambda _: True),
    ):
        fused = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        found = [fused, *torch.autograd.grad(fused.square().sum(), leaves)]
    return max(distances(found, wanted))


if __name__ == "__main__":
    if sys.argv[1] == "operator":
        for case in (Case(1, 2, 2, 1, 16), Case(1, 1, 2, 1, 16, window=2)):
            check_operator(case)
        print(compiled_block())
    else:
        some = CASES[int(sys.argv[1]) :: 2]
        print(json.dumps([relative_errors(case, torch.float32, "cpu", fused)[0] for case in some]))
