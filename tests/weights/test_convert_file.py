"""`vitdet weights convert`: this package and the target format's readers read the output."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import minimal
from tests.helpers.published import file_of
from tests.helpers.runs import assert_equal
from vitdet.checkpoint import (
    FORMAT,
    load_model_file,
    restore_detector,
    save,
    save_safetensors,
    write_tensors,
)
from vitdet.config import load_config, save_config, to_dict
from vitdet.models import build_detector
from vitdet.predictor import Predictor
from vitdet.weights.convert import class_names, convert_file
from vitdet.weights.load import load_pretrained, read_source

PLAIN = ["model.backbone.patch_size=16", "model.pyramid.scales=[4, 2, 1, 0.5]"]
FORK = [
    *PLAIN,
    "model.backbone.scaled_rel_pos=true",
    "model.backbone.final_norm=true",
    "model.rpn.norm=true",
    "model.pyramid.halve_channels=false",
    "model.clamp_shrinking=true",
    "model.norm_eps=1e-5",
]


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Path:
    """Return a config file of a small model with Detectron2's pyramid."""
    return write_config(tiny, tmp_path / "small.yaml", PLAIN)


@pytest.fixture
def model(recipe: Path, tmp_path: Path) -> Path:
    """Return the model's checkpoint, with random values in all weights."""
    return write_model(recipe, tmp_path / "model.pt")


def write_config(tiny: Path, path: Path, changes: list[str]) -> Path:
    save_config(load_config("tiny", [*minimal(tiny), *changes]), path)
    return path


def write_model(recipe: Path, path: Path) -> Path:
    config = load_config(recipe)
    torch.manual_seed(0)
    detector = build_detector(config.model, config.evaluate)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    names = list("abcdefgh"[: config.model.roi_heads.num_classes])
    content = {"format": FORMAT, "config": to_dict(config), "class_names": names}
    save(path, {**content, "model": detector.state_dict()})
    return path


def refused(*given: object, **named: object) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        convert_file(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_detector_converts_to_detectron2_and_back(
    model: Path, recipe: Path, tmp_path: Path, picture: Path, suffix: str
) -> None:
    theirs, back = tmp_path / f"theirs{suffix}", tmp_path / "back.pt"
    assert convert_file(model, theirs, "detectron2", reverse=True) == []
    if suffix == ".pkl":
        content = pickle.loads(theirs.read_bytes())
        assert b"numpy._core" not in theirs.read_bytes()  # unknown to NumPy before 1.26.1
        assert content.keys() == {"model", "__author__"}
        assert content["model"]["backbone.net.blocks.0.attn.rel_pos_h"].dtype == "float32"
        assert not content["model"]["backbone.net.pos_embed"][:, 0].any()
    notes = convert_file(theirs, back, "detectron2", recipe)
    count = len(load_model_file(back)["class_names"])
    unknown = f"class names: unknown for num_classes={count} (coco)"
    assert notes == [f"{unknown}; named class 0, class 1, ..."]
    before, after = (restore_detector(path)[0].state_dict() for path in (model, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected, found = (Predictor.load(path)(picture, 0.0) for path in (model, back))
    assert torch.equal(expected.boxes, found.boxes) and found.class_names[0] == "class 0"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_detector_converts_to_mmdet_and_back(tiny: Path, tmp_path: Path) -> None:
    """The new detector may apply relative positions to unscaled queries, with the same output."""
    configs = {"fork": FORK, "mixed": [*FORK, "model.backbone.scaled_rel_pos=false"]}
    paths = {
        name: write_config(tiny, tmp_path / f"{name}.yaml", changes)
        for name, changes in configs.items()
    }
    ours = write_model(paths["fork"], tmp_path / "ours.pt")
    convert_file(ours, tmp_path / "theirs.pth", "mmdet", reverse=True)
    content = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert content["state_dict"]["backbone.pos_embed"].dim() == 3
    image = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    features = {}
    for name, path in paths.items():
        notes = convert_file(tmp_path / "theirs.pth", tmp_path / f"{name}.pt", "mmdet", path)
        assert bool(notes) == (name == "mixed")
        again, _, names = restore_detector(tmp_path / f"{name}.pt")
        assert names == tuple(load_model_file(ours)["class_names"])  # stored in mmdet's files
        features[name] = again.backbone(image.float() / 255)
    assert notes == [
        "relative positions: rescaled for this model, which applies them to the unscaled query"
    ]
    table = load_model_file(ours)["model"]["backbone.blocks.1.attn.rel_pos_h"]
    rescaled = again.state_dict()["backbone.blocks.1.attn.rel_pos_h"]
    torch.testing.assert_close(rescaled, table * 32**-0.5)
    torch.testing.assert_close(features["mixed"], features["fork"], atol=1e-5, rtol=1e-5)
    text = refused(ours, tmp_path / "x.pkl", "detectron2", reverse=True)
    says = "cannot be converted to detectron2: model.norm_eps is 1e-05, but detectron2 uses 1e-06;"
    assert f"ours.pt: {says}" in text


def test_a_safetensors_file_names_its_layout(model: Path, recipe: Path, tmp_path: Path) -> None:
    """The metadata names the layout, so the file can be loaded or converted to a detector later."""
    convert_file(model, tmp_path / "theirs.pkl", "detectron2", reverse=True)
    convert_file(tmp_path / "theirs.pkl", tmp_path / "ours.safetensors", "detectron2")
    expected = {"format": "pt", "layout": "detectron2", "scaled_rel_pos": "false"}
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == expected
    convert_file(tmp_path / "theirs.pkl", tmp_path / "fitted.safetensors", "detectron2", recipe)
    assert read_source(tmp_path / "fitted.safetensors", "vitdet").class_names == ()  # unknown
    convert_file(model, tmp_path / "named.safetensors", "vitdet")
    names = tuple(load_model_file(model)["class_names"])
    assert read_source(tmp_path / "named.safetensors", "vitdet").class_names == names
    assert read_source(tmp_path / "ours.safetensors", "vitdet").layout == "detectron2"
    convert_file(tmp_path / "ours.safetensors", tmp_path / "again.pt", "vitdet", recipe)
    first, two = load_model_file(model)["model"], load_model_file(tmp_path / "again.pt")["model"]
    assert all(torch.equal(first[name], two[name]) for name in first)
    config = load_config(recipe)
    detector = build_detector(config.model)
    assert not load_pretrained(detector, tmp_path / "ours.safetensors").fresh


def test_a_detector_in_half_precision_converts_to_detectron2(
    model: Path, recipe: Path, tmp_path: Path
) -> None:
    content, theirs = load_model_file(model), tmp_path / "theirs.pkl"
    for dtype in (torch.bfloat16, torch.float16):
        weights = {name: tensor.to(dtype) for name, tensor in content["model"].items()}
        save(model, {**content, "model": weights})
        convert_file(model, theirs, "detectron2", reverse=True)
        convert_file(theirs, tmp_path / "back.pt", "detectron2", recipe)
        back = load_model_file(tmp_path / "back.pt")["model"]
        assert_equal(back, {name: tensor.float() for name, tensor in weights.items()})


def test_a_registered_detector_has_the_properties_of_its_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    """Class names and the scale of relative positions are read from both files."""
    model = write_model(write_config(tiny, tmp_path / "fork.yaml", FORK), tmp_path / "model.pt")
    save_safetensors(tmp_path / "registered.safetensors", load_model_file(model))
    expected = read_source(model, "vitdet")
    found = read_source(tmp_path / "registered.safetensors", "vitdet")
    assert expected.scaled and len(expected.class_names) > 1
    assert (found.scaled, found.class_names) == (expected.scaled, expected.class_names)


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    """Tied weights share memory, which safetensors rejects."""
    tied, path = torch.arange(6.0).view(2, 3), tmp_path / "tied.safetensors"
    write_tensors(path, {"a": tied, "b": tied, "c": tied[1:]}, {})
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), tied) and torch.equal(file.get_tensor("b"), tied)
        assert torch.equal(file.get_tensor("c"), tied[1:])


def test_pretrained_weights_are_converted_to_safetensors(tmp_path: Path) -> None:
    weights = {name: tensor.contiguous().half() for name, tensor in file_of("mae/base").items()}
    mae, other = tmp_path / "mae.pth", tmp_path / "x.safetensors"
    torch.save({"model": weights}, mae)
    assert convert_file(mae, tmp_path / "mae.safetensors", "mae") == []
    source = read_source(tmp_path / "mae.safetensors", "vitdet")
    assert source.layout == "mae" and source.scaled is None and not source.whole
    assert source.weights["backbone.pos_embed"].shape == (1, 14, 14, 768)
    text = refused(mae, tmp_path / "mae.pt", "mae", "mask_rcnn_vitdet_b_coco")
    assert "mae.pth: contains only a backbone" in text
    text = refused(mae, other, "mae", "mask_rcnn_vitae_b_coco")
    assert "does not fit this backbone: " in text
    assert "missing tensors (108): backbone.blocks.0.pcm.0.weight" in text
    text = refused(mae, other, "vitae_cls")
    assert "read as vitae_cls: tensors unknown to this format (150): cls_token" in text
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_invalid_combinations_are_rejected(model: Path, recipe: Path, tmp_path: Path) -> None:
    pkl, pt, pth = (tmp_path / f"x.{suffix}" for suffix in ("pkl", "pt", "pth"))
    ends = "expected a name that ends in"
    for given, says in (
        ((model, pkl, "detectron2"), f"{ends} .safetensors or .pt"),
        ((model, pt, "vitdet"), "set --recipe NAME"),
        ((model, pt, "detectron3"), "unknown weights format 'detectron3'; expected one of"),
        ((tmp_path / "none.pkl", pt, "detectron2", recipe), "none.pkl: no such weights file"),
        ((model, model, "vitdet", recipe), "is also the source file; choose"),
        ((model, pt, "vitdet", "mask_rcnn_vitdet_b_coco"), "model.pt: does not fit this detector"),
    ):
        assert says in refused(*given), says
    for given, says in (
        ((model, pth, "mae"), "supports --format detectron2 and mmdet, got mae"),
        ((model, pkl, "mmdet"), f"{ends} .pth (for mmdet)"),
        ((model, pth, "mmdet"), "cannot be converted to mmdet: "),
        ((recipe, pth, "mmdet"), "small.yaml: not a complete vitdet checkpoint"),
    ):
        assert says in refused(*given, reverse=True), says
    save_config(load_config(recipe, ["model.roi_heads.num_classes=80"]), tmp_path / "coco.yaml")
    text = refused(model, pt, "vitdet", tmp_path / "coco.yaml")
    assert "6 in the file, 80 in the recipe; to train on the recipe's classes, set" in text
    assert not list(tmp_path.glob("*x.p*"))


def test_the_classes_of_published_detectors_are_known() -> None:
    coco, lvis = (
        class_names(load_config(f"mask_rcnn_vitdet_b_{data}"))[0] for data in ("coco", "lvis")
    )
    assert (len(coco), coco[0], coco[-1]) == (80, "person", "toothbrush")
    assert (len(lvis), lvis[0], lvis[-1]) == (1203, "aerosol_can", "zucchini")
    assert class_names(load_config("mask_rcnn_vitdet_b_coco"), ("a",) * 80) == (("a",) * 80, [])
