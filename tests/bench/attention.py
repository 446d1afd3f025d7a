"""Time the attention kernels with other block sizes: `python -m tests.bench.attention [HEADS DEPTH]`.

Forward and backward passes at 64 x 64 tokens and batch 8, over the grid and in windows of 14; ViT-B's heads by default.
The constants of `vitdet.kernels.attention_kernels` are replaced one at a time and compiled beforehand, in parallel.
Each list starts with the value in use.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch.nn import functional as F

from tests.helpers.attention_cases import Case, inputs
from vitdet.kernels import attention_kernels as kernels
from vitdet.kernels.attention_kernels import Blocks
from vitdet.kernels.attention_positions import Layout

BATCH, SIDE, WINDOW = 8, 64, 14
TRIED = {
    ("FORWARD", 0): [(64, 64, 4, 3, 128), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 3, 128)],
    ("BACKWARD_QUERIES", 0): [(64, 64, 4, 2), (64, 64, 4, 3, 168), (128, 64, 8, 2), (64, 128, 8, 2)],
    ("BACKWARD_KEYS", 0): [(64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2, 168), (64, 128, 8, 2)],
    ("FORWARD", WINDOW): [(64, 64, 4, 1), (64, 64, 4, 2, 128), (64, 128, 4, 2), (64, 256, 4, 1)],
    ("BACKWARD_QUERIES", WINDOW): [(64, 64, 4, 1), (64, 64, 4, 2, 168), (64, 32, 4, 2)],
    ("BACKWARD_KEYS", WINDOW): [(64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 1), (64, 128, 8, 2)],
}  # fmt: skip


class Trial(NamedTuple):
    """A constant of the kernels and the block sizes that replace it (None: the sizes in use)."""

    name: str
    window: int
    blocks: tuple[int, ...] | None


def passes(heads: int, depth: int, window: int):
    """Return functions that run the forward and the backward pass."""
    layout = Layout.of(SIDE, SIDE, heads, depth, window)
    case = Case(BATCH, SIDE, SIDE, heads, depth, window)
    (qkv, bias, *tables), gradient = inputs(case, torch.bfloat16, "cuda")
    bias = bias.bfloat16()
    saved = kernels.forward(layout, qkv, bias, tables, 1.0)
    return (
        lambda: kernels.forward(layout, qkv, bias, tables, 1.0),
        lambda: kernels.backward(gradient, *saved, layout, qkv, bias, tables, 1.0),
    )


def timed(trial: Trial, heads: int, depth: int, repeats: int) -> float | str:
    """Return the milliseconds of the constant's pass, or the reason why it cannot run."""
    used = getattr(kernels, trial.name)
    blocks = Blocks(*trial.blocks) if trial.blocks else used[trial.window == 0]
    try:
        with patch.dict(used, {trial.window == 0: blocks}):
            forward, backward = passes(heads, depth, trial.window)
            run = forward if trial.name == "FORWARD" else backward
            return triton.testing.do_bench(
                run, warmup=repeats, rep=4 * repeats, return_mode="median"
            )
    except triton.runtime.errors.OutOfResources as error:
        return str(error)


def compile_one(given: tuple[Trial, int, int]) -> None:
    timed(*given, repeats=1)


def main() -> None:
    heads, depth = map(int, sys.argv[1:3] or (12, 64))
    trials = [
        Trial(name, window, blocks)
        for (name, window), tried in TRIED.items()
        for blocks in (None, *tried)
    ]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, ((trial, heads, depth) for trial in trials)))
    print(
        f"{torch.cuda.get_device_name()}, {heads} heads of {depth}, batch {BATCH}, {SIDE} x {SIDE}"
    )
    for trial in trials:
        found = timed(trial, heads, depth, repeats=40)
        where = f"window {trial.window}" if trial.window else "grid"
        shown = f"{found:.3f} ms" if isinstance(found, float) else found
        print(f"{where:10} {trial.name:17} {trial.blocks or 'in use'!s:21} {shown}", flush=True)
    q, k, v = torch.randn(
        3, BATCH, heads, SIDE**2, depth, device="cuda", dtype=torch.bfloat16
    ).unbind()
    bound = triton.testing.do_bench(lambda: F.scaled_dot_product_attention(q, k, v))
    print(f"forward without positions, by PyTorch: {bound:.3f} ms")


if __name__ == "__main__":
    main()
