"""The shared layers against the general layers that they specialize."""

import pytest
import torch
from torch import nn

from vitdet.models.layers import ConvNorm, Deconv2x2, at_least_float32, scale_gradient


def test_deconv_equals_the_general_transposed_convolution():
    torch.manual_seed(0)
    ours = Deconv2x2(6, 5)
    general = nn.ConvTranspose2d(6, 5, kernel_size=2, stride=2)
    general.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, wanted = ours(x), general(y)
    assert found.shape == (2, 5, 6, 8)
    assert torch.allclose(found, wanted, atol=1e-6)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert torch.allclose(ours.weight.grad, general.weight.grad, atol=1e-5)
    assert torch.allclose(ours.bias.grad, general.bias.grad, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_conv_norm_normalizes_the_channels_of_each_pixel(eps):
    torch.manual_seed(0)
    layer = ConvNorm(4, 8, 3, norm=True, eps=eps)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, 4, 5, 6)
    y = nn.functional.conv2d(x, layer.conv.weight, padding=1)
    mean, variance = y.mean(dim=1, keepdim=True), y.var(dim=1, correction=0, keepdim=True)
    wanted = (y - mean) / (variance + eps).sqrt()
    wanted = wanted * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert layer.conv.bias is None


def test_conv_without_norm_has_a_bias():
    layer = ConvNorm(4, 8, 1, norm=False, eps=1e-6)
    nn.init.normal_(layer.conv.bias)
    x = torch.randn(2, 4, 5, 6)
    wanted = torch.einsum("bchw,dc->bdhw", x, layer.conv.weight[:, :, 0, 0])
    assert torch.allclose(layer(x), wanted + layer.conv.bias[:, None, None], atol=1e-5)
    assert set(layer.state_dict()) == {"conv.weight", "conv.bias"}


def test_scaled_gradient_leaves_the_values():
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    assert y.data_ptr() == x.data_ptr()  # no copy of pooled features
    weight = torch.randn(5)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight * 0.25)


def test_at_least_float32():
    given = torch.bfloat16, torch.float32, torch.float64
    kinds = [at_least_float32(torch.zeros(1, dtype=kind)).dtype for kind in given]
    assert kinds == [torch.float32, torch.float32, torch.float64]
