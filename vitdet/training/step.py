"""One optimizer step: forward, backward, clipping, update of the weights and their average.

A step has n = `train.accumulate` micro-batches. Micro-batch k of rank r uses the random numbers and
the loss normalization of rank r * n + k in a run with n times as many processes. The gradients of
all micro-batches and processes are averaged, and exchanged once per step.

In fp16 the losses are scaled so that small gradients do not underflow. If a loss or gradient
overflows, the scale is halved and the step is skipped: weights and BatchNorm statistics do not
change. A skipped step still advances the learning-rate schedule, the data and the random numbers,
and updates the weight average.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vitdet import distributed, kernels
from vitdet.config import Config
from vitdet.models import Detector
from vitdet.models.compile import compile_parts
from vitdet.training.graph import GraphedGradients, can_be_graphed, padded
from vitdet.training.memory import checkpoint_activations
from vitdet.training.optim import (
    WeightAverage,
    build_optimizer,
    clip_gradients,
    running_statistics,
    scaled,
    set_lr,
)
from vitdet.training.parallel import parallelize, without_exchange
from vitdet.training.precision import autocast, chosen, tf32
from vitdet.training.watchdog import Stage
from vitdet.types import Batch, Target, Targets

log = logging.getLogger(__name__)

LONG_RUN = 1000  # minimum optim.steps for train.compile=auto to compile (takes about a minute)
# loss scale below which training fails; initially 2 ** 16, halved in each skipped step
LEAST_SCALE = 2.0**-14


class Figures(NamedTuple):
    """The result of a step.

    losses and grad_norm (the norm of all gradients before clipping) are tensors on the device.
    skipped is a bool tensor on the device in fp16, and None in bf16 and fp32.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    skipped: Tensor | None


class TrainingStep:
    """The detector with its optimizer and weight average, and the step that updates them.

    `forward_backward` computes the gradients of one micro-batch; `update` applies the gradients.
    """

    def __init__(self, detector: Detector, config: Config, device: torch.device) -> None:
        self.detector, self.device, self.seed = detector, device, config.train.seed
        self.optim = scaled(config.optim, config.train.batch_size)
        self.accumulate = config.train.accumulate
        self.precision = chosen(config.train.precision, device)
        images = config.train.batch_size // (self.accumulate * distributed.world_size())
        checkpoint_activations(detector, config, images, self.precision, device)
        self.optimizer = build_optimizer(detector, self.optim)
        self.average = WeightAverage(detector, self.optim.ema)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        fp16 = self.scaler.is_enabled()  # an overflow corrupts BatchNorm's statistics
        self.statistics = list(running_statistics(detector).values()) if fp16 else []
        self.model: nn.Module = detector  # called in each step; `distribute` may wrap it
        self.graphed: GraphedGradients | None = None
        setting = config.train.compile
        if device.type == "cuda" and setting != "never":
            if setting == "always" or config.optim.steps >= LONG_RUN:
                compile_parts(detector)
            if kernels.enabled(next(detector.parameters())) and can_be_graphed(detector):
                self.graphed = GraphedGradients(detector, self.gradients)
            elif distributed.rank() == 0:
                log.info(
                    "training steps run without a CUDA graph: graphs need the Triton kernels and "
                    "a detector without BatchNorm and without activation checkpointing"
                )

    def distribute(self) -> None:
        """Broadcast rank 0's weights; from now on, average the gradients over all ranks."""
        # initial weights computed on different CPUs may differ in their last bits
        weights = (*self.detector.parameters(), *self.detector.buffers())
        distributed.broadcast(t.detach() for t in (*weights, *self.average.weights.values()))
        if self.graphed is None:
            self.model = parallelize(self.detector, self.device, self.accumulate)

    def run(self, step: int, load: Callable[[], Batch], at: Callable[[Stage], None]) -> Figures:
        """Run step `step` (0-based).

        load: returns the next micro-batch; at: called when a `Stage` begins.
        """
        lr = set_lr(self.optimizer, step, self.optim)
        # free the gradients before the forward pass unless a CUDA graph contains their addresses
        self.optimizer.zero_grad(set_to_none=self.graphed is None)
        parts, statistics = [], [buffer.clone() for buffer in self.statistics]
        with tf32(self.precision, self.device):
            for k in range(self.accumulate):
                batch, last = load(), k + 1 == self.accumulate
                at(Stage.COMPUTING)
                virtual_rank = distributed.rank() * self.accumulate + k
                torch.manual_seed(step_seed(self.seed, step, virtual_rank))
                with nullcontext() if last else without_exchange(self.model):
                    parts.append(self.forward_backward(batch, at if last else lambda _: None))
            if self.graphed is not None:
                distributed.average(self.graphed.gradients())
            norm = self.update(step, statistics)
        losses = parts[0]
        if self.accumulate > 1:
            losses = {name: torch.stack([part[name] for part in parts]).mean() for name in losses}
        skipped = ~norm.isfinite() if self.scaler.is_enabled() else None
        return Figures(losses, norm, lr, skipped)

    def forward_backward(self, batch: Batch, at: Callable[[Stage], None]) -> dict[str, Tensor]:
        """Add a micro-batch's share of the gradients; return the detached losses.

        `at` is called before the ranks exchange gradients.
        """
        if self.device.type != "cuda":
            batch = batch.to(self.device)
            return self.gradients(batch.images, batch.targets, batch.sizes, at)
        # copied from pinned memory, so that the host does not synchronize with the GPU
        images = batch.images.to(self.device, non_blocking=True)
        sizes = batch.sizes.pin_memory().to(self.device, non_blocking=True)
        targets = padded(batch.targets, self.device)
        if self.graphed is None:
            return self.gradients(images, targets, sizes, at)
        losses = self.graphed(images, targets, sizes)
        at(Stage.EXCHANGING)
        return {name: loss.clone() for name, loss in losses.items()}

    def gradients(
        self,
        images: Tensor,
        targets: Targets | Sequence[Target],
        sizes: Tensor,
        at: Callable[[Stage], None] = lambda _: None,
    ) -> dict[str, Tensor]:
        """Do the same as `forward_backward`, for tensors that are already on the device."""
        with autocast(self.precision, self.device):
            losses = self.model(images, targets, sizes)
        at(Stage.EXCHANGING)
        self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def update(self, step: int, statistics: Sequence[Tensor] = ()) -> Tensor:
        """Clip gradients, update the weights and their average; return the unclipped gradient norm.

        statistics: BatchNorm statistics before the step, restored if the step is skipped.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.detector, self.optim.clip)
        self.scaler.step(self.optimizer)  # fp16: skipped if a gradient is not finite
        self.scaler.update()
        for buffer, before in zip(self.statistics, statistics, strict=True):
            buffer.copy_(buffer.where(norm.isfinite(), before))
        self.average.update(step)
        return norm

    def release(self) -> None:
        """Free the memory of the CUDA graphs, which later steps record again."""
        if self.graphed is not None:
            self.graphed.release()

    def check(self) -> None:
        """Raise ValueError if fp16 keeps skipping steps. Synchronizes with the device."""
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < LEAST_SCALE:
            raise ValueError(
                f"losses or gradients overflow in fp16 at every loss scale (now {scale:.1g}): "
                "training has diverged, or needs a larger numeric range; try a smaller optim.lr, "
                "optim.clip=1, or train.precision=bf16 or fp32"
            )

    def state_dict(self) -> dict[str, dict]:
        """Return the states of the optimizer, the weight average and the loss scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; other keys are ignored."""
        self.optimizer.load_state_dict(state["optimizer"])
        for slots in self.optimizer.state.values() if self.device.type == "cpu" else ():
            slots |= {name: value.clone() for name, value in slots.items()}  # not memory-mapped
        self.average.load_state_dict(state["average"])
        # missing from states before version 3; {} in states of bf16 and fp32 runs
        if scaler := state.get("scaler"):
            self.scaler.load_state_dict(scaler)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a micro-batch's random seed; rank: process rank * accumulate + micro-batch index."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
