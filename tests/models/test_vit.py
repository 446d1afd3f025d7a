"""The backbone: patches, positions, windows against global attention, residual convolutions."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import parts
from vitdet.models.vit import SIZES, ConvBottleneck, PatchEmbed, init_linears, resize_positions


def small_vit(global_blocks=(1,), **settings):
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "window_size": 2}
    grids = {"pos_embed_grid": 4, "rel_pos_size": 16}
    vit = parts.vit(**sizes | grids | {"global_blocks": global_blocks} | settings)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def test_patch_embedding_equals_a_convolution():
    embed = PatchEmbed(8, 4)
    images = torch.randn(2, 3, 12, 8)
    assert torch.allclose(embed(images), embed.proj(images).permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (20, 28), (4, 12)])
def test_output_has_a_cell_for_each_patch(size):
    assert small_vit()(torch.randn(2, 3, *size)).shape == (2, 16, size[0] // 4, size[1] // 4)


def test_windows_are_independent_and_global_blocks_connect_them():
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[..., :4, :4] += 1  # the first token, in the first of 2 x 2 windows
    for global_blocks, reaches in (((), False), ((1,), True)):
        vit = small_vit(global_blocks).eval()
        change = (vit(images) - vit(other)).abs().amax(dim=(0, 1)) > 1e-6
        assert change[:2, :2].all()
        assert change[2:, 2:].any() == reaches


def test_residual_convolutions_connect_windows():
    vit = small_vit(global_blocks=(), residual_blocks=(0,)).eval()
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[..., 4:8, 4:8] += 1
    change = (vit(images) - vit(other)).abs().amax(dim=(0, 1)) > 1e-6
    assert change[2, 2]


def test_residual_convolutions_are_initialized_like_detectron2():
    """c2_msra_fill draws from a normal distribution with std sqrt(2 / (outputs * kernel area))."""
    torch.manual_seed(0)
    block = ConvBottleneck(256)
    found = [layer.conv.weight.std().item() for layer in (block.conv1, block.conv2, block.conv3)]
    wanted = [(2 / 128) ** 0.5, (2 / 128 / 9) ** 0.5, (2 / 256) ** 0.5]
    assert found == pytest.approx(wanted, rel=0.03)
    x = torch.randn(1, 4, 4, 256)
    assert torch.equal(block(x), x)  # initially the identity


def test_positions_are_resized_like_an_image():
    positions = torch.randn(1, 4, 4, 3)
    assert resize_positions(positions, (4, 4)) is positions
    flat = torch.ones(1, 4, 4, 3)
    assert torch.allclose(resize_positions(flat, (9, 7)), torch.ones(1, 9, 7, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "grid"),
    [((4, 4), (6, 5)), ((14, 14), (64, 64)), ((7, 12), (40, 9)), ((3, 1), (2, 8))],
)
def test_positions_are_resized_bicubically_in_full_precision(stored, grid):
    torch.manual_seed(0)
    positions = torch.randn(1, *stored, 8, requires_grad=True)
    maps = positions.double().permute(0, 3, 1, 2)
    wanted = F.interpolate(maps, size=grid, mode="bicubic").permute(0, 2, 3, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_positions(positions, grid)
    assert found.is_contiguous() and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    gradient = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(out, positions, gradient)[0] for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_tokens_carry_their_positions():
    vit = small_vit()
    images = torch.randn(1, 3, 16, 16)
    assert torch.allclose(vit.embed(images), vit.patch_embed(images) + vit.pos_embed)


def test_drop_path_grows_linearly_and_is_off_in_evaluation():
    vit = small_vit(depth=3, drop_path=0.4)
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.2, 0.4])
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(vit.eval()(images), vit(images))


def test_tables_have_the_size_of_a_window_or_of_the_grid():
    vit = small_vit()
    assert [len(block.attn.rel_pos_h) for block in vit.blocks] == [3, 7]


def test_tables_may_differ_between_height_and_width():
    vit = small_vit((0,), depth=1, pos_embed_grid=(3, 5), rel_pos_size=(12, 20))
    assert vit.pos_embed.shape == (1, 3, 5, 16)
    assert (len(vit.blocks[0].attn.rel_pos_h), len(vit.blocks[0].attn.rel_pos_w)) == (5, 9)
    assert vit(torch.randn(1, 3, 12, 20)).shape == (1, 16, 3, 5)


def test_the_final_norm_follows_the_last_block():
    images, plain, normed = torch.randn(1, 3, 16, 16), small_vit(), small_vit(final_norm=True)
    weight, bias = normed.norm.weight[:, None, None], normed.norm.bias[:, None, None]
    tokens = plain(images)
    deviation = (tokens.var(dim=1, correction=0) + 1e-6).sqrt()
    wanted = (tokens - tokens.mean(dim=1)) / deviation * weight + bias
    assert torch.allclose(normed(images), wanted, atol=1e-5)
    assert not any(name.startswith("norm") for name in plain.state_dict())


def test_scaled_positions_and_the_width_of_the_mlp_reach_every_block():
    vit = small_vit(scaled_rel_pos=True, mlp_ratio=2.5)
    assert all(part.attn.scaled_rel_pos and part.mlp.fc1.out_features == 40 for part in vit.blocks)


def test_parameters_are_assigned_to_layers_for_the_layer_wise_decay():
    vit = small_vit(residual_blocks=(0,), final_norm=True)
    names = {
        "pos_embed": 0,
        "patch_embed.proj.bias": 0,
        "blocks.0.attn.rel_pos_h": 1,
        "blocks.1.mlp.fc2.bias": 2,
        "blocks.0.residual.conv1.norm.weight": 3,
        "norm.weight": 3,
    }
    assert {name: vit.layer_of(name) for name in names} == names
    assert names.keys() <= dict(vit.named_parameters()).keys()


def test_initial_weights_have_no_outliers():
    """With the published truncation at -2, one of 9 million draws would be -2 (100 std)."""
    torch.manual_seed(1)
    linear = torch.nn.Linear(3000, 3000)
    torch.manual_seed(1)
    init_linears(linear)
    assert linear.weight.abs().max() < 0.13
    assert linear.weight.std().item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_b", 85_645_056), ("vit_l", 303_096_832), ("vit_h", 630_662_400)]
)
def test_named_sizes_equal_the_published_sizes(name, parameters):
    """Without positions, a ViT (16 px) has depth * (12 d^2 + 13 d) + 769 d parameters."""
    with torch.device("meta"):
        vit = parts.vit(**SIZES[name]._asdict())
    vit.pos_embed = None
    assert sum(p.numel() for n, p in vit.named_parameters() if "rel_pos" not in n) == parameters
    quarter = SIZES[name].depth // 4
    assert SIZES[name].global_blocks == tuple(quarter * (i + 1) - 1 for i in range(4))


@pytest.mark.parametrize(("window", "residual"), [(0, False), (3, True)])
def test_a_block_compiles_to_one_graph(window, residual):
    block = parts.block(dim=16, heads=2, window=window, grid=4, conv_after=residual, drop_path=0.5)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 16, requires_grad=True)
    torch.manual_seed(1)
    wanted = block(x)
    torch.manual_seed(1)
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
