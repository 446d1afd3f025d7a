"""The shared layers against torch's general layers."""

import pytest
import torch
from torch import nn

from vitdet.config import load_config
from vitdet.models import build_detector
from vitdet.models.layers import Deconv2x2, LayerNorm, LayerNorm2d, scale_gradient


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


@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_of_norms_are_summed_in_float32_in_bf16(contiguous: bool) -> None:
    """In bf16, a sum over 64 x 14 x 14 positions would be wrong by about 10%."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 16, 14, 14).bfloat16()
    x, weight = (t if contiguous else t.to(memory_format=torch.channels_last) for t in (x, weight))
    norm = LayerNorm2d(16)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    (found * weight).sum().backward()
    exact = nn.LayerNorm(16).double()
    wanted = exact(x.double().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    (wanted * weight.double()).sum().backward()
    assert (found - wanted).abs().max() < 1e-5
    for ours, theirs in zip(norm.parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm()


@pytest.mark.parametrize(
    "recipe", ["vitdet_b", "vitdet_b_residual", "vitae_s", "vitaev2_s", "swin_t"]
)
def test_every_norm_of_channels_computes_in_the_precision_of_its_weights(recipe: str) -> None:
    with torch.device("meta"):
        detector = build_detector(load_config(f"mask_rcnn_{recipe}_coco").model)
    norms = [module for module in detector.modules() if isinstance(module, nn.LayerNorm)]
    assert norms and all(isinstance(norm, LayerNorm) for norm in norms)
