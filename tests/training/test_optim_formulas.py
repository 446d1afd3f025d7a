"""Optimizer steps of a detector against the formulas of AdamW, clipping and the schedule in float64.

The gradients are fixed, so nothing depends on a network's rounding. Special cases:
a gradient of exactly 0 with zero moments moves a weight by its decay alone; a step that equals the end
of the warm-up has the full rate; a step that equals a milestone has the lower rate; gradients are
scaled by min(1, clip / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.case import build
from vitdet.config import OptimConfig
from vitdet.training.optim import build_optimizer, clip_gradients, lr_factor, set_lr

GOLDEN = Path(__file__).parents[1] / "golden" / "maskrcnn_coco"
DEPTH, STEPS = 4, 10
SETTINGS = OptimConfig(
    lr=1e-3,
    weight_decay=0.1,
    layer_decay=0.7,
    steps=STEPS,
    warmup_steps=3,
    warmup_factor=0.001,
    milestones=(0.6, 0.85),  # steps 6 and 8: 8.5 is rounded to even
    clip=0.5,
)
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
# expected lr_factor of each step
FACTORS = [0.001, 0.334, 0.667, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]


def scale_and_decay(name: str) -> tuple[float, float]:
    """Return a parameter's learning rate factor and weight decay, computed from its name."""
    scale = 1.0
    if block := re.match(r"backbone\.blocks\.(\d+)\.", name):
        scale = 0.7 ** (DEPTH - int(block[1]))
    elif name.startswith(("backbone.patch_embed.", "backbone.pos_embed")):
        scale = 0.7 ** (DEPTH + 1)
    exempt = re.match(r"backbone\.(pos_embed$|blocks\.\d+\.norm[12]\.)", name)
    return scale, 0.0 if exempt else 0.1


def gradient(name: str, shape: torch.Size, step: int) -> np.ndarray:
    """Return a random float32 gradient, small enough at every third step to avoid clipping."""
    rng = np.random.default_rng([step, *name.encode()])
    values = rng.standard_normal(tuple(shape)) * (1e-4 if step % 3 == 2 else 1e-2)
    values[rng.random(tuple(shape)) < 0.05] = 0.0
    if name.endswith("attn.rel_pos_h"):
        values[:] = 0.0  # zero gradient: only decay
    return values.astype(np.float32).astype(np.float64)


class Reference:
    """AdamW with clipping, layer-wise rates and the schedule in float64."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        self.first = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.bound = 0

    def step(self, gradients: dict[str, np.ndarray], step: int) -> None:
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = min(1.0, 0.5 / (norm + 1e-6))
        self.bound += factor < 1
        for name, g in gradients.items():
            scale, decay = scale_and_decay(name)
            lr, g = 1e-3 * FACTORS[step] * scale, g * factor
            self.weights[name] = self.weights[name] * (1 - lr * decay)
            self.first[name] = BETA1 * self.first[name] + (1 - BETA1) * g
            self.second[name] = BETA2 * self.second[name] + (1 - BETA2) * g**2
            mean = self.first[name] / (1 - BETA1 ** (step + 1))
            variance = self.second[name] / (1 - BETA2 ** (step + 1))
            self.weights[name] = self.weights[name] - lr * mean / (np.sqrt(variance) + EPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_of_a_detector_follows_its_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    detector = build(json.loads((GOLDEN / "config.json").read_text())).to(dtype)
    parameters = dict(detector.named_parameters())
    start = {name: p.detach().double().numpy().copy() for name, p in parameters.items()}
    reference, optimizer = Reference(dict(start)), build_optimizer(detector, SETTINGS)
    for step in range(STEPS):
        gradients = {name: gradient(name, p.shape, step) for name, p in parameters.items()}
        for name, p in parameters.items():
            p.grad = torch.tensor(gradients[name], dtype=dtype)
        set_lr(optimizer, step, SETTINGS)
        clip_gradients(detector, SETTINGS.clip)
        optimizer.step()
        reference.step(gradients, step)
        for name, p in parameters.items():
            theirs = reference.weights[name]
            # float64: only rounding. float32: a step rounds the weight once or twice (relative 2^-23),
            # and the update itself, at most about lr, has a relative error of 1e-5.
            absolute, relative = 1e-15, 1e-13
            if dtype is torch.float32:
                absolute, relative = 1e-5 * SETTINGS.lr * (step + 1), 2.0**-23 * 2 * (step + 1)
            ours = p.detach().double().numpy()
            np.testing.assert_allclose(ours, theirs, relative, absolute, err_msg=name)
    assert 0 < reference.bound < STEPS  # clipped at some steps only
    for name, weight in start.items():  # rel_pos_h starts at 0 and gets no gradient
        assert (reference.weights[name] != weight).any() == (not name.endswith("attn.rel_pos_h"))


def test_parameters_without_a_gradient_only_decay() -> None:
    torch.manual_seed(0)
    detector = build(json.loads((GOLDEN / "config.json").read_text())).double()
    parameters = dict(detector.named_parameters())
    name = "backbone.blocks.1.attn.rel_pos_h"
    with torch.no_grad():
        parameters[name].normal_()
    before = parameters[name].detach().clone()
    optimizer = build_optimizer(detector, SETTINGS)
    for key, p in parameters.items():
        p.grad = torch.from_numpy(gradient(key, p.shape, 0))
    set_lr(optimizer, 3, SETTINGS)
    optimizer.step()
    scale, decay = scale_and_decay(name)
    expected = before * (1 - SETTINGS.lr * scale * decay)
    torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-15, atol=0)


def test_the_schedule_equals_the_expected_factors() -> None:
    found = [lr_factor(step, SETTINGS) for step in range(STEPS)]
    assert found == pytest.approx(FACTORS, rel=1e-12)
    # the end of the warm-up, and the last step before a milestone
    assert found[3] == 1.0 and found[5] == 1.0
