"""What a benchmark measures of a device: times, memory, the rate of matrix products, kernels and host waits."""

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

# side of the matrices whose product gives the rate; a processor takes 0.1 s for the smaller ones
PRODUCT = {"cuda": 8192, "cpu": 1024}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the calls of CUDA that wait; a device's synchronization is the measurement's own
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
GIB = 2**30
# the columns of a table: what a row may have, and how it is shown
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
    """Marks in the order of the device's work, and the milliseconds between them; no mark waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        """Note this moment: on a GPU, when it comes to what was queued before."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """The times between the marks; waits for the last one."""
        if self.on_gpu:
            torch.cuda.synchronize()
            pairs = zip(self._marks, self._marks[1:], strict=False)
            return [start.elapsed_time(end) for start, end in pairs]
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [1e3 * (end - start) for start, end in pairs]


def timed(
    call: Callable[[], object], device: torch.device, count: int, warm: int = 0
) -> list[float]:
    """Milliseconds of `count` calls in a row, after `warm` others."""
    for _ in range(warm):
        call()
    clock = Clock(device)
    clock.mark()
    for _ in range(count):
        call()
        clock.mark()
    return clock.milliseconds()


def product_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of a large square matrix product in this precision, of random numbers."""
    side = PRODUCT[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in "lr")
    milliseconds = statistics.median(timed(lambda: left @ right, device, 10, warm=3))
    return 2 * side**3 / milliseconds * 1e3


def peak_memory(device: torch.device) -> Callable[[], float]:
    """A function for the most GiB allocated from now on on the GPU, or by this process since its start."""
    if device.type == "cuda":
        gc.collect()  # models of earlier rows hold themselves in cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return lambda: memory(device) / GIB


@contextmanager
def counted(device: torch.device, steps: int) -> Iterator[dict[str, float]]:
    """Counts what the GPU is given within: kernels and copies, launches, host waits, all of one step.

    Filled at the end, with nothing on a CPU.
    """
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
    """FLOPs of the matrix products and convolutions in a forward pass, whatever computes them.

    The attention of the plain backbones is counted by its definition: on the tokens of the image, of its keys and
    values alone. Padding, copies and how relative positions are added differ between implementations.
    """
    within: Counter = Counter()

    def count(block: Block, given: tuple) -> None:
        images, height, width, dim = given[0].shape
        keys = block.window**2 or height * width
        within["attention"] += images * height * width * (8 * dim * dim + 4 * keys * dim)

    blocks = [one for one in detector.modules() if isinstance(one, Block)]
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
    """The measurements of every batch size and precision: {device, tflop_per_image, product_tflops, rows}.

    section: of the config, `train` or `evaluate`, whose precision is set. flops: of an image. measure(config, precision on
    this device, size) returns a row with images_per_second; one that runs out of memory has an error instead.
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
    """The measurements of a benchmark as they are written: with the device and the rates that MFU refers to."""
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
    """The measurements of `summary` as text: a line on the device, and a table with a line for each row."""
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
        [f"{head}{table['tflop_per_image']:.3g} TFLOP an image", *map(str.rstrip, lines)]
    )
