"""Compile Triton kernels for an H100 without a GPU, from the calls that `launches` records.

`python -m tests.helpers.offline` prints registers, spills and shared memory at the sizes of ViT-B
and ViT-H.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vitdet.kernels import nms_kernels, rasterize_kernels, roi_align_kernels
from vitdet.kernels.attention_kernels import backward, forward
from vitdet.kernels.attention_positions import Layout

CAPABILITY = 90
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
SIZES = ((12, 64), (16, 80))  # heads and channels per head of ViT-B and ViT-H


class Launch(NamedTuple):
    """A kernel with the arguments of a call."""

    kernel: JITFunction
    args: tuple
    options: dict


class Assembled(NamedTuple):
    """`spilled`: bytes of register spills; `shared`: bytes of shared memory."""

    name: str
    registers: int
    spilled: int
    shared: int


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Record kernel launches instead of running them."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object):
        found.append(Launch(kernel, args, options))

    with patch.object(JITFunction, "run", record):
        yield found


def assemble(launch: Launch) -> Assembled:
    """Compile a launch as on an H100, with its constants and the divisibility of its integers."""
    values = dict(zip((p.name for p in launch.kernel.params), launch.args, strict=False))
    options = {key: value for key, value in launch.options.items() if key in OPTIONS}
    values |= launch.options
    signature, constants, divisible = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        number = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (number and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (number and value % 16 == 0):
                divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    registers, spilled = _registers(compiled.asm["ptx"])
    return Assembled(launch.kernel.__name__, registers, spilled, compiled.metadata.shared)


def _registers(ptx: str) -> tuple[int, int]:
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        words = [get_ptxas(CAPABILITY).path, "-v", f"--gpu-name=sm_{CAPABILITY}a", str(source)]
        done = subprocess.run(
            [*words, "-o", f"{folder}/kernel.o"], capture_output=True, text=True, check=True
        )
    (used,) = re.findall(r"Used (\d+) registers", done.stderr)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return int(used), int(spilled)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launches(heads: int, depth: int, window: int) -> list[Launch]:
    """Return the launches of a forward and backward pass over 64 x 64 tokens of 8 images."""
    layout, half = Layout.of(64, 64, heads, depth, window), torch.bfloat16
    qkv, gradient = (empty(8, 64 * 64, parts * heads * depth, dtype=half) for parts in (3, 1))
    bias = empty(3 * heads * depth, dtype=half)
    tables = tuple(empty(2 * side - 1, depth) for side in layout.sides)
    with launches() as found:
        saved = forward(layout, qkv, bias, tables, 1.0)
        backward(gradient, *saved, layout, qkv, bias, tables, 1.0)
    return found


def detection_launches(dtype: torch.dtype) -> list[Launch]:
    """Return the launches of NMS, RoIAlign (both passes) and mask targets for 8 images of 1024 x 1024."""
    sides, strides = (256, 128, 64, 32), (4, 8, 16, 32)
    maps = [empty(8, side, side, 256, dtype=dtype) for side in sides]
    with launches() as found:
        nms_kernels.launch(empty(40, 2000, 4), None, 0.7, 1000)
        nms_kernels.launch(empty(8, 2000, 4), empty(8, 2000, dtype=torch.int64), 0.5, 100)
        for bins, count in ((7, 4096), (14, 1024)):
            index = empty(count, dtype=torch.int64)
            rois = (empty(count, 4), index, index)
            out = roi_align_kernels.forward(maps, *rois, strides, bins, 0)
            shapes = [(side, side) for side in sides]
            roi_align_kernels.backward(out, *rois, shapes, 8, strides, 0)
        spans = empty(1024, 2, dtype=torch.int64)
        rasterize_kernels.launch(empty(60_000, 4), spans, empty(1024, 4), 28)
    return found


def table(launched: list[Launch], show: Callable[[str], object]) -> None:
    for launch in launched:
        name, registers, spilled, shared = assemble(launch)
        options = {key: launch.options[key] for key in OPTIONS if key in launch.options}
        used = f"{registers:3} registers, {spilled} bytes spilled, {shared:6} shared"
        show(f"  {name:24} {used}, {options}")


def main(show: Callable[[str], object]) -> None:
    for heads, depth in SIZES:
        for window in (0, 14):
            show(f"{heads} heads of {depth}, window {window}")
            table(attention_launches(heads, depth, window), show)
    for dtype in (torch.bfloat16, torch.float32):
        show(f"detection, {dtype}")
        table(detection_launches(dtype), show)


if __name__ == "__main__":
    main(print)
