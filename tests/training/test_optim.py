"""Parameter groups, schedule and EMA; tests/weights/test_recipes.py checks published values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vitdet.config import Config, OptimConfig, load_config, recipes
from vitdet.models import build_detector
from vitdet.training.optim import (
    WeightAverage,
    build_optimizer,
    clip_gradients,
    lr_factor,
    parameter_groups,
    rate_note,
    scaled,
    set_lr,
)


def test_parameter_groups_may_decay_all_weights_and_omit_frozen_weights() -> None:
    with torch.device("meta"):
        detector = build_detector(Config().model)
    detector.backbone.pos_embed.requires_grad_(False)
    found = parameter_groups(detector, OptimConfig(undecayed="nothing"))
    assert {group["weight_decay"] for group in found} == {0.1}
    assert not any("backbone.pos_embed" in group["names"] for group in found)


def test_the_step_schedule_equals_literal_values() -> None:
    steps = (0, 125, 249, 250, 163_888, 163_889, 177_545, 177_546, 184_374)
    found = [lr_factor(step, Config().optim) for step in steps]
    assert found == pytest.approx([0.001, 0.5005, 0.996004, 1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-9)


def test_the_cosine_schedule_decreases_after_the_warm_up() -> None:
    settings = OptimConfig(schedule="cosine", steps=100, warmup_steps=10, warmup_factor=0.0)
    factors = [lr_factor(step, settings) for step in range(100)]
    warming = 0.5 * 0.5 * (1 + math.cos(math.pi * 0.05))
    assert factors[0] == 0 and factors[5] == pytest.approx(warming)
    assert factors[50] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(0, OptimConfig(warmup_steps=0)) == 1


def test_every_group_follows_the_schedule() -> None:
    with torch.device("meta"):
        detector = build_detector(Config().model)
    settings = OptimConfig(lr=0.5)
    optimizer = build_optimizer(detector, settings)
    assert set_lr(optimizer, 163_889, settings) == pytest.approx(0.05)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {scale: pytest.approx(0.05 * scale) for scale in rates} and len(rates) == 14
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_the_learning_rate_is_scaled_by_the_batch_size_only_on_request() -> None:
    told, untold = OptimConfig(lr=1e-4, scale_lr=True), OptimConfig(lr=1e-4)
    for size, lr in ((64, 1e-4), (16, 2.5e-5), (256, 4e-4)):
        assert scaled(told, size).lr == pytest.approx(lr)
        assert scaled(untold, size) == untold
    own = OptimConfig(lr=2e-3, scale_lr=True, lr_batch_size=8)
    assert scaled(own, 4).lr == pytest.approx(1e-3) and scaled(own, 8).lr == 2e-3


def test_another_batch_size_is_explained_in_one_line() -> None:
    assert rate_note(OptimConfig(), 64) == rate_note(OptimConfig(scale_lr=True), 64) == ""
    size = "optim.lr=0.0001 is for a batch size of 64, but train.batch_size is 16"
    scaling = f"{size}: optim.scale_lr scales it to 2.5e-05"
    assert rate_note(OptimConfig(scale_lr=True), 16) == scaling
    assert rate_note(OptimConfig(), 16) == (
        f"{size}: optim.lr is not scaled; set optim.scale_lr=true to scale it to 2.5e-05, or "
        "optim.lr_batch_size=16 if optim.lr is for this batch size"
    )


@pytest.mark.parametrize("name", recipes())
def test_the_learning_rate_of_a_recipe_is_for_its_batch_size(name: str) -> None:
    config = load_config(name)
    assert rate_note(config.optim, config.train.batch_size) == ""


def test_evaluation_swaps_the_average_in_and_restores_the_weights() -> None:
    model = nn.Linear(2, 1, bias=False)
    average = WeightAverage(model, 0.5)
    seen = [model.weight.detach().clone()]
    for step in range(4):
        with torch.no_grad():
            model.weight.add_(torch.tensor([[1.0, -2.0]]))
        seen.append(model.weight.detach().clone())
        average.update(step)
    expected = seen[0]
    for step, weight in enumerate(seen[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    average.swap()
    assert torch.allclose(model.weight, expected)
    assert model.weight is average.source["weight"]  # the optimizer and DDP refer to this tensor
    average.swap()
    assert torch.equal(model.weight, seen[-1])


def test_the_average_is_restored_exactly_or_refused() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    average.update(5)
    other = WeightAverage(nn.Linear(2, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(other.weights[name], average.weights[name]) for name in average.weights)
    for state in ({}, {"weight": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="belongs to a different model"):
            other.load_state_dict(state)


def test_without_decay_there_is_no_average() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.0)
    average.update(0)
    before = model.weight.detach().clone()
    average.swap()
    assert torch.equal(model.weight, before) and average.state_dict() == {}


@pytest.mark.parametrize(("scale", "largest"), [(1.0, 0.0), (1e30, 0.0), (1.0, 0.5), (1.0, 100.0)])
def test_gradients_are_clipped_only_with_a_maximum_norm(scale, largest):
    model = nn.Linear(3, 2)
    model.weight.grad = torch.arange(6.0).view(2, 3) * scale
    before = model.weight.grad.clone()
    norm = clip_gradients(model, largest)
    if scale == 1.0:
        assert norm.item() == pytest.approx(55**0.5)
    else:
        assert norm.isinf()  # the sum of squares exceeds float32, although the gradients are finite
    wanted = before * 0.5 / 55**0.5 if largest == 0.5 else before
    assert torch.allclose(model.weight.grad, wanted, rtol=1e-5)
