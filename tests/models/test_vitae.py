"""ViTAE: parallel convolutions, cells with linear attention, published sizes, initial weights."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers import parts
from vitdet.config import BackboneConfig, ModelConfig
from vitdet.models import build_backbone
from vitdet.models.vitae import Performer, ReductionCell, deep_branch, wide_branch
from vitdet.weights.formats.mmdet import MMDET
from vitdet.weights.formats.table import rename

INIT = Path(__file__).parents[3] / "shared/reference/vitae/keys/init_mean_std_absmax.json"


def random(module):
    """Return the module with random weights and statistics."""
    torch.manual_seed(1)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if "num_batches" in name:
            continue
        values = 0.25 * torch.randn_like(tensor)
        positive = name.endswith(("_var", "norm1.weight", "norm2.weight"))
        tensor.data.copy_(1 + values.abs() if positive else values)
    return module


TWO_BLOCKS = {"depth": 2, "heads": 2, "global_blocks": (1,), "window_size": 2}


def small_vitae(**settings):
    grid = {"patch_size": 4, "pos_embed_grid": 4, "rel_pos_size": 16}
    branch = partial(wide_branch, 16, 64)
    return random(parts.vit(dim=16, branch=branch, **TWO_BLOCKS, **grid, **settings))


def small_vitae_s(**settings):
    cells = {"widths": (8, 12, 16), "cell_dims": (16, 24), "groups": 8, "rel_pos_size": 64}
    return random(parts.vitae_small(dim=32, **TWO_BLOCKS, **cells, **settings))


BACKBONES = {"vitae_b": (small_vitae, 16), "vitae_s": (small_vitae_s, 64)}


def named(name, **settings):
    published = {"pos_embed_grid": 64, "scaled_rel_pos": True, "final_norm": True}
    with torch.device("meta"):
        backbone = BackboneConfig(name=name, **published, **settings)
        return build_backbone(ModelConfig(backbone=backbone))


def silenced(branch):
    """Return a block of 8 channels and 2 x 2 windows, in which only the convolutions are nonzero."""
    block = random(parts.block(dim=8, heads=2, window=2, grid=4, branch=branch)).eval()
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return block


@pytest.mark.parametrize("branch", [wide_branch(8, 32), deep_branch(8, 24, 4)])
def test_convolutions_read_the_input_of_the_block_and_the_whole_map(branch):
    block = silenced(branch)
    x = torch.randn(2, 4, 4, 8)
    maps = x.permute(0, 3, 1, 2)
    for layer in block.pcm:  # computed layer by layer, with running statistics
        if isinstance(layer, torch.nn.Conv2d):
            maps = F.conv2d(maps, layer.weight, layer.bias, padding=1, groups=layer.groups)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            rows = layer.running_mean, layer.running_var, layer.weight, layer.bias
            mean, variance, weight, bias = (row[:, None, None] for row in rows)
            maps = (maps - mean) / (variance + 1e-5).sqrt() * weight + bias
        else:
            maps = maps * torch.sigmoid(maps)
    assert torch.allclose(block(x), x + maps.permute(0, 2, 3, 1), atol=1e-5)
    other = x.clone()
    other[:, 1, 1] += 1  # a corner of the first of 2 x 2 windows
    assert (block(x) - block(other))[:, 2, 2].abs().amax() > 1e-4


def test_the_mlp_reads_the_sum_of_both_branches():
    block = random(parts.block(dim=8, heads=2, window=0, grid=3, branch=wide_branch(8, 32))).eval()
    x = torch.randn(1, 3, 3, 8)
    mixed = x + block.attn(block.norm1(x)) + block.pcm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(block(x), mixed + block.mlp(block.norm2(mixed)), atol=1e-5)


def test_images_drop_each_of_three_paths_independently():
    torch.manual_seed(0)
    sizes = {"dim": 8, "heads": 2, "window": 0, "grid": 2}
    block = random(parts.block(**sizes, drop_path=0.5, branch=wide_branch(8, 32))).train()
    for layer in block.pcm:
        layer.eval()  # otherwise, the images of a batch affect each other
    found = block(torch.ones(400, 2, 2, 8)).flatten(1)
    values, counts = found.detach().round(decimals=3).unique(dim=0, return_counts=True)
    assert len(values) == 8
    assert counts.min() > 25 and counts.max() < 80  # about 50 each for independent draws


def test_running_statistics_move_by_a_tenth_per_batch():
    branch = wide_branch(8, 32).train()
    images = torch.randn(2, 8, 4, 4)
    mean = branch[0](images).mean(dim=(0, 2, 3))
    branch(images)
    assert torch.allclose(branch[1].running_mean, 0.1 * mean, atol=1e-6)


def slow_performer(performer, x, mixed):
    """Compute the attention in a loop over queries, in float64."""
    w = {name: value.double().numpy() for name, value in performer.state_dict().items()}

    def gelu(u):
        return u * (1 + torch.erf(torch.from_numpy(u / 2**0.5)).numpy()) / 2

    def norm(u, name):
        u = (u - u.mean(axis=-1, keepdims=True)) / np.sqrt(u.var(axis=-1, keepdims=True) + 1e-5)
        return u * w[f"{name}.weight"] + w[f"{name}.bias"]

    def phi(u):
        return np.array([np.exp(row @ u - u @ u / 2) for row in w["w"]]) / len(w["w"]) ** 0.5

    out = []
    for tokens, beside in zip(x.double().numpy(), mixed.double().numpy(), strict=True):
        k, q, v = np.split(norm(tokens, "norm1") @ w["kqv.weight"].T + w["kqv.bias"], 3, axis=1)
        y = np.zeros_like(v)
        for n in range(len(q)):
            share = np.array([phi(q[n]) @ phi(key) for key in k])
            y[n] = share @ v / (share.sum() + 1e-8)
        y = v + y @ w["proj.weight"].T + w["proj.bias"] + beside
        hidden = gelu(norm(y, "norm2") @ w["mlp.0.weight"].T + w["mlp.0.bias"])
        out.append(y + hidden @ w["mlp.2.weight"].T + w["mlp.2.bias"])
    return np.array(out)


def test_linear_attention_equals_the_slow_sum():
    performer = random(Performer(10, 8)).eval()
    x, mixed = torch.randn(2, 7, 10), torch.randn(2, 7, 8)
    found = performer(x, mixed).detach().numpy()
    np.testing.assert_allclose(found, slow_performer(performer, x, mixed), atol=2e-6)


def test_random_features_are_orthogonal_and_not_trained():
    performer = Performer(10, 64)
    assert torch.allclose(performer.w @ performer.w.T, 32 * torch.eye(32), atol=1e-4)
    assert "w" not in dict(performer.named_parameters())


def test_a_cell_concatenates_dilations_and_keeps_the_grid():
    cell = random(ReductionCell(3, 5, 7, 4, (1, 2, 3, 4), 8, (2, 2, 1))).eval()
    images = torch.randn(1, 3, 32, 48)
    assert cell(images).shape == (1, 8, 8, 12)
    plain = random(ReductionCell(3, 5, 3, 2, (1, 2)))
    first, second = plain(images).split(5, dim=1)
    for map_, conv, dilation in ((first, plain.prm[0], 1), (second, plain.prm[1], 2)):
        wanted = F.conv2d(images, conv.weight, conv.bias, 2, dilation, dilation)
        assert torch.allclose(map_, F.gelu(wanted), atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_images_of_a_batch_are_independent(name):
    build, side = BACKBONES[name]
    backbone = build(scaled_rel_pos=True, final_norm=True).eval()
    images = torch.randn(3, 3, side, 2 * side)
    together, cells = backbone(images), side // backbone.stride
    assert together.shape == (3, backbone.out_channels, cells, 2 * cells)
    for i in range(3):
        assert torch.allclose(together[i], backbone(images[i : i + 1])[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_is_finite_and_close(name, dtype):
    build, side = BACKBONES[name]
    backbone = build(final_norm=True).eval()
    images = torch.randn(1, 3, side, side)
    whole = backbone(images)
    with torch.autocast("cpu", dtype):
        half = backbone(images)
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    assert (half.float() - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_attention_accepts_features_beyond_the_range_of_half_precision():
    performer = Performer(8, 64).eval()
    # exp(|w|^2 (0.9 - 0.81 / 2)) = exp(15.84); the largest float16 is exp(11.09)
    u = (0.9 * performer.w[:1]).half()[None]
    assert performer.features(u).max() > 65504
    with torch.autocast("cpu", torch.float16):
        assert torch.allclose(performer.linear_attention(u, u, u), u, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters", "buffers"),
    [
        # Counts of the published backbones, except that deconvolutions are part of the pyramid,
        # ViTAE-S's random matrices are buffers, and the keys of 4 ViTAE-B blocks have a bias.
        ("vit_b", 95_966_720 - 7_081_728, 0),
        ("vitae_b", 98_737_664 - 7_081_728 + 4 * 768, 73_740),
        ("vitae_s", 25_518_880 - 1_771_392 - 23_040, 43_294 + 23_040),
    ],
)
def test_named_sizes_equal_the_published_sizes(name, parameters, buffers):
    backbone = named(name)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert sum(t.numel() for t in backbone.state_dict().values()) == parameters + buffers


@pytest.mark.parametrize(("name", "wide"), [("vitae_b", [2, 5, 8, 11]), ("vitae_s", [2, 5, 8, 13])])
def test_global_blocks_are_the_published_blocks(name, wide):
    assert [i for i, block in enumerate(named(name).blocks) if block.window == 0] == wide
    assert all(block.window == 14 for block in named(name, global_attention=False).blocks)


def test_vitae_s_rejects_another_patch_size():
    with pytest.raises(ValueError, match="patch_size must be 16"):
        named("vitae_s", patch_size=8)


LAYERS_OF_B = {"pos_embed": 0, "patch_embed.proj.weight": 0, "blocks.0.pcm.0.weight": 1}
LAYERS_OF_B |= {"blocks.11.attn.proj.bias": 12, "norm.weight": 13}
LAYERS_OF_S = {"reductions.0.prm.3.weight": 0, "reductions.1.attn.kqv.bias": 1}
LAYERS_OF_S |= {"reductions.2.prm.1.bias": 2, "blocks.0.norm1.weight": 3}
LAYERS_OF_S |= {"blocks.13.pcm.6.weight": 16, "norm.bias": 18}


@pytest.mark.parametrize(("name", "layers"), [("vitae_b", LAYERS_OF_B), ("vitae_s", LAYERS_OF_S)])
def test_parameters_are_assigned_to_layers_for_the_layer_wise_decay(name, layers):
    backbone = named(name)
    assert {n: backbone.layer_of(n) for n in layers} == layers
    assert layers.keys() <= dict(backbone.named_parameters()).keys()
    assert backbone.num_layers + 1 == max(map(backbone.layer_of, dict(backbone.named_parameters())))


@pytest.mark.parametrize(("name", "count"), [("vit_b", 47), ("vitae_b", 64), ("vitae_s", 134)])
def test_fresh_weights_are_distributed_like_the_published_weights(name, count):
    """Compare mean, std and largest magnitude of all tensors up to the third block."""
    if not INIT.exists():
        pytest.skip("needs ../shared")
    torch.manual_seed(0)
    plain = {"depth": 3, "global_blocks": (2,), "final_norm": True}
    if name == "vitae_s":
        backbone = parts.vitae_small(**plain)
    else:
        branch = partial(wide_branch, 768, 3072) if name == "vitae_b" else None
        backbone = parts.vit(dim=768, heads=12, pos_embed_grid=64, branch=branch, **plain)
    ours = {f"backbone.{n}": value for n, value in backbone.state_dict().items()}
    held = 0
    for theirs, (mean, std, largest) in json.loads(INIT.read_text())[name].items():
        values = ours.get(rename(theirs, MMDET))
        if values is not None:
            held += 1
            noise = 8 * std / values.numel() ** 0.5 + 2e-6
            assert values.mean().item() == pytest.approx(mean, abs=noise), theirs
            assert values.std(correction=0).item() == pytest.approx(std, abs=noise), theirs
            assert values.abs().max().item() == pytest.approx(largest, rel=0.25), theirs
    assert held == count
