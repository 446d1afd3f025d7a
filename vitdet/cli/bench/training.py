"""How fast a training step is: the loop of `vitdet train` on made-up images, a row for a batch size and precision.

The loop asks a stream for batches as it asks the loader; the stream notes when. A step is the time between two requests,
on a GPU in the order of its work, so that the copy of the batch, the optimizer and the average of the weights count and
evaluation, saving and logs do not. One batch is used again and again; `synthetic` says what is in it.
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
from vitdet.cli.bench.measurement import GIB, Clock, counted, forward_flops, measured, peak_memory
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

# steps before the measured ones: memory is allocated, kernels are chosen, parts are compiled and graphs recorded
WARM = {"cuda": 12, "cpu": 2}
COUNTED = 2  # steps whose kernels are counted, after the measured ones
# what is not measured comes after more steps than there are
RARELY = [f"train.{key}={10**9}" for key in ("log_every", "save_every", "eval_every")]


class Measured(Exception):
    """The stream has seen enough steps; ends the loop."""


class Stream:
    """The batch, as often as it takes to measure `steps` steps of `parts` batches each."""

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
    """What `measurement.measured` returns, of training steps."""
    needed = WARM[device.type] + steps + COUNTED + 1
    config = override(config, [f"optim.steps={max(config.optim.steps, needed)}", *RARELY])

    def measure(settings: Config, _: str, size: int) -> dict:
        return measure_steps(override(settings, [f"train.batch_size={size}"]), steps, device)

    flops = training_flops(config, device)
    return measured(config, "train", sizes, precisions, device, flops, measure)


def measure_steps(config: Config, steps: int, device: torch.device) -> dict:
    """The measurements of one batch size and precision: ms (median) a step, images_per_second (mean), peak_gib, counts."""
    detector = new_detector(config, device).train()
    parts = config.train.accumulate
    batch = images_for(config, config.train.batch_size // parts)
    lay_on_objects(detector, batch, device)
    stream, stop = Stream(batch, device, steps, parts), Stop()
    peak = peak_memory(device)
    saver = Saver(Checkpoints(Path(), 1))  # nothing is saved
    loop = Loop(
        config, detector, stream, Tracker(), saver, {}, device, stop, Watchdog(stop), Path()
    )
    with suppress(Measured):
        loop.run(0)
    times = stream.clock.milliseconds()
    row: dict[str, Any] = {}
    try:
        loop.meter.state()
    except ValueError as error:  # of losses that are not finite; the times stand nevertheless
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
    """FLOPs an image of a training step, whose backward pass takes twice the products of the forward pass."""
    detector, batch = new_detector(config, device).train(), images_for(config, 1)
    lay_on_objects(detector, batch, device)
    moved = batch.to(device)
    used = chosen(config.train.precision, device)
    with autocast(used, device):
        return 3 * forward_flops(
            detector, lambda: detector(moved.images, moved.targets, moved.sizes)
        )


def new_detector(config: Config, device: torch.device) -> Detector:
    """The recipe's detector with random weights, drawn on the device."""
    torch.manual_seed(config.train.seed)
    with device:
        return build_detector(config.model, config.evaluate).to(device)


def images_for(config: Config, size: int) -> Batch:
    """A batch of made-up images of the recipe's size and number of classes."""
    return make_images(size, config.data.image_size, config.model.roi_heads.num_classes)
