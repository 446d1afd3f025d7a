"""The golden detector of ViTAE-Transformer/ViTDet passes, a change of any stored value is detected, and the
recipes' settings build the same detector.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.parity.__main__ as parity
from tests.parity import fingerprints, fork_detector
from tests.parity.conftest import disturbed, link, write
from tests.parity.conftest import read as read_file
from tests.parity.report import Report
from vitdet.config import load_config
from vitdet.models import build_detector
from vitdet.models.boxes import MAX_LOG_SCALE

CASE = Path(__file__).parents[1] / "golden" / "vitae_mask_rcnn_192"
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "vitae"
KIND = parity.kind_of(CASE)


def read(file):
    return read_file(CASE / file)


@cache
def computed():
    return KIND.compute(CASE)


@pytest.fixture
def case(altered):
    """Return case(file, content): the exit code for a copy of the case with one changed file.

    Results are computed for the unchanged case unless `recompute`; an exception fails the test.
    """

    def check(file, content, recompute=False):
        compute = None if recompute else lambda *_: computed()
        code, printed = altered(CASE, file, content, compute=compute)
        assert "stopped by" not in printed
        return code

    return check


def test_the_case_passes(capsys):
    assert parity.main([str(CASE)]) == 0
    assert "vitae_mask_rcnn_192: all hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    "array", [name for name in read("io.npz") if name not in fork_detector.INPUTS]
)
def test_a_change_of_any_stored_array_fails(case, array):
    content = read("io.npz")
    assert case("io.npz", content | {array: disturbed(content[array])}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": np.zeros(1)},
        {"neck4": np.full((1, 32, 3, 3), np.nan)},
        {"proposals": np.zeros((999, 5), np.float32)},
    ],
)
def test_unknown_nan_and_misshapen_arrays_fail(case, change):
    assert case("io.npz", read("io.npz") | change) == 1


def test_a_change_of_proposal_scores_fails(case):
    content = read("io.npz")
    content["proposals"][7, 4] += 0.01
    assert case("io.npz", content) == 1


def test_a_case_without_results_fails(case):
    content = read("io.npz")
    assert case("io.npz", {name: content[name] for name in fork_detector.INPUTS}) == 1


@pytest.mark.parametrize("change", ["other", "fewer", "surprise"])
def test_a_change_of_the_masks_fails(case, change):
    content = read("masks_rle.json")
    changed = {
        "other": [content[1], *content[1:]],
        "fewer": content[1:],
        "surprise": [content[0] | {"surprise": 1}, *content[1:]],
    }[change]
    assert case("masks_rle.json", changed) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n_det": 99},
        {"n_proposals": 999},
        {"labels_hist": [0, 11, 22, 6, 61]},
        {"score_range": [0.68, 0.95]},
        {"mask_areas": [1300] * 100},
        {"losses_total": 5.64},
        {"surprise": 1},
    ],
)
def test_a_config_that_contradicts_the_results_fails(case, change):
    assert case("config.json", read("config.json") | change) == 1


@pytest.mark.parametrize("name", read("config.json")["losses"])
def test_a_change_of_any_loss_fails(case, name):
    content = read("config.json")
    value = content["losses"][name]
    scaled = [value[0] * 1.01, *value[1:]] if isinstance(value, list) else value * 1.01
    content["losses"][name] = scaled
    assert case("config.json", content) == 1


def test_an_unknown_loss_fails(case):
    content = read("config.json")
    assert case("config.json", content | {"losses": content["losses"] | {"loss_other": 0.0}}) == 1


@pytest.mark.parametrize("name", ["img", "gt_boxes", "gt_labels", "gt_masks"])
def test_a_change_of_any_input_fails(case, name):
    content = read("io.npz")
    changes = {"gt_labels": lambda x: (x + 1) % 5, "gt_boxes": lambda x: x * 0.9}
    content[name] = changes.get(name, lambda x: x[..., ::-1])(content[name])
    assert case("io.npz", content, recompute=True) == 1


@pytest.mark.parametrize(
    "name",
    [
        "backbone.fpn1.1.ln.weight",
        "rpn_head.rpn_conv.1.ln.bias",
        "roi_head.mask_head.convs.3.ln.weight",
    ],
)
def test_a_change_of_any_weight_fails(case, name):
    content = read("weights.npz")
    assert case("weights.npz", content | {name: content[name] * 1.2}, recompute=True) == 1


def norms(detector):
    return {name: module.eps for name, module in detector.named_modules() if hasattr(module, "eps")}


def test_the_settings_of_the_recipe_build_the_golden_detector():
    """Layers, epsilons, assignment, clamps and normalizer are equal."""
    model = load_config("mask_rcnn_vit_b_coco").model
    small = replace(
        model,
        backbone=replace(model.backbone, name="vit_tiny", rel_pos_size=192, pos_embed_grid=12),
        pyramid=replace(model.pyramid, channels=32),
        roi_heads=replace(model.roi_heads, num_classes=5, fc_dim=64),
    )
    ours = build_detector(small).eval()
    golden = fork_detector.build(read("config.json")["model"]).eval()
    heads = ("rpn", "roi_heads")
    for name in heads:
        getattr(golden, name).load_state_dict(getattr(ours, name).state_dict())
        assert norms(getattr(golden, name)) == norms(getattr(ours, name))
        for setting in ("match", "min_log_scale"):
            assert getattr(getattr(golden, name), setting) == getattr(getattr(ours, name), setting)
    assert ours.rpn.divide_by_sampled and ours.rpn.min_log_scale == -MAX_LOG_SCALE
    assert norms(ours.pyramid) == norms(golden.pyramid)
    plain = build_detector(replace(small, norm_eps=1e-6, low_quality="own", clamp_shrinking=False))
    assert {*norms(plain.rpn).values(), *norms(plain.roi_heads).values()} == {1e-6}
    assert plain.rpn.match is not ours.rpn.match
    assert plain.roi_heads.match is not ours.roi_heads.match
    for side in (48, 3):
        level = torch.randn(1, 32, side, side)
        assert torch.equal(ours.rpn.head(level)[0], golden.rpn.head(level)[0])


def test_changes_of_fingerprints_fail(tmp_path):
    """This tests only the comparison, with arrays of three numbers."""
    entry = {"shape": [3], "mean": 2.0, "std": 1.0, "index": [0, 2], "value": [1.0, 3.0]}
    found = {"vit_b": {"neck0": fingerprints.print_of(torch.tensor([1.0, 2.0, 3.0]), [0, 2])}}
    changes = [{}, {"shape": [4]}, {"mean": 2.01}, {"std": 1.01}, {"value": [1.0, 3.01]}]
    changes.append({"surprise": 1})
    stored = [{"vit_b": {"neck0": entry | change}} for change in changes]
    stored += [{"vit_b": {"neck9": entry}}, {"vit_x": {"neck0": entry}}, {}]
    for content in stored:
        write(tmp_path / "fingerprints.json", content)
        report = Report("fingerprints")
        fingerprints.compare(tmp_path, found, report)
        assert bool(report.failures) == (content != stored[0])


@pytest.mark.parametrize("tag", fingerprints.RECIPES)
def test_fingerprints_draw_weights_by_the_published_names(tag):
    if not SHARED.exists():
        pytest.skip("needs ../shared")
    with torch.device("meta"):
        detector = build_detector(load_config(fingerprints.RECIPES[tag]).model)
    layout = fingerprints.mmdet_format(split=fingerprints.SPLIT.get(tag, ()))
    theirs = fingerprints.to_theirs(detector.state_dict(), layout)
    published = json.loads((SHARED / "keys" / f"detector_{tag}.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in theirs.items()} == published


def test_a_case_without_losses_or_ground_truth_passes(tmp_path):
    """A case for inference; its config needs no settings for training."""
    link(tmp_path, CASE, "weights.npz", "masks_rle.json")
    content, config = read("io.npz"), read("config.json")
    for name in fork_detector.TRUTH:
        del content[name]
    for name in ("losses", "losses_total"):
        del config[name]
    for train_cfg in ({"train_cfg": None}, {}):
        del config["model"]["train_cfg"]
        config["model"] |= train_cfg
        write(tmp_path / "config.json", config)
        write(tmp_path / "io.npz", content)
        assert parity.main([str(tmp_path)]) == 0
    write(tmp_path / "io.npz", content | {"det_boxes": disturbed(content["det_boxes"])})
    assert parity.main([str(tmp_path)]) == 1
    write(tmp_path / "io.npz", content)
    write(tmp_path / "config.json", config | {"losses_total": 5.6})
    assert parity.main([str(tmp_path)]) == 1  # there is nothing to compare it with
