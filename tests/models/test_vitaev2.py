"""ViTAEv2: sizes, attention of each cell, drop path rates; complements the golden case."""

import pytest
import torch

from tests.helpers import parts
from vitdet.models.baselines.vitaev2 import SIZES, Attention, drop_rates


def small_vitaev2():
    torch.manual_seed(0)
    return parts.vitaev2(
        widths=(4, 4, 4, 8),
        dims=(4, 8, 8, 16),
        depths=(1, 1, 2, 1),
        reduction_heads=(1, 1, 2, 2),
        heads=(1, 2, 2, 4),
        reduction_groups=(1, 2, 2, 2),
        groups=(1, 2, 2, 4),
    )


def test_maps_have_their_strides_and_channels():
    backbone = small_vitaev2()
    maps = backbone(torch.randn(2, 3, 64, 96))
    wanted = [(2, 4, 16, 24), (2, 8, 8, 12), (2, 8, 4, 6), (2, 16, 2, 3)]
    assert [tuple(m.shape) for m in maps] == wanted
    assert backbone.out_channels == (4, 8, 8, 16)
    assert backbone.strides == (4, 8, 16, 32)


def test_only_the_coarser_stages_have_global_attention():
    backbone = small_vitaev2().eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(1, 3, 256, 256)
    other = images.clone()
    other[..., :8, :8] += 1
    pairs = zip(backbone(images), backbone(other), strict=True)
    change = [(a - b).abs().amax(dim=(0, 1)) > 0 for a, b in pairs]
    assert [mask[-1, -1].item() for mask in change] == [False, False, True, True]


@pytest.mark.parametrize(("height", "above"), [(4, 1), (5, 0), (6, 0), (7, 1)])
def test_windows_are_padded_all_around(height, above):
    """Windows of 3 start in the padding above the map; an odd row of padding is added below."""
    attention = Attention(inputs=4, dim=4, heads=1, window=3, bias=True, keep_values=False)
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(1, height, 3, 4)
    other = x.clone()
    other[0, 0, 0] += 1
    change = (attention(x) - attention(other)).abs().amax(dim=(0, 2, 3)) > 1e-7
    assert change.tolist() == [row < 3 - above for row in range(height)]


def test_the_value_residual_is_used_if_attention_changes_the_channels():
    attention = Attention(inputs=6, dim=4, heads=2, window=0, bias=False, keep_values=True)
    torch.nn.init.zeros_(attention.proj.weight)
    torch.nn.init.zeros_(attention.proj.bias)
    x = torch.randn(2, 3, 5, 6)
    assert torch.allclose(attention(x), x @ attention.qkv.weight[8:].T, atol=1e-6)


def test_drop_path_rates_equal_the_published_run():
    """Each stage's drop path rates start at the cell whose index is the previous stage's depth."""
    step = 0.1 / 13
    wanted = [[0, 1], [2, 3], list(range(2, 10)), [8, 9]]
    rates = drop_rates((2, 2, 8, 2), 0.1)
    for stage, numbers in zip(rates, wanted, strict=True):
        assert stage == pytest.approx([step * number for number in numbers])
    with torch.device("meta"):
        backbone = parts.vitaev2(**SIZES["vitaev2_s"]._asdict(), drop_path=0.1)
    assert [[cell.drop_path.rate for cell in stage.cells] for stage in backbone.stages] == rates


def test_every_parameter_learns_and_none_has_a_smaller_rate():
    backbone = small_vitaev2()
    sum(m.square().sum() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    layers = {backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert layers == {backbone.num_layers + 1}
