"""Measure time, memory, matrix product rate, kernels and host waits on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vitdet.config import Config, override
from vitdet.models import Detector
from vitdet.models.attention import Attention
from vitdet.models.vit import Block
from vitdet.training.meter import memory
from vitdet.training.precision import chosen, tf32

# device type -> side of the square matrices whose product is timed
PRODUCT = {"cuda": 8192, "cpu": 1024}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# CUDA calls that block the host. cudaDeviceSynchronize is left out: only the benchmark calls it.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
COUNTED = 2  # number of steps, after the timed steps, in which kernels are counted
GIB = 2**30
# column of the report -> format of its values
SHOWN = {
    "who": "{}",
    "batch": "{}",
    "precision": "{}",
    "ms": "{:.1f}",
    "images_per_second": "{:.2f}",
    "peak_gib": "{:.2f}",
    "reserved_gib": "{:.2f}",
    "mfu": "{:.1%}",
    "kernels": "{:.0f}",
    "launches": "{:.0f}",
    "waits": "{:.0f}",
    "busy_ms": "{:.1f}",
    "warm_up_s": "{:.1f}",
    "detections": "{:.0f}",
    "results_per_second": "{:.1f}",
}


class Clock:
    """Measure the times between marks; on a GPU, with CUDA events, which do not block the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        """Mark the current time; on a GPU, the time at which all work queued so far is complete."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Wait for the last mark; return the times between successive marks."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [
            start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start) for start, end in pairs
        ]


def timed(
    call: Callable[[], object], device: torch.device, count: int, warm: int = 0
) -> list[float]:
    """Return the milliseconds of each of `count` successive calls, after `warm` warm-up calls."""
    for _ in range(warm):
        call()
    clock = Clock(device)
    clock.mark()
    for _ in range(count):
        call()
        clock.mark()
    return clock.milliseconds()


def call_row(
    call: Callable[[], object],
    images: int,
    steps: int,
    device: torch.device,
    warm: int,
    peak: Callable[[], float],
) -> dict:
    """Return median ms, mean images_per_second, peak_gib and the values of `counted`.

    images: number of images per call. warm: number of warm-up calls. peak: see `peak_memory`."""
    times = timed(call, device, steps, warm)
    with counted(device, COUNTED) as counts:
        for _ in range(COUNTED if device.type == "cuda" else 0):
            call()
    return {
        "ms": statistics.median(times),
        "images_per_second": 1e3 * images / statistics.mean(times),
        "peak_gib": peak(),
        **counts,
    }


def product_rate(precision: str, device: torch.device) -> float:
    """Return the speed, in FLOP/s, of multiplying large square matrices in this precision."""
    side = PRODUCT[device.type]
    left, right = torch.randn(2, side, side, device=device, dtype=DTYPES[precision])
    milliseconds = statistics.median(timed(lambda: left @ right, device, 10, warm=3))
    return 2 * side**3 / milliseconds * 1e3


def peak_memory(device: torch.device) -> Callable[[], float]:
    """Return a function that returns the peak memory in GiB: on a GPU, of torch's allocations since
    the call of `peak_memory`; on a CPU, of the process since its start.
    """
    if device.type == "cuda":
        gc.collect()  # frees earlier models, which are in reference cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return lambda: memory(device) / GIB


@contextmanager
def counted(device: torch.device, steps: int) -> Iterator[dict[str, float]]:
    """Measure kernels (including copies), launches, host waits and busy ms per step on a GPU.

    The yielded dictionary is filled at the end of the context, in which `steps` steps must run; on
    a CPU, the dictionary remains empty."""
    found: dict[str, float] = {}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        yield found
        torch.cuda.synchronize()
    events = trace.events()
    calls = [event.name for event in events if event.device_type == DeviceType.CPU]
    kernels = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    ]
    found["kernels"] = len(kernels) / steps
    found["launches"] = sum("Launch" in name for name in calls) / steps
    found["waits"] = sum(name in WAITS for name in calls) / steps
    found["busy_ms"] = sum(kernels) / 1e3 / steps


@torch.no_grad()
def forward_flops(detector: Detector, call: Callable[[], object]) -> float:
    """Return the FLOPs of matrix products and convolutions in a forward pass.

    The FLOPs of attention in the plain backbones are computed from the numbers of image tokens and
    keys. Padding, copies and the addition of relative positions are excluded, because they differ
    between implementations.
    """
    within: Counter = Counter()

    def count(block: Block, given: tuple) -> None:
        images, height, width, dim = given[0].shape
        keys = block.window**2 or height * width
        within["attention"] += images * height * width * (8 * dim * dim + 4 * keys * dim)

    blocks = [module for module in detector.modules() if isinstance(module, Block)]
    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    counts = counter.get_flop_counts()
    names = {
        f"{type(detector).__name__}.{name}"
        for name, module in detector.named_modules()
        if isinstance(module, Attention)
    }
    replaced = sum(sum(counts[name].values()) for name in names & counts.keys())
    return counter.get_total_flops() - replaced + within["attention"]


def measured(
    config: Config,
    section: str,
    sizes: Sequence[int],
    precisions: Sequence[str],
    device: torch.device,
    flops: float,
    measure: Callable[[Config, str, int], dict],
) -> dict:
    """Measure each batch size with each precision; return the results in the format of `summary`.

    Args:
        section: config section whose precision is set, "train" or "evaluate".
        flops: FLOPs per image.
        measure: called with the config, the resolved precision and the batch size; returns a
            row with images_per_second. If GPU memory runs out, the row contains "error" instead.
    """
    rows: list[dict] = []
    rates: dict[str, float] = {}
    for precision in precisions:
        settings = override(config, [f"{section}.precision={precision}"])
        used = chosen(precision, device)
        with tf32(used, device) if section == "train" else nullcontext():
            rates[used] = rates.get(used) or product_rate(used, device)
        for size in sizes:
            row: dict = {"batch": size, "precision": used}
            try:
                row |= measure(settings, used, size)
                row["mfu"] = row["images_per_second"] * flops / rates[used]
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            rows.append(row)
    return summary(device, flops, rates, rows)


def summary(
    device: torch.device, flops: float, rates: dict[str, float], rows: Sequence[dict]
) -> dict:
    """Return the JSON content of a benchmark. rates: FLOP/s of matrix products by precision."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tflop_per_image": flops / 1e12,
        "product_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "rows": rows,
    }


def report(table: dict) -> str:
    """Return the result of `summary` as text: a line about the device, then a table of the rows."""
    rates = ", ".join(
        f"{name} {rate:.4g} TFLOP/s" for name, rate in table["product_tflops"].items()
    )
    head = f"{table['device']}, torch {table['torch']}; matrix product: {rates}; "
    rows = [list(SHOWN)]
    for row in table["rows"]:
        shown = ["-" if row.get(key) is None else SHOWN[key].format(row[key]) for key in SHOWN]
        rows.append([*shown, row.get("error", "")])
    used = [i for i in range(len(SHOWN)) if any(row[i] != "-" for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = ["  ".join([row[i].rjust(widths[i]) for i in used] + row[len(SHOWN) :]) for row in rows]
    return "\n".join(
        [f"{head}{table['tflop_per_image']:.3g} TFLOP per image", *map(str.rstrip, lines)]
    )
