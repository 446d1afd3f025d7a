"""Settings: written files read back equal, values get their fields' types, errors have one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from vitdet.config import (
    RECIPES,
    Config,
    DataConfig,
    OptimConfig,
    RoIHeadsConfig,
    dump_config,
    flatten,
    from_dict,
    load_config,
    override,
    recipes,
    save_config,
    to_dict,
)
from vitdet.config.digest import difference, digest


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def test_a_config_inherits_sections_and_then_applies_overrides() -> None:
    ours, theirs = Config(), load_config("tiny")
    found = override(ours, ["data.workers=7", "optim.lr=1e-5"], theirs, ("data", "evaluate"))
    data, optim = replace(theirs.data, workers=7), replace(ours.optim, lr=1e-5)
    assert found == replace(ours, data=data, evaluate=theirs.evaluate, optim=optim)
    assert override(ours, []) == ours and theirs.data != ours.data
    with pytest.raises(ValueError, match="data.worker: no such setting; did you mean 'workers'"):
        override(ours, ["data.worker=1"], theirs)


@pytest.mark.parametrize("name", recipes())
def test_a_written_recipe_loads_unchanged(name: str) -> None:
    config = load_config(name)
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert config == from_dict(written)
    assert load_config(name) == config


def test_a_resolved_config_is_read_back_equal(tmp_path: Path) -> None:
    changes = ["optim.milestones=[0.25, 0.5]", "tracking.uri=http://x:5000", "data.root=a b"]
    config = load_config("tiny", changes)
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(tmp_path / "new" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]
    assert from_dict(to_dict(config)) == config
    assert yaml.safe_load(dump_config(config)) == to_dict(config)
    assert isinstance(load_config(tmp_path / "new" / "config.yaml").optim.milestones, tuple)


def test_the_flat_keys_are_those_of_overrides() -> None:
    changes = ["train.init='1e5'", "data.root=2017", "train.seed=9007199254740993"]
    config = load_config("tiny", changes)
    flat = flatten(config)
    assert flat["optim.lr"] == config.optim.lr and flat["model.backbone.name"] == "vit_tiny"
    assert json.loads(flat["data.scale_range"]) == list(config.data.scale_range)
    settings = [f"{key}={value}" for key, value in flat.items()]
    assert load_config(RECIPES / "tiny.yaml", settings) == config


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),  # a string in YAML
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.steps=1e3", "optim.steps", 1000),
        ("train.seed=9007199254740993", "train.seed", 9007199254740993),  # not exact as float
        ("model.rpn.norm=true", "model.rpn.norm", True),
        ("data.root=2017", "data.root", "2017"),
        ("data.root=007", "data.root", "007"),
        ("data.root=/a #1/b: c", "data.root", "/a #1/b: c"),
        ("train.init=", "train.init", ""),
        ("train.init=''", "train.init", ""),
        ("tracking.uri=http://x:1/?a=b", "tracking.uri", "http://x:1/?a=b"),
        ("data.scale_range=[1, 2]", "data.scale_range", "[1.0, 2.0]"),
        ("model.roi_heads.ious=[0.5,0.6,0.7]", "model.roi_heads.ious", "[0.5, 0.6, 0.7]"),
    ],
)
def test_a_value_gets_the_type_of_its_setting(override: str, key: str, value: object) -> None:
    found = flatten(load_config("tiny", [override]))[key]
    assert found == value and type(found) is type(value)


def test_later_overrides_win_and_add_missing_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "optim:\n  lr: 1e-3\ndata:\n")
    config = load_config(path, ["optim.lr=2", "data.flip=0", "optim.lr=3"])
    assert config == replace(Config(), optim=OptimConfig(lr=3.0), data=DataConfig(flip=0.0))
    assert load_config(write(tmp_path, "")) == Config()


def test_an_override_of_a_section_keeps_its_other_settings() -> None:
    config = load_config(
        "tiny", ["optim.steps=7", "optim={lr: 1, clip: 2}", "model={rpn: {norm: true}}"]
    )
    tiny = load_config("tiny")
    assert config.optim == replace(tiny.optim, steps=7, lr=1.0, clip=2.0)
    assert config.model == replace(tiny.model, rpn=replace(tiny.model.rpn, norm=True))
    assert load_config("tiny", ["train={}"]) == tiny


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("optim=null", "optim"),
        ("optim=", "optim"),
        ("model.backbone=", "model.backbone"),
        ("model={rpn: null}", "model.rpn"),
        ("model={norm_eps: 1, backbone: }", "model.backbone"),
    ],
)
def test_an_override_of_a_section_by_null_is_refused(
    tmp_path: Path, override: str, section: str
) -> None:
    """Null would reset the section to the package's defaults, not to the recipe's."""
    for text in (dump_config(load_config("tiny")), "", "model:\n  rpn:\n"):
        message = rf"^{section}: expected a section \(\w+, .*\), got null$"
        with pytest.raises(ValueError, match=message):
            load_config(write(tmp_path, text), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # names
        ("optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("lr=1", "lr: no such setting; did you mean 'optim.lr'?"),
        ("zzz.x=1", "zzz: no such setting; known: model, data"),
        ("optim=1", "optim: expected a section (lr, "),
        ("model={rpn: 3}", "model.rpn: expected a section (anchor_scale, "),
        ("optim.lr.x=1", "optim.lr.x: optim.lr is a setting, not a section"),
        ("optim.lr", "override 'optim.lr': expected section.key=value"),
        # types
        ("optim.lr=[", "optim.lr: '[' cannot be parsed as a value"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("optim.lr=true", "optim.lr: expected a number, got True"),
        ("optim.lr=nan", "optim.lr: expected a number, got 'nan'"),
        ("optim.lr=1" + 400 * "0", "optim.lr: expected a number, got 1000"),
        ("optim.steps=1.5", "optim.steps: expected a whole number, got 1.5"),
        ("model.rpn.norm=1", "model.rpn.norm: expected true or false, got 1"),
        ("data.scale_range=[1, 2, 3]", "data.scale_range: expected a list of 2 values, each a nu"),
        ("model.backbone.name=vit_x", "model.backbone.name: expected one of vit_tiny, vit_b, "),
        # ranges
        (f"train.seed={2**63}", f"train.seed must be between 0 and {2**63 - 1}, got {2**63}"),
        ("optim.steps=1e10", "optim.steps must be between 1 and 2147483647, got 10000000000"),
        ("optim.lr=-1", "optim.lr must be above 0, got -1.0"),
        ("model.backbone.residual_blocks=[2, 1024]", "model.backbone.residual_blocks must be betw"),
        ("model.roi_heads.ious=[]", "model.roi_heads.ious must not be empty, got []"),
        # several settings
        ("data.image_size=100", "data.image_size must be a positive multiple of 64 (the coarsest "),
        ("optim.milestones=[0.9,0.8]", "optim.milestones must increase between 0 and 1"),
        ("data.scale_range=[2,1]", "data.scale_range must have low <= high, got [2.0, 1.0]"),
        ("model.backbone.rel_pos_size=4", "model.backbone.rel_pos_size must be at least patch_si"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "tinny: no such recipe; did you mean 'tiny'?"),
        ("swin", "swin: no such recipe; the nearest of 27 are mask_rcnn_swin_t_coco (`vitdet conf"),
        ("there/is/none.yaml", "there/is/none.yaml: no such config file; expected a file or the "),
    ],
)
def test_an_unknown_recipe_is_named(name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(message)}"):
        load_config(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [1", "own.yaml: invalid YAML"),
        ("- optim", "own.yaml: expected sections (model, data,"),
        ("optim: 3", "optim: expected a section"),
        ("optim:\n  lr: {a: 1}", "optim.lr: expected a number"),
    ],
)
def test_a_wrong_file_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    for overrides in ([], ["optim.steps=1"]):  # with or without an override
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load_config(write(tmp_path, text), overrides)
        assert "\n" not in str(caught.value)


def test_all_unknown_settings_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "optim:\n  lrr: 1\n  steps: fast\ndata:\n  batch_size: 2\n3: x\n")
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(caught.value) == (
        "optim.lrr: no such setting; did you mean 'lr'?; data.batch_size: no such setting; did you "
        "mean 'train.batch_size'?; 3: no such setting; known: model, data, optim, train, evaluate, "
        "tracking, gate"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(Config().optim, lr=0.0), "optim.lr must be above 0, got 0.0"),
        (lambda: OptimConfig(clip=math.nan), "optim.clip: expected a number, got nan"),
        (lambda: OptimConfig(schedule="line"), "optim.schedule: expected one of step, cosine, got"),
        (lambda: RoIHeadsConfig(ious=()), "model.roi_heads.ious must not be empty, got []"),
        (lambda: Config(data=DataConfig(image_size=100)), "data.image_size must be a positive mul"),
    ],
)
def test_constructors_refuse_invalid_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


def test_the_list_of_milestones_may_be_empty() -> None:
    assert load_config("tiny", ["optim.milestones=[]"]).optim.milestones == ()


def test_yaml_may_leave_out_sections_and_write_numbers_as_text(tmp_path: Path) -> None:
    data, train = (
        "{root: 2017, train_split: , scale_range: ['1e-1', 2]}",
        "{seed: '7', save_every: 1e3}",
    )
    text = f"optim:\nmodel:\n  rpn:\ndata: {data}\ntrain: {train}\n"
    config = load_config(write(tmp_path, text))
    assert config.optim == OptimConfig() and config.model == Config().model
    assert (config.data.root, config.data.train_split) == ("2017", "")
    assert config.data.scale_range == (0.1, 2.0)
    assert (config.train.seed, config.train.save_every) == (7, 1000)


def test_a_config_difference_names_the_settings() -> None:
    ours = load_config("tiny", ["optim.lr=1", "data.flip=0"])
    theirs = load_config("tiny", ["optim.lr=2"])
    assert difference(ours, theirs) == ["data.flip: 0.0, not 0.5", "optim.lr: 1.0, not 2.0"]
    assert difference(ours, ours) == []
    same = load_config("tiny", ["data.flip=0", "optim.lr=1"])
    assert digest(ours) == digest(same) != digest(theirs)


def test_the_reference_batch_size_matters_only_with_scale_lr() -> None:
    ours, theirs = load_config("tiny"), load_config("tiny", ["optim.lr_batch_size=4"])
    assert difference(ours, theirs, affecting_weights=True) == [] and digest(ours) == digest(theirs)
    assert difference(ours, theirs) == ["optim.lr_batch_size: 8, not 4"]
    ours, theirs = (override(config, ["optim.scale_lr=true"]) for config in (ours, theirs))
    assert difference(ours, theirs, affecting_weights=True) == ["optim.lr_batch_size: 8, not 4"]
    assert digest(ours) != digest(theirs)


def test_memory_settings_do_not_change_the_digest() -> None:
    ours = load_config("tiny")
    for change in ("train.accumulate=2", "train.activation_checkpointing=blocks"):
        assert digest(override(ours, [change])) == digest(ours)


def test_the_recipes_are_listed(vitdet: Callable[..., tuple[int, str, str]]) -> None:
    code, out, said = vitdet("config")
    assert (code, said) == (0, "") and out.splitlines() == recipes()
    message = "vitdet: --set, --output and --training need a recipe; see `vitdet config`\n"
    assert vitdet("config", "--set", "optim.lr=1") == (1, "", message)
