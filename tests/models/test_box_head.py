"""The box head against its layers one by one, with and without norms."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.parts import box_head


def slow_block(block, x, eps):
    """Compute convolution, optional LayerNorm over each pixel's channels, and ReLU."""
    x = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    if hasattr(block.norm, "weight"):
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, correction=0, keepdim=True)
        x = (x - mean) / (variance + eps).sqrt()
        x = x * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    return x.clamp(min=0)


@pytest.mark.parametrize(
    ("norm", "num_convs", "num_fcs"), [(True, 2, 1), (False, 1, 2), (True, 0, 3)]
)
def test_the_head_equals_its_layers_one_by_one(norm, num_convs, num_fcs):
    torch.manual_seed(0)
    sizes = {"num_convs": num_convs, "num_fcs": num_fcs, "fc_dim": 6, "num_classes": 3}
    head = box_head(channels=4, class_agnostic=False, norm=norm, eps=0.1, **sizes)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    pooled = torch.randn(5, 4, 7, 7)
    hidden = pooled
    for block in head.convs:
        assert (block.conv.bias is None) == norm
        hidden = slow_block(block, hidden, 0.1)
    hidden = hidden.flatten(1)
    for fc in head.fcs:
        hidden = (hidden @ fc.weight.T + fc.bias).clamp(min=0)
    logits, deltas = head(pooled)
    assert len(head.convs) == num_convs and [fc.out_features for fc in head.fcs] == [6] * num_fcs
    exact = 1e-5 * hidden.abs().max().item()
    assert torch.allclose(
        logits, F.linear(hidden, head.logits.weight, head.logits.bias), atol=exact
    )
    wanted = F.linear(hidden, head.deltas.weight, head.deltas.bias).view(5, 3, 4)
    assert torch.allclose(deltas, wanted, atol=exact)


def test_fresh_weights_predict_almost_zero():
    torch.manual_seed(0)
    sizes = {"num_convs": 1, "num_fcs": 2, "fc_dim": 64, "num_classes": 3}
    head = box_head(channels=16, class_agnostic=True, norm=False, **sizes)
    logits, deltas = head(torch.randn(50, 16, 7, 7))
    assert deltas.shape == (50, 1, 4)
    assert logits.abs().max() < 0.5 and deltas.abs().max() < 0.05
    assert all(not fc.bias.any() for fc in head.fcs) and not head.convs[0].conv.bias.any()
