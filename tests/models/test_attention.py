"""Attention with decomposed relative positions against its formula, and windows."""

import numpy as np
import pytest
import torch

from tests.helpers import parts
from tests.helpers.far import far_device, send
from vitdet.models import attention as module
from vitdet.models.attention import join_windows, relative_positions, split_windows, widen
from vitdet.models.vit import SIZES


def table_for(table, size):
    """Return the table's rows for a grid of `size`, interpolated with half-pixel centers."""
    length, wanted = len(table), 2 * size - 1
    at = (np.arange(wanted) + 0.5) * length / wanted - 0.5
    return np.stack([np.interp(at, np.arange(length), column) for column in table.T], axis=1)


def plain_attention(attention, x):
    """Return softmax(q k / sqrt(d) + q Rh + q Rw) v by loops over queries and keys."""
    weights = {
        name: value.detach().double().numpy() for name, value in attention.named_parameters()
    }
    batch, height, width, channels = x.shape
    heads, depth = attention.heads, channels // attention.heads
    rows, columns = table_for(weights["rel_pos_h"], height), table_for(weights["rel_pos_w"], width)
    places = [(i, j) for i in range(height) for j in range(width)]
    out = np.zeros(x.shape)
    for b in range(batch):
        qkv = (
            x[b].double().numpy().reshape(-1, channels) @ weights["qkv.weight"].T
            + weights["qkv.bias"]
        )
        q, k, v = qkv.reshape(-1, 3, heads, depth).transpose(1, 2, 0, 3)
        mixed = np.zeros((heads, len(places), depth))
        for head in range(heads):
            logits = q[head] @ k[head].T / depth**0.5
            for m, (qh, qw) in enumerate(places):
                for n, (kh, kw) in enumerate(places):
                    logits[m, n] += (
                        q[head, m] @ rows[qh - kh + height - 1]
                        + q[head, m] @ columns[qw - kw + width - 1]
                    )
            share = np.exp(logits - logits.max(axis=1, keepdims=True))
            mixed[head] = share / share.sum(axis=1, keepdims=True) @ v[head]
        joined = mixed.transpose(1, 0, 2).reshape(-1, channels)
        out[b] = (joined @ weights["proj.weight"].T + weights["proj.bias"]).reshape(
            height, width, channels
        )
    return out


def random_attention(size, dim=12, heads=3, scaled=False):
    torch.manual_seed(0)
    attention = parts.attention(dim, heads, size, scaled)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.mark.parametrize(
    ("size", "grid"), [(4, (4, 4)), (5, (3, 5)), (4, (6, 7)), (6, (2, 3)), (1, (1, 1)), (3, (1, 4))]
)
def test_attention_equals_its_formula_on_any_grid(size, grid):
    attention = random_attention(size)
    x = torch.randn(2, *grid, 12)
    np.testing.assert_allclose(
        attention(x).detach().numpy(), plain_attention(attention, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("grid", [(3, 5), (5, 4)])
def test_tables_may_differ_between_height_and_width(grid):
    attention = random_attention((3, 5))
    assert (len(attention.rel_pos_h), len(attention.rel_pos_w)) == (5, 9)
    x = torch.randn(1, *grid, 12)
    np.testing.assert_allclose(
        attention(x).detach().numpy(), plain_attention(attention, x), rtol=1e-4, atol=1e-5
    )


def test_scaled_positions_equal_unscaled_positions_with_scaled_tables():
    attention = random_attention(3, scaled=True)
    x = torch.randn(1, 3, 3, 12)
    found = attention(x).detach().numpy()
    with torch.no_grad():
        attention.rel_pos_h *= 4**-0.5  # 4 channels per head
        attention.rel_pos_w *= 4**-0.5
    np.testing.assert_allclose(found, plain_attention(attention, x), rtol=1e-4, atol=1e-5)


def test_windows_with_padding_equal_the_formula_with_zero_tokens():
    attention = random_attention(3)
    x = torch.randn(1, 4, 5, 12)
    found = join_windows(attention(split_windows(x, 3)), (4, 5)).detach().numpy()
    padded = torch.zeros(1, 6, 6, 12)
    padded[:, :4, :5] = x
    for top in (0, 3):
        for left in (0, 3):
            window = plain_attention(attention, padded[:, top : top + 3, left : left + 3])
            inside = found[:, top : top + 3, left : left + 3]
            np.testing.assert_allclose(
                inside, window[:, : inside.shape[1], : inside.shape[2]], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("side", [14, 64], ids=["windowed", "global"])
@pytest.mark.parametrize("name", SIZES)
def test_fused_kernels_get_supported_widths_in_half_precision(name, side, monkeypatch):
    size = SIZES[name]
    handed = []
    monkeypatch.setattr(
        module, "attend", lambda *given: handed.extend(part.shape[-1] for part in given) or given[2]
    )
    with torch.device("meta"):
        parts.attention(size.dim, size.heads, side).bfloat16()(
            torch.empty(1, side, side, size.dim, dtype=torch.bfloat16)
        )
    query, key, value = handed
    assert query % 8 == value % 8 == 0 and query == key >= value + 2 * side > query - 8


@pytest.mark.parametrize("scaled", [False, True])
def test_widening_changes_no_value_and_no_gradient(scaled):
    attention = random_attention(5, scaled=scaled).double()
    x = torch.randn(2, 5, 5, 12, dtype=torch.float64, requires_grad=True)
    wanted = attention(x)
    wanted.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in attention.parameters())]
    names = [name for name, _ in attention.named_parameters()]
    far = send(random_attention(5, scaled=scaled).double())
    with far_device() as device:
        q, k = torch.ones(2, 1, 3, 25, 4, dtype=torch.float64).to(device)
        query, key = widen(q, k, far.rel_pos_h, far.rel_pos_w, 5, 5, scaled)
        assert query.shape[-1] == key.shape[-1] == 16  # 4 + 5 + 5, padded except on the CPU
        y = x.detach().to(device).requires_grad_()
        found = far(y)
        found.square().sum().backward()
        assert torch.allclose(found.to("cpu"), wanted, rtol=1e-12, atol=1e-12)
        others = [y.grad, *(dict(far.named_parameters())[name].grad for name in names)]
        assert all(
            torch.allclose(a.to("cpu"), b, rtol=1e-9, atol=1e-9)
            for a, b in zip(others, gradients, strict=True)
        )


def test_positions_get_gradients_from_every_row():
    attention = random_attention(3)
    attention(torch.randn(1, 3, 3, 12)).square().sum().backward()
    assert (attention.rel_pos_h.grad.abs().sum(dim=1) > 0).all()
    assert (attention.rel_pos_w.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("height", "width", "size"), [(4, 4, 2), (5, 7, 3), (2, 2, 5), (6, 6, 6), (1, 9, 4)]
)
def test_joining_windows_inverts_splitting(height, width, size):
    x = torch.randn(2, height, width, 3)
    windows = split_windows(x, size)
    assert windows.shape[1:] == (size, size, 3)
    assert torch.equal(join_windows(windows, (height, width)), x)


def test_windows_are_in_row_order_and_zero_padded():
    x = torch.arange(1.0, 13).view(1, 3, 4, 1)
    windows = split_windows(x, 2)[..., 0]
    assert windows.tolist() == [
        [[1, 2], [5, 6]],
        [[3, 4], [7, 8]],
        [[9, 10], [0, 0]],
        [[11, 12], [0, 0]],
    ]


def test_relative_positions_are_query_minus_key():
    table = torch.arange(5.0)[:, None]
    assert relative_positions(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    assert relative_positions(table, 2)[0, 0].item() == 2  # the center row stays in the center
