"""The simple feature pyramid: sizes, strides, and the source of each level."""

import pytest
import torch

from tests.helpers.parts import pyramid as build_pyramid


@pytest.mark.parametrize(
    ("stride", "scales"), [(16, (4.0, 2.0, 1.0, 0.5)), (8, (2.0, 1.0, 0.5, 0.25))]
)
def test_levels_have_their_strides(stride, scales):
    pyramid = build_pyramid(16, 8, stride, scales=scales)
    assert pyramid.strides == [4, 8, 16, 32, 64]
    maps = pyramid(torch.randn(2, 16, 128 // stride, 192 // stride))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 128 // s, 192 // s) for s in pyramid.strides]


def test_deconvolutions_halve_the_channels_on_request():
    for halve, shapes in ((True, [(16, 8), (8, 4), (16, 8)]), (False, [(16, 16)] * 3)):
        pyramid = build_pyramid(16, 8, 16, halve_channels=halve, eps=1e-3)
        found = [m for m in pyramid.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
        assert [(m.in_channels, m.out_channels) for m in found] == shapes
        assert [m.shape[1] for m in pyramid(torch.randn(1, 16, 4, 4))] == [8] * 5
        assert pyramid.levels[0][1].eps == 1e-6
        assert [block.norm.eps for level in pyramid.levels for block in level[-2:]] == [1e-3] * 8


def test_the_last_level_has_every_other_cell_of_the_previous_level():
    maps = build_pyramid(16, 8, 16)(torch.randn(1, 16, 6, 6))
    assert maps[3].shape[2:] == (3, 3)
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])


def test_an_unknown_scale_is_rejected():
    with pytest.raises(ValueError, match="scale must be 4, 2, 1, 0.5 or 0.25, got 3"):
        build_pyramid(16, 8, 16, scales=(4.0, 3.0, 1.0, 0.5))
