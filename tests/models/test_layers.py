"""The shared layers against torch's general layers."""

import torch
from torch import nn

from vitdet.models.layers import Deconv2x2, scale_gradient


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


def test_scaling_gradients_keeps_the_values():
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    assert y.data_ptr() == x.data_ptr()  # no copy of pooled features
    weight = torch.randn(5)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight * 0.25)
