"""The backbone: patches, positions, windows against global attention, residual convolutions."""

import pytest
import torch
from torch.nn import functional as F

from vitdet.models.vit import SIZES, ConvBottleneck, PatchEmbed, ViT, resize_positions


def small_vit(global_blocks=(1,), depth=2, window_size=2, residual_blocks=(), drop_path=0.0):
    torch.manual_seed(0)
    vit = ViT(dim=16, depth=depth, heads=2, global_blocks=global_blocks, patch_size=4, window_size=window_size,
              drop_path=drop_path, pos_embed_grid=4, rel_pos_size=16, residual_blocks=residual_blocks)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def test_patches_are_a_convolution():
    embed = PatchEmbed(8, 4)
    images = torch.randn(2, 3, 12, 8)
    assert torch.allclose(embed(images), embed.proj(images).permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (20, 28), (4, 12)])
def test_output_has_a_cell_for_each_patch(size):
    assert small_vit()(torch.randn(2, 3, *size)).shape == (2, 16, size[0] // 4, size[1] // 4)


def test_windows_do_not_see_each_other_but_global_blocks_do():
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[..., :4, :4] += 1  # the first token, in the first of 2 x 2 windows
    for global_blocks, reaches in (((), False), ((1,), True)):
        vit = small_vit(global_blocks).eval()
        change = (vit(images) - vit(other)).abs().amax(dim=(0, 1)) > 1e-6
        assert change[:2, :2].all()
        assert change[2:, 2:].any() == reaches


def test_residual_convolutions_pass_between_windows():
    vit = small_vit(global_blocks=(), residual_blocks=(0,)).eval()
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[..., 4:8, 4:8] += 1
    change = (vit(images) - vit(other)).abs().amax(dim=(0, 1)) > 1e-6
    assert change[2, 2]


def test_residual_convolutions_start_as_the_identity():
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(ConvBottleneck(8)(x), x)


def test_positions_are_resized_as_an_image():
    positions = torch.randn(1, 4, 4, 3)
    assert resize_positions(positions, (4, 4)) is positions
    wanted = F.interpolate(positions.permute(0, 3, 1, 2), size=(6, 5), mode="bicubic").permute(0, 2, 3, 1)
    assert torch.equal(resize_positions(positions, (6, 5)), wanted)
    flat = torch.ones(1, 4, 4, 3)
    assert torch.allclose(resize_positions(flat, (9, 7)), torch.ones(1, 9, 7, 3), atol=1e-6)


def test_tokens_carry_their_positions():
    vit = small_vit()
    images = torch.randn(1, 3, 16, 16)
    assert torch.allclose(vit.embed(images), vit.patch_embed(images) + vit.pos_embed)


def test_drop_path_grows_linearly_and_rests_in_evaluation():
    vit = small_vit(depth=3, drop_path=0.4)
    assert [block.drop_path.drop_prob for block in vit.blocks] == pytest.approx([0, 0.2, 0.4])
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(vit.eval()(images), vit(images))


def test_tables_have_the_size_of_a_window_or_of_the_grid():
    vit = small_vit()
    assert [len(block.attn.rel_pos_h) for block in vit.blocks] == [3, 7]


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_b", 85_645_056), ("vit_l", 303_096_832), ("vit_h", 630_662_400)]
)
def test_published_sizes(name, parameters):
    """Blocks and patches of 16 px, without positions: depth (12 d^2 + 13 d) + 769 d."""
    with torch.device("meta"):
        vit = ViT(**SIZES[name]._asdict())
    counted = sum(p.numel() for n, p in vit.named_parameters() if "rel_pos" not in n and n != "pos_embed")
    assert counted == parameters
    quarter = SIZES[name].depth // 4
    assert SIZES[name].global_blocks == tuple(quarter * (i + 1) - 1 for i in range(4))
