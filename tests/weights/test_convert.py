"""Published files map completely to our names, fit the published models, and convert back unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.published import BACKBONES, DETECTORS, PUBLISHED, file_of, model_of
from vitdet.weights.formats import FORMATS
from vitdet.weights.formats.detectron2 import DETECTRON2, drop_class_token
from vitdet.weights.formats.mmdet import MMDET, mmdet_format
from vitdet.weights.formats.table import rename, to_ours, to_theirs
from vitdet.weights.formats.vitae import VITAE
from vitdet.weights.load import Source, fitted
from vitdet.weights.resize import (
    rescale_relative_positions,
    resize_grid,
    resize_kernel,
    resize_table,
)

BIAS = "roi_heads.box_predictor{}.cls_score.bias"

FILE = Path("the file")


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def read(name: str) -> Source:
    layout = name.split("/")[0]
    return Source(to_ours(file_of(name), FORMATS[layout]), layout, FORMATS[layout].scaled)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_published_detector_fits_the_recipe_and_converts_back(name: str) -> None:
    detector, theirs = model_of(DETECTORS[name]), file_of(name)
    weights, notes = fitted(read(name), detector, FILE)
    assert shapes(weights) == shapes(detector.state_dict()) and not notes

    ours = sum(parameter.numel() for parameter in detector.parameters())
    unread = {
        "mmdet/vit_b": 0,
        # four blocks have q_bias and v_bias; ours also have a key bias, which has no effect
        "mmdet/vitae_b": -4 * 768,
        # `attn.w` of two cells has no gradient and is not a parameter here
        "mmdet/vitae_s": 23040,
    }
    token = (
        detector.backbone.out_channels
    )  # the position embedding of the class token in Detectron2's files
    assert PUBLISHED[name]["n_params"] - ours == unread.get(name, token)

    split = (2, 5, 8, 11) if name == "mmdet/vitae_b" else ()
    mmdet = mmdet_format(split=split)
    back = to_theirs(weights, mmdet if name.startswith("mmdet") else DETECTRON2)
    assert shapes(back) == shapes(theirs)
    for key, tensor in back.items():
        expected = theirs[key]
        if name.startswith("detectron2") and key == "backbone.net.pos_embed":
            assert not tensor[:, 0].any()  # the class token, which no detector uses
            tensor, expected = tensor[:, 1:], expected[:, 1:]
        if "fed_loss" in key:  # all stages have copies of the same frequencies
            expected = theirs[key.replace(".1.", ".0.").replace(".2.", ".0.")]
        assert tensor.data_ptr() == expected.data_ptr() or torch.equal(tensor, expected), key


@pytest.mark.parametrize(("name", "recipe"), BACKBONES)
def test_published_pretrained_weights_fill_the_backbone(name: str, recipe: str) -> None:
    detector, theirs = model_of(recipe), file_of(name)
    layout = FORMATS[name.split("/")[0]]
    source = read(name)
    weights, notes = fitted(source, detector, FILE)
    own = shapes(detector.state_dict())
    assert all(own[key] == tuple(tensor.shape) for key, tensor in weights.items())
    lacking = [key for key in own if key.startswith("backbone.") and key not in weights]
    norm = ["backbone.norm.weight", "backbone.norm.bias"] if "backbone.norm.weight" in own else []
    assert [key for key in lacking if not key.endswith(("rel_pos_h", "rel_pos_w"))] == (
        norm if name.startswith("vitae_cls") else []
    )
    assert len(notes) == BACKBONES[name, recipe], notes
    left = {key for key in theirs if rename(key, layout) not in weights}
    if name.startswith("mae"):
        assert left == {"cls_token", *(() if norm else ("norm.weight", "norm.bias"))}
    else:
        base = {"layers.0.RC.cls_token", "fc_norm.weight", "fc_norm.bias"}
        assert left == {"head.weight", "head.bias"} | (base if name.endswith("Base") else set())


@pytest.mark.parametrize(
    ("layout", "theirs", "ours"),
    [
        ("detectron2", "backbone.net.blocks.3.norm1.bias", "backbone.blocks.3.norm1.bias"),
        ("detectron2", "roi_heads.box_head.2.fc1.bias", "roi_heads.stages.2.fcs.0.bias"),
        ("detectron2", "roi_heads.mask_head.predictor.bias", "roi_heads.mask.logits.bias"),
        ("mmdet", "neck.fpn_convs.0.ln.weight", "pyramid.levels.0.5.norm.weight"),
        ("mmdet", "backbone.layers.2.NC.13.PCM.4.bias", "backbone.blocks.13.pcm.4.bias"),
        ("vitae_cls", "layers.0.RC.PRM.proj.bias", "backbone.patch_embed.proj.bias"),
        ("detectron2", "somewhere.else", None),
    ],
)
def test_tensor_names_are_mapped(layout: str, theirs: str, ours: str | None) -> None:
    assert rename(theirs, FORMATS[layout]) == ours


def test_unknown_names_are_rejected_and_computed_buffers_are_ignored() -> None:
    weights = {
        "backbone.net.pos_embed": torch.zeros(1, 5, 2),
        "pixel_mean": torch.zeros(3),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    assert shapes(to_ours(weights, DETECTRON2)) == {"backbone.pos_embed": (1, 2, 2, 2)}
    q, qkv = torch.zeros(1), torch.zeros(3)
    both = {"attn.qkv.bias": qkv, "attn.q_bias": q, "attn.v_bias": q}
    both = {f"blocks.0.{name}": tensor for name, tensor in both.items()}
    twice = {BIAS.format(stage): q for stage in ("", ".0")}
    for convert, layout, given, says in (
        (to_ours, DETECTRON2, {**weights, "head.extra": q}, r"unknown .* \(1\): head.extra"),
        (to_theirs, DETECTRON2, {"backbone.blocks.0.pcm.0.weight": q}, "without a name in this"),
        (to_ours, VITAE, both, "both blocks.0.attn.q_bias and blocks.0.attn.qkv.bias"),
        (to_ours, DETECTRON2, twice, "two tensors map to roi_heads.stages.0.logits.bias"),
    ):
        with pytest.raises(ValueError, match=says):
            convert(given, layout)


@pytest.mark.parametrize("style", ["mae", "beit"])
def test_vitae_b_loads_with_names_of_an_autoencoder(style: str) -> None:
    """In one style, the reference's loader drops biases of 4 of 12 blocks; in the other, of 8."""
    theirs = {}
    for name, tensor in file_of("mmdet/vitae_b").items():
        name = name.removeprefix("backbone.")
        if name.startswith(("blocks.", "patch_embed.", "norm.")) and "rel_pos" not in name:
            theirs[name] = tensor
    theirs |= {"cls_token": torch.zeros(1, 1, 768), "pos_embed": torch.randn(1, 197, 768)}
    for i in range(12):
        stem = f"blocks.{i}.attn."
        for key in ("q_bias", "v_bias", "qkv.bias"):
            theirs.pop(stem + key, None)
        query, value = torch.randn(768), torch.randn(768)
        if style == "beit":
            theirs |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        else:
            theirs[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros(768), value])
    detector = model_of("mask_rcnn_vitae_b_coco")
    weights, notes = fitted(Source(to_ours(theirs, VITAE), "vitae", None), detector, FILE)
    own = {name for name in detector.state_dict() if name.startswith("backbone.")}
    assert weights.keys() == {name for name in own if "rel_pos" not in name}
    assert notes == ["backbone.pos_embed: resized from (1, 14, 14, 768) to (1, 64, 64, 768)"]


def test_the_class_token_is_dropped() -> None:
    stored = torch.arange(10.0).view(1, 10, 1)
    assert drop_class_token(stored)[0, :, :, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(ValueError, match="expected"):
        drop_class_token(torch.zeros(1, 9, 1))


def test_missing_key_biases_are_zero() -> None:
    query, stem = {"blocks.2.attn.q_bias": torch.tensor([1.0])}, "backbone.blocks.2.attn."
    ours = to_ours({**query, "blocks.2.attn.v_bias": torch.tensor([3.0])}, VITAE)
    assert ours[f"{stem}qkv.bias"].tolist() == [1, 0, 3]
    trained = {f"{stem}qkv.bias": torch.tensor([1.0, 9.0, 3.0])}
    back = to_theirs(trained, mmdet_format(split=[2]))
    assert back == {f"{stem}q_bias": torch.tensor([1.0]), f"{stem}v_bias": torch.tensor([3.0])}
    with pytest.raises(ValueError, match="q_bias, but not blocks.2.attn.v_bias"):
        to_ours(query, VITAE)


def test_position_tables_of_non_square_images_are_converted() -> None:
    layout = mmdet_format(grid=(3, 2), wide=[1])
    weights = {
        "backbone.pos_embed": torch.arange(6.0).view(1, 6, 1),
        "backbone.blocks.0.attn.rel_pos_w": torch.ones(27, 1),  # a table for windows
        "backbone.blocks.1.attn.rel_pos_w": torch.arange(5.0).view(5, 1),
    }
    ours = to_ours(weights, layout)
    assert ours["backbone.pos_embed"][0, :, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    # the tail is unused
    assert ours["backbone.blocks.1.attn.rel_pos_w"][:, 0].tolist() == [0, 1, 2]
    assert shapes(to_theirs(ours, layout)) == shapes(weights)
    says = r"expected \(1, n \* n, C\) without a class token, got \(1, 6, 1\)"
    with pytest.raises(ValueError, match=says):
        to_ours(weights, MMDET)


def test_relative_positions_are_rescaled_to_the_same_function() -> None:
    table, query = torch.randn(5, 64), torch.randn(64)
    name, bias = "backbone.blocks.0.attn.rel_pos_h", "backbone.blocks.0.attn.qkv.bias"
    weights = {name: table, bias: query}
    unscaled = rescale_relative_positions(weights, scaled=True, wanted=False)
    torch.testing.assert_close(unscaled[name] @ query, table @ (query * 64**-0.5))
    assert unscaled[bias] is query
    again = rescale_relative_positions(unscaled, scaled=False, wanted=True)
    torch.testing.assert_close(again[name], table)
    assert rescale_relative_positions(weights, True, True) is weights


def test_position_and_patch_embeddings_are_resized() -> None:
    rows = torch.arange(16.0)
    plane = torch.cartesian_prod(rows, rows).view(1, 16, 16, 2)
    wanted = torch.tensor([4.5, 6.5, 8.5, 10.5])[:, None].expand(4, 4)
    torch.testing.assert_close(resize_grid(plane, (8, 8))[0, 2:6, 2:6, 0], wanted)
    table = resize_table(torch.arange(27.0)[:, None].expand(27, 3), 53)
    # the center stays the center
    assert tuple(table.shape) == (53, 3) and abs(table[26, 0] - 13) < 1e-5
    kernel = resize_kernel(torch.ones(2, 3, 14, 14), 16)
    torch.testing.assert_close(kernel, torch.ones(2, 3, 16, 16))
