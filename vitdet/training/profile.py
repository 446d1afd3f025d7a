"""Profile of training steps: a trace of a few steps, and the time of each part of the detector.

While the steps are profiled, methods of the parts are wrapped in named scopes. A forward operator
belongs to the innermost enclosing scope, a backward operator to the part of its forward operator.
On a GPU, the time of a part is the time of its kernels, "data" is the time that the GPU waits for
the loader, and "idle" is all other waiting. On a CPU, the time of a part is the time of its
operators, "data" is the time spent waiting for the loader, and "idle" is the remaining time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from vitdet.files import atomic_write, write_json
from vitdet.models.attention import Attention
from vitdet.models.vit import Mlp
from vitdet.training.step import TrainingStep
from vitdet.types import Batch

log = logging.getLogger(__name__)

WARM = 5  # warm-up steps: memory is allocated, kernels are selected
TIMED = 3  # steps after the warm-up, timed without the profiler, which delays the host
TRACED = 3  # steps after the timed steps, recorded in the trace
STEPS = WARM + TIMED + TRACED + 1  # the trace ends when the next batch is requested
DATA, OTHER, IDLE = "data", "other", "idle"
PARTS = (
    "attention", "MLP", "backbone, rest", "pyramid", "RPN", "NMS", "RoI pooling", "box head",
    "mask head", "losses", "optimizer", OTHER, DATA, IDLE,
)  # fmt: skip
# operators that belong to a part regardless of their scope
OPERATORS = {
    "torchvision::nms": "NMS",
    "vitdet::nms": "NMS",
    "torchvision::roi_align": "RoI pooling",
    "torchvision::_roi_align_backward": "RoI pooling",
    "vitdet::roi_align": "RoI pooling",
    "vitdet::roi_align_backward": "RoI pooling",
    "vitdet::rasterize": "mask head",
    "vitdet::attention": "attention",
    "vitdet::attention_backward": "attention",
}
BACKWARD = "autograd::engine::evaluate_function: "


class ProfiledBatches:
    """Yields a loader's batches and profiles the first steps; step: the TrainingStep to profile.

    Writes a trace for chrome://tracing or Perfetto to folder/trace.json and the ms per step of each
    part to folder/parts.json, and logs a table.
    """

    def __init__(self, loader: Iterable[Batch], step: TrainingStep, folder: Path) -> None:
        self.loader, self.step, self.folder = loader, step, folder

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        for _ in range(WARM * self.step.accumulate):
            yield next(batches)
        self._wait()
        start, waited = time.perf_counter(), 0.0
        for _ in range(TIMED * self.step.accumulate):
            requested = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - requested
            yield batch
        self._wait()
        wall, waited = (time.perf_counter() - start) / TIMED, waited / TIMED
        on_gpu = self.step.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with scopes(self.step), profile(activities=activities) as trace:
            start = time.perf_counter()
            for _ in range(TRACED * self.step.accumulate):
                with record_function(DATA):
                    batch = next(batches)
                yield batch
            self._wait()
            traced = (time.perf_counter() - start) / TRACED
        events = trace.events()
        times = of_gpu(events, wall, waited) if on_gpu else of_cpu(events, traced)
        with atomic_write(self.folder / "trace.json") as path:
            trace.export_chrome_trace(str(path))
        write_json(self.folder / "parts.json", {name: 1e3 * value for name, value in times.items()})
        log.info("%s: time per step of each part\n%s", self.folder, table(times))
        yield from batches

    def _wait(self) -> None:
        if self.step.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def scopes(step: TrainingStep) -> Iterator[None]:
    """Wrap the methods of the parts in profiler scopes within the context."""
    detector, heads = step.detector, step.detector.roi_heads
    methods: list[tuple[object, str, str]] = [
        (step, "update", "optimizer"),
        (step.optimizer, "zero_grad", "optimizer"),
        (detector.backbone, "forward", "backbone, rest"),
        (detector.pyramid, "forward", "pyramid"),
        (detector.rpn, "forward", "RPN"),
        (detector.rpn, "propose", "RPN"),
        (detector.rpn, "losses", "losses"),
        (heads, "losses", "losses"),
        (heads, "pool", "RoI pooling"),
        *((stage, "forward", "box head") for stage in heads.stages),
    ]
    if heads.mask is not None:
        methods += [(heads.mask, "forward", "mask head"), (heads, "mask_targets", "mask head")]
    for module in detector.backbone.modules():
        if isinstance(module, Attention | Mlp):
            part = "attention" if isinstance(module, Attention) else "MLP"
            methods.append((module, "forward", part))
    with ExitStack() as undo:
        for owner, name, part in methods:
            setattr(owner, name, record_function(part)(getattr(owner, name)))
            undo.callback(delattr, owner, name)
        yield


def of_gpu(events: Iterable[FunctionEvent], wall: float, waited: float) -> dict[str, float]:
    """Return {part: seconds per step}; wall: a step's duration; waited: its wait for data (s)."""
    events = list(events)
    host = [event for event in events if event.device_type == DeviceType.CPU]
    part_of, names = part_lookup(host), {event.name for event in host}
    found = dict.fromkeys(PARTS, 0.0)
    for event in host:
        for kernel in event.kernels:
            if kernel.name not in names:  # scopes also have events on the GPU
                found[part_of(event)] += kernel.duration / 1e6 / TRACED
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type != DeviceType.CPU and event.name not in names
    ]
    idle = max(wall - union(spans) / 1e6 / TRACED, 0.0)
    found[DATA] = min(waited, idle)
    found[IDLE] = idle - found[DATA]
    return found


def of_cpu(events: Iterable[FunctionEvent], wall: float) -> dict[str, float]:
    """Return {part: seconds per step}; the sum is at least `wall`, a step's duration (s)."""
    events = list(events)
    part_of, scoped = part_lookup(events), set(PARTS)
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.name not in scoped or event.name == DATA:
            found[part_of(event)] += event.self_cpu_time_total / 1e6 / TRACED
    found[IDLE] = max(wall - sum(found.values()), 0.0)
    return found


def part_lookup(events: list[FunctionEvent]) -> Callable[[FunctionEvent], str]:
    """Return a function that maps a profiler event to its part of the detector."""
    scoped = {**OPERATORS, **{part: part for part in PARTS}}
    forward: dict[int, str] = {}  # autograd sequence number of an operator -> its part

    def part_of(event: FunctionEvent | None) -> str:
        while event is not None:
            if event.name in scoped:
                return scoped[event.name]
            if event.name.startswith(BACKWARD):
                return forward.get(event.sequence_nr, OTHER)
            event = event.cpu_parent
        return OTHER

    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            part = part_of(event)
            if part != OTHER:
                forward[event.sequence_nr] = part
    return part_of


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the total length of the union of spans."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def table(times: dict[str, float]) -> str:
    """Return a table with the milliseconds per step and the share of each part."""
    total = sum(times.values())
    rows = [f"{part:<15}{1e3 * t:9.2f} ms {t / total:6.1%}" for part, t in times.items()]
    return "\n".join([*rows, f"{'step':<15}{1e3 * total:9.2f} ms"])
