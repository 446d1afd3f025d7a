"""One step of the optimizer: forward and backward, then clipping, the weights and their average.

A step has `train.accumulate` micro-batches. Micro-batch k of rank r draws and normalises as rank
r * accumulate + k of a training with accumulate times as many processes; the gradients are averaged over all
micro-batches of all processes, with one exchange, in the last one.

In fp16 the losses are multiplied by a scale, so that small gradients do not become zero. Where a gradient overflows, or a
loss already, the scale is halved and the weights and BatchNorm's statistics stay as they are: such a step is skipped. It
counts as a step: learning rate, data and
random draws of the next one are those of the next step, and the average of the weights is updated.
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

LONG_RUN = 1000  # steps from which train.compile=auto compiles: about 90 s for a third of the time
LEAST_SCALE = 2.0**-14  # of the losses; it begins with 2 ** 16 and halves in each skipped step


class Figures(NamedTuple):
    """What a step gives: its losses and the norm of all gradients, on the device, and its learning rate.

    skipped: whether the step was skipped, a bool tensor on the device; None if the precision skips none.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    skipped: Tensor | None


class TrainingStep:
    """The detector with its optimizer and average, and the step that changes them.

    `forward_backward` computes the gradients of one micro-batch, `update` applies those of a step. Neither reads a value
    from the device.
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
        # which a forward pass that overflows would spoil
        fp16 = self.scaler.is_enabled()
        self.statistics = list(running_statistics(detector).values()) if fp16 else []
        self.model: nn.Module = detector  # what is called; `distribute` wraps it
        self.graphed: GraphedGradients | None = None
        setting = config.train.compile
        if device.type == "cuda" and setting != "never":
            if setting == "always" or config.optim.steps >= LONG_RUN:
                compile_parts(detector)
            if kernels.enabled(next(detector.parameters())) and can_be_graphed(detector):
                self.graphed = GraphedGradients(detector, self.gradients)
            elif distributed.rank() == 0:
                log.info(
                    "training steps run without a CUDA graph: it needs the Triton kernels, and a detector without BatchNorm "
                    "and without activation checkpointing"
                )

    def distribute(self) -> None:
        """Average the gradients of all processes from now on; to be called by all of them, which get the first one's weights."""
        # processors of other makes draw initial weights that differ in their last bits
        weights = (*self.detector.parameters(), *self.detector.buffers())
        distributed.broadcast(one.detach() for one in (*weights, *self.average.weights.values()))
        if self.graphed is None:
            self.model = parallelize(self.detector, self.device, self.accumulate)

    def run(self, step: int, load: Callable[[], Batch], at: Callable[[Stage], None]) -> Figures:
        """Do step `step` (0-based); `load` gives the next micro-batch, `at` is told each stage that begins."""
        lr = set_lr(self.optimizer, step, self.optim)
        # before the activations, which need the memory; a graph's gradients stay where they are
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
                self.graphed.average()
            norm = self.update(step, statistics)
        losses = parts[0]
        if self.accumulate > 1:
            losses = {name: torch.stack([part[name] for part in parts]).mean() for name in losses}
        skipped = ~norm.isfinite() if self.scaler.is_enabled() else None
        return Figures(losses, norm, lr, skipped)

    def forward_backward(self, batch: Batch, at: Callable[[Stage], None]) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch from the loader, its share of the step's, to those there are.

        Gives its losses, detached. `at` is told that the backward pass begins, with which other processes may have to wait for this one.
        """
        if self.device.type != "cuda":
            batch = batch.to(self.device)
            return self.gradients(batch.images, batch.targets, batch.sizes, at)
        # from pinned memory, so that the host does not wait for what the GPU still has to do
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
        """As `forward_backward`, of what lies on the device."""
        with autocast(self.precision, self.device):
            losses = self.model(images, targets, sizes)
        at(Stage.EXCHANGING)
        self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def update(self, step: int, statistics: Sequence[Tensor] = ()) -> Tensor:
        """Clip the gradients and move the weights and their average; the norm of the gradients before that.

        statistics: of BatchNorm before the step, which a skipped step puts back.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.detector, self.optim.clip)
        self.scaler.step(self.optimizer)  # not where a gradient is not finite
        self.scaler.update()
        for buffer, before in zip(self.statistics, statistics, strict=True):
            buffer.copy_(buffer.where(norm.isfinite(), before))
        self.average.update(step)
        return norm

    def release(self) -> None:
        """Give back the memory that only the next step needs again."""
        if self.graphed is not None:
            self.graphed.release()

    def check(self) -> None:
        """Raise ValueError if fp16 skips step after step. Reads the scale from the device."""
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < LEAST_SCALE:
            raise ValueError(
                f"losses or gradients overflow in fp16 at every scale of the losses (now {scale:.1g}): the training "
                "has diverged, or needs a larger range; try a smaller optim.lr, optim.clip=1, or train.precision=bf16 "
                "or fp32"
            )

    def state_dict(self) -> dict[str, dict]:
        """What a training goes on from, besides the weights; scaler: {} if the precision needs none."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave; other keys are ignored."""
        self.optimizer.load_state_dict(state["optimizer"])
        for slots in self.optimizer.state.values() if self.device.type == "cpu" else ():
            slots |= {name: value.clone() for name, value in slots.items()}  # not memory-mapped
        self.average.load_state_dict(state["average"])
        # states before version 3, or of a processor for which `auto` is another precision, have none
        if scaler := state.get("scaler"):
            self.scaler.load_state_dict(scaler)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random draws of one micro-batch; rank: that of a process that computes nothing else."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
