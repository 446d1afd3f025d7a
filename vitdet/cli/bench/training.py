"""Speed of training steps, measured in the loop of `vitdet train` on synthetic images.

The loop reads batches from a `Stream` instead of the loader; the stream records when each step
requests its first batch. The time of a step is the time from this request to that of the next step,
measured with CUDA events on a GPU. The time includes copying the batch to the device, the optimizer
step and weight averaging, but no evaluation, saving or logging. All steps use the same batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vitdet.checkpoint import Checkpoints
from vitdet.cli.bench.measurement import (
    COUNTED,
    GIB,
    Clock,
    counted,
    forward_flops,
    measured,
    peak_memory,
)
from vitdet.cli.bench.synthetic import lay_on_objects, make_images
from vitdet.config import Config, override
from vitdet.models import Detector, build_detector
from vitdet.tracking.tracker import Tracker
from vitdet.training.precision import autocast, chosen
from vitdet.training.saver import Saver
from vitdet.training.stop import Stop
from vitdet.training.trainer import Loop
from vitdet.training.watchdog import Watchdog
from vitdet.types import Batch

# device type -> number of warm-up steps, in which memory is allocated and kernels are compiled
WARM = {"cuda": 12, "cpu": 2}
# disable logging, saving and evaluation with intervals longer than the measurement
RARELY = [f"train.{key}={10**9}" for key in ("log_every", "save_every", "eval_every")]


class Measured(Exception):
    """Raised by `Stream` to end the loop after the last step."""


class Stream:
    """Yield the same batch repeatedly and measure `steps` steps of `parts` micro-batches each."""

    def __init__(self, batch: Batch, device: torch.device, steps: int, parts: int) -> None:
        self.step, self.device, self.steps = [batch] * parts, device, steps
        self.clock, self.counts = Clock(device), dict[str, float]()
        self.warm_up = 0.0  # seconds

    def __iter__(self) -> Iterator[Batch]:
        start = time.perf_counter()
        for _ in range(WARM[self.device.type]):
            yield from self.step
        self.warm_up = time.perf_counter() - start
        for _ in range(self.steps):
            self.clock.mark()
            yield from self.step
        self.clock.mark()
        with counted(self.device, COUNTED) as self.counts:
            for _ in range(COUNTED if self.device.type == "cuda" else 0):
                yield from self.step
        raise Measured


def measure_training(
    config: Config, sizes: list[int], precisions: list[str], steps: int, device: torch.device
) -> dict:
    """Measure training steps for these batch sizes and precisions; see `measurement.measured`."""
    needed = WARM[device.type] + steps + COUNTED + 1
    config = override(config, [f"optim.steps={max(config.optim.steps, needed)}", *RARELY])

    def measure(settings: Config, _: str, size: int) -> dict:
        return measure_steps(override(settings, [f"train.batch_size={size}"]), steps, device)

    flops = training_flops(config, device)
    return measured(config, "train", sizes, precisions, device, flops, measure)


def measure_steps(config: Config, steps: int, device: torch.device) -> dict:
    """Return the table row for one batch size and precision; see `measurement.call_row`.

    Additional keys: reserved_gib (GPU memory reserved by torch's allocator) and warm_up_s.
    """
    detector = new_detector(config, device).train()
    parts = config.train.accumulate
    batch = images_for(config, config.train.batch_size // parts)
    lay_on_objects(detector, batch, device)
    stream, stop = Stream(batch, device, steps, parts), Stop()
    peak = peak_memory(device)
    saver = Saver(Checkpoints(Path(), 1))  # the loop requires a saver; this one never saves
    loop = Loop(
        config, detector, stream, Tracker(), saver, {}, device, stop, Watchdog(stop), Path()
    )
    with suppress(Measured):
        loop.run(0)
    times = stream.clock.milliseconds()
    row: dict[str, Any] = {}
    try:
        loop.meter.state()
    except ValueError as error:  # the losses are not finite; the times are valid nevertheless
        row["error"] = str(error)
    return {
        **row,
        "ms": statistics.median(times),
        "images_per_second": 1e3 * config.train.batch_size / statistics.mean(times),
        "peak_gib": peak(),
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if device.type == "cuda" else None,
        "warm_up_s": stream.warm_up,
        **stream.counts,
    }


def training_flops(config: Config, device: torch.device) -> float:
    """Return a training step's FLOPs per image; the backward pass counts as two forward passes."""
    detector, batch = new_detector(config, device).train(), images_for(config, 1)
    lay_on_objects(detector, batch, device)
    sample = batch.to(device)
    inputs = sample.images, sample.targets, sample.sizes
    with autocast(chosen(config.train.precision, device), device):
        return 3 * forward_flops(detector, lambda: detector(*inputs))


def new_detector(config: Config, device: torch.device) -> Detector:
    """Return the recipe's detector with random weights on the device."""
    torch.manual_seed(config.train.seed)
    with device:
        return build_detector(config.model, config.evaluate).to(device)


def images_for(config: Config, size: int) -> Batch:
    """Return a batch of synthetic images with the recipe's image size and number of classes."""
    return make_images(size, config.data.image_size, config.model.roi_heads.num_classes)
