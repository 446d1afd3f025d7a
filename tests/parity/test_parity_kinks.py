"""A ReLU at 0 has the gradient of the float64 run, and nothing else of a network changes."""

import torch
from torch.nn import functional as F

from tests.parity.kinks import TIE, recorded, replayed

EXACT = torch.tensor([1.0, 0.5 * TIE, 0.5 * TIE, -0.5 * TIE, 3 * TIE, -3 * TIE, -1.0])
ROUNDED = torch.tensor([1.0, 0.4 * TIE, -0.3 * TIE, 0.2 * TIE, -3 * TIE, 3 * TIE, -1.0])


def gradients(values):
    x = values.clone().requires_grad_()
    out = F.relu(x)
    out.sum().backward()
    return out.detach(), x.grad


def test_a_tie_has_the_recorded_gradient_and_an_unchanged_value():
    with recorded() as sides:
        F.relu(EXACT.double())
    with replayed(sides) as changed:
        out, grad = gradients(ROUNDED)
    assert changed == [2]
    assert torch.equal(out, ROUNDED.clamp(min=0))
    # The third and fourth follow float64; the fifth and sixth do not, as they exceed the noise.
    assert grad.tolist() == [1, 1, 1, 0, 0, 1, 0]


def test_relus_without_a_recorded_counterpart_do_not_change():
    with recorded() as sides:
        F.relu(EXACT[:3])
    with replayed(sides) as changed:
        first, second = gradients(ROUNDED), gradients(ROUNDED)
    assert not any(changed)
    for out, grad in (first, second):
        assert torch.equal(out, ROUNDED.clamp(min=0)) and torch.equal(grad, (ROUNDED > 0).float())


def test_relu_is_restored_afterwards():
    plain = F.relu
    try:
        with recorded():
            raise ValueError
    except ValueError:
        pass
    with replayed([]):
        assert F.relu is not plain
    assert F.relu is plain
