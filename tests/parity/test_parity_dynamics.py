"""The first optimizer step from a golden case is checked, and the other steps are printed."""

import copy

import numpy as np
import pytest
import torch

from tests.parity import dynamics
from tests.parity.conftest import write
from tests.parity.report import Report
from tests.parity.test_parity import GOLDEN, computed, read

RUNS = [kind for kind, value in read("dynamics", "losses.json").items() if isinstance(value, list)]


@pytest.fixture
def failures(tmp_path):
    """Return failures(content, start): the number of failures of the comparison, and its lines.

    The case stores `content`; the detector case that its steps start from has the losses `start`.
    """

    def count(content, start=None):
        for name, losses in (("dynamics", content), (dynamics.START, start)):
            (tmp_path / name).mkdir()
            write(tmp_path / name / "losses.json", losses or read(name, "losses.json"))
        report = Report("dynamics")
        dynamics.compare(tmp_path / "dynamics", computed("dynamics"), report)
        return report.failures, report.lines

    return count


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("loss", read("dynamics", "losses.json")["bitmask"][0])
def test_a_change_of_any_loss_before_the_first_step_fails(failures, kind, loss):
    content = read("dynamics", "losses.json")
    content[kind][0][loss] *= 1.02 if (kind, loss) == ("polygon", "loss_mask") else 1.0001
    assert failures(content)[0] == 1


@pytest.mark.parametrize("kind", ["grad_norms_float64", "grad_sums"])
def test_a_change_of_the_first_steps_gradients_fails(failures, kind):
    content = read(dynamics.START, "losses.json")
    name = max(content[kind], key=lambda name: abs(content[kind][name]))
    content[kind][name] *= 1.01
    assert failures(None, content)[0] == 1


def test_the_other_steps_are_printed_and_do_not_fail(failures):
    """Steps 1 to 19 and the final norms depend on the processor."""
    content = read("dynamics", "losses.json")
    for kind in RUNS:
        for losses in content[kind][1:]:
            losses["loss_cls"] *= 1.5
    content["final_norms_bitmask"]["backbone.simfp_2.0.weight"] *= 1.1
    count, lines = failures(content)
    assert count == 0
    theirs = content["bitmask"][3]["loss_cls"]
    ours = computed("dynamics").runs["bitmask"].losses[3]["loss_cls"]
    line = f"  info  dynamics.bitmask.3.loss_cls: {ours:.6g}, reference {theirs:.6g}, "
    assert f"{line}{(ours - theirs) / theirs:+.2%}" in lines
    assert sum(line.startswith("  info  dynamics.bitmask.19.") for line in lines) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "Adam"},
        {"bitmask": []},
        {"bitmask": read("dynamics", "losses.json")["bitmask"] * 2},
        {"bitmask": [{"loss_cls": 1.0}]},
        {"polygon": [*read("dynamics", "losses.json")["polygon"][:7], {"loss_other": 1.0}]},
        {"surprise": 1},
        {"final_norms_bitmask": {}},
    ],
)
def test_invalid_entries_of_dynamics_fail(failures, change):
    assert failures(read("dynamics", "losses.json") | change)[0] > 0


def test_a_loss_that_is_not_finite_fails():
    found = copy.deepcopy(computed("dynamics"))
    found.runs["polygon"].losses[12]["loss_mask"] = float("nan")
    report = Report("dynamics")
    dynamics.compare(GOLDEN / "dynamics", found, report)
    assert report.failures == 1


def test_sgd_of_the_dynamics_follows_its_formula():
    """v <- momentum v + g, w <- w - lr v, in float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    momenta = {name: np.zeros_like(weight) for name, weight in weights.items()}
    optimizer = dynamics.sgd(model)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            momenta[name] = 0.9 * momenta[name] + p.grad.numpy()
            weights[name] = weights[name] - 2e-3 * momenta[name]
            np.testing.assert_allclose(p.detach().numpy(), weights[name], rtol=0, atol=1e-15)
