"""Swin: sizes, the shifted-window mask, padding before the roll; complements the golden case."""

import pytest
import torch

from tests.helpers import parts
from vitdet.models.baselines.swin import SIZES, Block, shift_mask


def small_swin(drop_path=0.0):
    torch.manual_seed(0)
    return parts.swin(dim=4, depths=(2, 2, 2, 2), heads=(1, 2, 2, 4), drop_path=drop_path)


def test_maps_have_their_strides_and_channels():
    swin = small_swin()
    maps = swin(torch.randn(2, 3, 64, 96))
    wanted = [(2, 4, 16, 24), (2, 8, 8, 12), (2, 16, 4, 6), (2, 32, 2, 3)]
    assert [tuple(m.shape) for m in maps] == wanted
    assert swin.out_channels == swin.strides == (4, 8, 16, 32)


def test_swin_t_has_its_published_size():
    """The published count includes a classifier, and one norm instead of four."""
    with torch.device("meta"):
        swin = parts.swin(**SIZES["swin_t"]._asdict())
    assert sum(p.numel() for p in swin.parameters()) == 28_288_354 - 769 * 1000 - 2 * 768 + 2 * 1440


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 4), (12, 8)])
def test_tokens_attend_only_to_tokens_at_unchanged_distance(height, width):
    """Two tokens of a window attend to each other if and only if the roll kept their distance."""
    window, shift = 4, 2
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(height, width, 2)
    rolled = places.roll((-shift, -shift), (0, 1))
    mask = shift_mask(height, width, window, shift, torch.device("cpu"))
    n = 0
    for top in range(0, height, window):
        for left in range(0, width, window):
            tokens = rolled[top : top + window, left : left + window].reshape(-1, 2)
            here = places[top : top + window, left : left + window].reshape(-1, 2)
            kept = ((tokens[:, None] - tokens) == (here[:, None] - here)).all(dim=-1)
            assert torch.equal(mask[n] == 0, kept)
            assert torch.equal(mask[n] == -100, ~kept)
            n += 1
    assert n == len(mask)


def test_a_token_affects_exactly_its_window():
    """Windows of a 12 x 12 map have 4 x 4 tokens; windows of the shifted block start at 2."""
    for shift, rows in ((0, range(4, 8)), (2, range(2, 6))):
        torch.manual_seed(0)
        block = Block(dim=8, heads=2, window=4, shift=shift, drop_path=0.0)
        x = torch.randn(1, 12, 12, 8)
        other = x.clone()
        other[0, 5, 5, 0] += 1
        change = (block(x) - block(other)).abs().amax(dim=(0, 3)) > 1e-6
        wanted = torch.zeros(12, 12, dtype=torch.bool)
        wanted[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1] = True
        assert torch.equal(change, wanted)


def test_the_first_tokens_share_a_window_only_with_each_other():
    """The roll moves the first 2 rows behind the padding, where they do not attend to earlier rows."""
    torch.manual_seed(0)
    block = Block(dim=8, heads=2, window=4, shift=2, drop_path=0.0)
    x = torch.randn(1, 6, 6, 8)  # padded to 8
    other = x.clone()
    other[0, 5, 5, 0] += 1
    change = (block(x) - block(other)).abs().amax(dim=(0, 3)) > 1e-6
    assert not change[:2].any()
    assert not change[:, :2].any()
    assert change[2:, 2:].all()


def test_drop_path_grows_linearly_over_all_blocks():
    swin = small_swin(drop_path=0.7)
    rates = [block.drop_path.rate for stage in swin.layers for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_every_parameter_learns_and_none_has_a_smaller_rate():
    swin = small_swin()
    sum(m.square().sum() + m.pow(3).sum() for m in swin(torch.randn(1, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in swin.parameters())
    assert {swin.layer_of(name) for name, _ in swin.named_parameters()} == {swin.num_layers + 1}
