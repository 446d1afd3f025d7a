"""The feature pyramid network: sizes, flow between levels, and the last level by subsampling."""

import pytest
import torch
from torch.nn import functional as F

from vitdet.models.baselines.fpn import FPN

CHANNELS, STRIDES = (3, 4, 5, 6), (4, 8, 16, 32)


def maps(height=64, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, c, height // s, width // s) for c, s in zip(CHANNELS, STRIDES, strict=True)]
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.fixture
def fpn():
    return FPN(in_channels=CHANNELS, out_channels=8, strides=STRIDES)


def test_levels_have_their_strides(fpn):
    assert (fpn.out_channels, fpn.strides) == (8, [4, 8, 16, 32, 64])
    wanted = [(2, 8, 64 // s, 96 // s) for s in STRIDES] + [(2, 8, 1, 2)]
    assert [tuple(m.shape) for m in fpn(maps())] == wanted


def test_a_level_adds_its_map_and_upsampled_coarser_maps(fpn):
    given, inner = maps(), None
    for i in reversed(range(4)):
        coarser = 0 if inner is None else inner.repeat_interleave(2, 2).repeat_interleave(2, 3)
        inner = fpn.lateral[i](given[i]) + coarser
        wanted = F.conv2d(inner, fpn.output[i].weight, fpn.output[i].bias, padding=1)
        assert torch.allclose(fpn(given)[i], wanted, atol=1e-5)


def test_the_last_level_has_every_other_cell_of_the_previous_level(fpn):
    levels = fpn(maps(128, 128))
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


def test_a_map_reaches_its_own_level_and_finer_levels(fpn):
    given = maps()
    before = fpn(given)
    given[2] = given[2] + 1
    changed = [not torch.equal(a, b) for a, b in zip(before, fpn(given), strict=True)]
    assert changed == [True, True, True, False, False]


def test_every_parameter_learns(fpn):
    sum(level.square().mean() for level in fpn(maps())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fpn.parameters())
