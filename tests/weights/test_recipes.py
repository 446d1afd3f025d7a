"""Every recipe equals the published one: parameters, learning rates, weight decay, schedule."""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from vitdet.config import RECIPES, Config, flatten, load_config, recipes
from vitdet.config.digest import difference
from vitdet.models import Detector, build_detector
from vitdet.training.optim import lr_factor, parameter_groups
from vitdet.weights.formats.detectron2 import DETECTRON2
from vitdet.weights.formats.mmdet import MMDET
from vitdet.weights.formats.table import Format, rename

FOLDER = Path(__file__).parents[1] / "published"
GROUPS = json.loads(gzip.decompress((FOLDER / "parameter_groups.json.gz").read_bytes()))
PUBLISHED = json.loads((FOLDER / "schedules.json").read_text())
PRETRAINING = {"base": "mae_vit_b", "large": "mae_vit_l", "huge_p14to16": "mae_vit_h"}


def layout(recipe: str) -> Format:
    return DETECTRON2 if "_vitdet_" in recipe else MMDET


@cache
def on_meta(recipe: str) -> Detector:
    with torch.device("meta"):
        return build_detector(load_config(recipe).model)


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_contains_only_differences_and_a_description(recipe: str) -> None:
    path = RECIPES / f"{recipe}.yaml"
    assert path.read_text().startswith("# ")
    differing = {text.split(":")[0] for text in difference(load_config(recipe), Config())}

    def named(node: dict | list | str | None, key: str) -> list[str]:
        if not isinstance(node, dict):
            return [key]
        below = ((child, f"{key}.{name}" if key else name) for name, child in node.items())
        return [leaf for pair in below for leaf in named(*pair)]

    written = set(named(yaml.safe_load(path.read_text()) or {}, "")) - {""}
    assert written - {"train.init"} <= differing, "the default need not be said again"
    assert set(flatten(load_config(recipe))) >= written


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_steps_warmup_and_drops_equal_the_published_values(recipe: str) -> None:
    config, published = load_config(recipe), PUBLISHED[recipe]
    assert config.optim.steps == published["max_iter"] and config.train.batch_size == 64
    rates = (config.optim.lr, config.optim.weight_decay)
    assert rates == (published["lr"], published["weight_decay"])
    for step, factor in published["lr_multiplier_at"].items():
        assert lr_factor(int(step), config.optim) == pytest.approx(factor, rel=1e-6), step
    drops = published.get("first_iter_at_0p1_and_0p01", ())
    for factor, step in zip((0.1, 0.01), drops, strict=False):
        assert lr_factor(step, config.optim) == pytest.approx(factor)
        assert lr_factor(step - 1, config.optim) == pytest.approx(10 * factor)
    if "drop_path_rate" in published:
        assert config.model.backbone.drop_path == published["drop_path_rate"]
        file = published["init_checkpoint"].split("?")[0].removesuffix(".pth")
        assert config.train.init == PRETRAINING[file.split("mae_pretrain_vit_")[1]]


@pytest.mark.parametrize("recipe", sorted(GROUPS))
def test_every_parameter_learns_and_decays_as_published(recipe: str) -> None:
    optim = load_config(recipe).optim
    ours = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(on_meta(recipe), optim)
        for name in group["names"]
    }
    theirs = published_groups(recipe)
    assert set(theirs) == set(ours)
    for name, (factor, decay) in theirs.items():
        assert ours[name] == (pytest.approx(factor, rel=1e-9), decay), name


def published_groups(recipe: str) -> dict[str, tuple[float, float]]:
    """Return {our name: (factor, decay)}; ViTAE-S has 17 layers as in its log, not its config's 12."""
    more_layers = 17 - 12 if recipe == "mask_rcnn_vitae_s_coco" else 0
    optim = load_config(recipe).optim
    found = {}
    for name, (factor, decay) in GROUPS[recipe].items():
        of_cells = more_layers and name.startswith("backbone.layers.")
        ours = our_names(recipe)[name]
        found[ours] = (factor * optim.layer_decay**more_layers if of_cells else factor, decay)
    return found


@cache
def our_names(recipe: str) -> dict[str, str]:
    """Return {their name: our name}; their q_bias and v_bias are parts of our qkv.bias."""
    whole = {name: re.sub(r"\.[qv]_bias$", ".qkv.bias", name) for name in GROUPS[recipe]}
    return {name: rename(joined, layout(recipe)) for name, joined in whole.items()}


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_the_number_of_parameters_is_the_published_number(recipe: str) -> None:
    state = on_meta(recipe).state_dict()
    ours = sum(tensor.numel() for name, tensor in state.items() if not is_statistic(name))
    assert ours + declared_difference(recipe) == PUBLISHED[recipe]["n_params"]


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def declared_difference(recipe: str) -> int:
    """Return the published count minus ours: class token's position, class frequencies, key biases."""
    config = load_config(recipe)
    if layout(recipe) is MMDET:
        return -4 * 768 if config.model.backbone.name == "vitae_b" else 0
    dim = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}[config.model.backbone.name]
    return dim - (1203 if config.data.dataset == "lvis" else 0)


def test_convolutional_propagation_has_no_global_attention() -> None:
    blocks = on_meta("mask_rcnn_vitdet_b_residual_coco").backbone.blocks
    assert all(block.window == 14 for block in blocks)
    plain = [isinstance(block.residual, torch.nn.Identity) for block in blocks]
    assert [i for i, identity in enumerate(plain) if not identity] == [2, 5, 8, 11]


def test_lvis_recipes_have_the_settings_of_lvis() -> None:
    for recipe in recipes():
        if recipe.endswith("_lvis"):
            config = load_config(recipe)
            assert (config.data.dataset, config.model.roi_heads.num_classes) == ("lvis", 1203)
            assert (config.evaluate.score_threshold, config.evaluate.max_detections) == (0.02, 300)
            assert config.model.roi_heads.loss == "federated"
            assert config.data.repeat_threshold == 0.001


# The numbers are from configs and key lists of mmdet and ViTAE-Transformer. Keys without weight decay contain "norm" or
# "relative_position_bias_table"; an epoch has 7330 steps at batch size 16.
@pytest.mark.parametrize(
    ("recipe", "parameters", "undecayed", "warmup"),
    [
        ("mask_rcnn_swin_t_coco", 47_794_602, 76, 1000),
        ("mask_rcnn_vitaev2_s_coco", 38_993_712, 72, 500),
    ],
)
def test_the_hierarchical_baselines_follow_their_configs(
    recipe: str, parameters: int, undecayed: int, warmup: int
) -> None:
    optim, epoch = load_config(recipe).optim, 7330
    groups = parameter_groups(on_meta(recipe), optim)
    assert sum(p.numel() for p in on_meta(recipe).parameters()) == parameters
    assert sum(len(group["names"]) for group in groups if group["weight_decay"] == 0) == undecayed
    assert {group["lr_scale"] for group in groups} == {1.0}
    steps = (0, warmup, 27 * epoch - 1, 27 * epoch, 33 * epoch, 36 * epoch - 1)
    factors = [lr_factor(step, optim) for step in steps]
    assert factors == pytest.approx([0.001, 1, 1, 0.1, 0.01, 0.01]) and optim.steps == 36 * epoch
