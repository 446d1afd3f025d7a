"""Golden backbones of ViTAE-Transformer and mmdet pass, and a change of any stored value is detected."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import tests.parity.__main__ as parity
from tests.parity import backbone
from tests.parity.conftest import disturbed, shared_case_holds, write
from tests.parity.conftest import read as read_file

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "vitae" / "golden"
CASES = "vitae_vit_nonsquare vitae_b_128_b2 vitae_s_128_b2 vitaev2_160x224 swin_96x160_b2".split()
MORE = """
    vit_128 vit_256_b2 vit_nonsquare vitae_128_b2 vitae_256 vitae_s_128_b2 vitae_s_256 vitaev2_160x224
""".split()
COMPUTE = backbone.compute


def read(name, file):
    return read_file(GOLDEN / name / file)


@cache
def computed(name):
    return COMPUTE(GOLDEN / name)


@pytest.fixture
def case(altered):
    """Return case(name, file, content): exit code and output for a copy of a case with one changed file.

    The maps are those of the unchanged case, unless `recompute`.
    """

    def check(name, file, content, recompute=False):
        compute = None if recompute else lambda folder, *_: computed(folder.name)
        return altered(GOLDEN / name, file, content, compute=compute)

    return check


@pytest.mark.parametrize("name", CASES)
def test_the_case_passes(name, capsys):
    assert parity.main([str(GOLDEN / name)]) == 0
    assert f"{name}: all hold" in capsys.readouterr().out


@pytest.mark.parametrize("name", MORE)
def test_the_shared_case_passes(name):
    shared_case_holds(SHARED / name)


def test_the_maps_are_computed_without_the_stored_ones(tmp_path):
    config = {"kind": "backbone", "backbone": read("vitae_s_128_b2", "config.json")["backbone"]}
    write(tmp_path / "config.json", config)
    write(tmp_path / "io.npz", {"img": read("vitae_s_128_b2", "io.npz")["img"]})
    (tmp_path / "weights.npz").symlink_to(GOLDEN / "vitae_s_128_b2" / "weights.npz")
    found = parity.kind_of(tmp_path).compute(tmp_path)
    shapes = [(2, 32, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
    assert [tuple(f.shape) for f in found.values()] == shapes
    assert parity.main([str(tmp_path)]) == 1  # without stored maps, the comparison fails


@pytest.mark.parametrize(
    ("name", "array"), [(name, a) for name in CASES for a in read(name, "io.npz") if a != "img"]
)
def test_a_change_of_any_stored_map_fails(case, name, array):
    content = read(name, "io.npz")
    code, printed = case(name, "io.npz", content | {array: disturbed(content[array])})
    assert code == 1
    assert f"OUT   backbone.{array}" in printed


@pytest.mark.parametrize("change", ["surprise", "gone", "nan", "smaller"])
def test_unknown_missing_nan_and_misshapen_arrays_fail(case, change):
    content = read("vitae_b_128_b2", "io.npz")
    last = content.pop("feat3")
    content |= {
        "surprise": {"feat3": last, "feat4": last},
        "gone": {},
        "nan": {"feat3": np.full_like(last, np.nan)},
        "smaller": {"feat3": last[..., :-1]},
    }[change]
    code, printed = case("vitae_b_128_b2", "io.npz", content)
    assert code == 1
    assert "stopped by" not in printed


@pytest.mark.parametrize("entry", ["input_shape", "feat_shapes", "feat_std", "surprise"])
def test_a_config_that_contradicts_the_arrays_fails(case, entry):
    config = read("vitae_b_128_b2", "config.json")
    config[entry] = (np.array(config.get(entry, 1)) * 1.5).tolist()
    code, printed = case("vitae_b_128_b2", "config.json", config)
    assert code == 1
    assert f"OUT   config.{entry}" in printed


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("vitae_vit_nonsquare", "pos_embed"),
        ("vitae_vit_nonsquare", "blocks.2.attn.rel_pos_w"),
        ("vitae_vit_nonsquare", "fpn1.1.ln.weight"),
        ("vitae_b_128_b2", "blocks.2.attn.v_bias"),
        ("vitae_b_128_b2", "blocks.0.PCM.1.running_var"),
        ("vitae_s_128_b2", "layers.0.RC.attn.w"),
        ("vitae_s_128_b2", "layers.1.RC.PRM.convs.2.0.weight"),
        ("vitae_s_128_b2", "layers.0.RC.PCM.5.bias"),
        ("vitae_s_128_b2", "layers.2.NC.4.PCM.6.weight"),
        ("vitae_s_128_b2", "norm.bias"),
        ("vitaev2_160x224", "layers.0.RC.PCM.1.running_var"),
        ("vitaev2_160x224", "layers.2.RC.attn.attn.qkv.weight"),
        ("vitaev2_160x224", "layers.3.NC.0.PCM.6.bias"),
        ("swin_96x160_b2", "stages.0.downsample.norm.bias"),
        ("swin_96x160_b2", "stages.3.blocks.1.attn.w_msa.relative_position_bias_table"),
    ],
)
def test_a_change_of_any_weight_fails(case, name, weight):
    content = read(name, "weights.npz")
    content[weight] = content[weight] * 1.5
    code, printed = case(name, "weights.npz", content, recompute=True)
    assert code == 1
    assert "stopped by" not in printed


def test_a_change_of_the_images_fails(case):
    content = read("vitae_s_128_b2", "io.npz")
    content["img"] = disturbed(content["img"])
    assert case("vitae_s_128_b2", "io.npz", content, recompute=True)[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "ViTAE_L"}, "a backbone of type ViTAE_L"),
        ({"init_values": 0.1}, "init_values"),
        ({"qk_scale": 0.5}, "qk_scale"),
        ({"embed_dim": 24}, "size mismatch"),
        ({"depth": 5}, "Unexpected key"),
    ],
)
def test_unsupported_settings_stop_the_case(case, change, message):
    config = read("vitae_b_128_b2", "config.json")
    config["backbone"] |= change
    code, printed = case("vitae_b_128_b2", "config.json", config, recompute=True)
    assert code == 1
    assert message in printed


@pytest.mark.parametrize("config", [{"kind": "neck"}, {"tag": 1}])
def test_a_config_of_an_unknown_kind_fails(case, config):
    assert case("vitae_b_128_b2", "config.json", config)[0] == 1
