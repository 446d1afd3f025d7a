"""One step of the optimizer: forward and backward, then clipping, the weights and their average."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vitdet import distributed
from vitdet.config import Config
from vitdet.models import Detector
from vitdet.training.optim import WeightAverage, build_optimizer, clip_gradients, set_lr
from vitdet.training.parallel import parallelize
from vitdet.training.precision import chosen, tf32
from vitdet.training.watchdog import Stage
from vitdet.types import Batch


class Figures(NamedTuple):
    """What a step gives: its losses and the norm of all gradients (on the device), and its learning rate."""

    losses: dict[str, Tensor]
    grad_norm: Tensor
    lr: float


class TrainingStep:
    """The detector with its optimizer and average, and the step that changes them.

    `forward_backward` computes the gradients of one batch from tensors alone, `update` applies them;
    nothing in either depends on values on the device.
    """

    def __init__(self, detector: Detector, config: Config, device: torch.device) -> None:
        self.detector, self.config, self.device = detector, config, device
        self.model: nn.Module = detector  # what is called: `distribute` wraps it
        self.precision = chosen(config.train.precision, device)
        self.optimizer = build_optimizer(detector, config.optim)
        self.average = WeightAverage(detector, config.optim.ema)

    def distribute(self) -> None:
        """Average the gradients of all processes from now on; all of them call it, with equal weights."""
        self.model = parallelize(self.detector, self.device)

    def run(self, step: int, load: Callable[[], Batch], at: Callable[[Stage], None]) -> Figures:
        """Do step `step` (0-based) on the batch that `load` gives; `at` is told each stage that begins."""
        batch = load()
        at(Stage.COMPUTING)
        torch.manual_seed(step_seed(self.config.train.seed, step, distributed.rank()))
        lr = set_lr(self.optimizer, step, self.config.optim)
        self.optimizer.zero_grad()  # before the activations, which need the memory
        with tf32(self.precision, self.device):
            losses = self.forward_backward(batch, lambda: at(Stage.EXCHANGING))
            norm = self.update(step)
        return Figures(losses, norm, lr)

    def forward_backward(
        self, batch: Batch, begin_backward: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch to those there are; the losses, detached. Calls `begin_backward` in between."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.model(batch.images, batch.targets, batch.sizes)
        begin_backward()
        sum(losses.values()).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def update(self, step: int) -> Tensor:
        """Clip the gradients and move the weights and their average; the norm before it."""
        norm = clip_gradients(self.detector, self.config.optim.clip)
        self.optimizer.step()
        self.average.update(step)
        return norm

    def state_dict(self) -> dict[str, dict]:
        """What a training goes on from, besides the weights."""
        return {"optimizer": self.optimizer.state_dict(), "average": self.average.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave; other keys are ignored."""
        self.optimizer.load_state_dict(state["optimizer"])
        for slots in self.optimizer.state.values() if self.device.type == "cpu" else ():
            slots |= {name: value.clone() for name, value in slots.items()}  # not memory-mapped
        self.average.load_state_dict(state["average"])


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random draws of one step in one process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
