"""Published checkpoints find a place for each of their tensors, and ours are all filled."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitdet.config import BackboneConfig, ModelConfig, RoIHeadsConfig
from vitdet.models import build_detector
from vitdet.weights.convert import DETECTRON2, drop_class_token, rename, to_ours

KEYS = Path(__file__).parents[2] / "shared" / "reference" / "detectron2" / "keys"
PUBLISHED = [
    f"{data}_{kind}mask_rcnn_vitdet_{size}_{epochs}ep"
    for data, ours in (("COCO", {"b": 100, "l": 100, "h": 75}), ("LVIS", {"b": 100, "l": 100, "h": 100}))
    for kind in ("", "cascade_")
    for size, epochs in ours.items()
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_has_a_place_for_each_tensor(name):
    if not KEYS.exists():
        pytest.skip("needs ../shared")
    stored = json.loads((KEYS / f"{name}.json").read_text())
    lvis, cascade = name.startswith("LVIS"), "cascade" in name
    classes = 1203 if lvis else 80
    config = ModelConfig(
        backbone=BackboneConfig(name=f"vit_{name.split('_')[-2]}"),
        roi_heads=replace(RoIHeadsConfig(), num_classes=classes, ious=(0.5, 0.6, 0.7) if cascade else (0.5,),
                          loss="federated" if lvis else "softmax"),
    )
    with torch.device("meta"):
        detector = build_detector(config, class_weights=torch.ones(classes) if lvis else None)
        theirs = {key: torch.empty(shape) for key, shape in stored["keys"].items()}
    ours = {key: tuple(value.shape) for key, value in detector.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in to_ours(theirs, DETECTRON2).items()} == ours
    renamed = [name for name in (rename(key, DETECTRON2) for key in stored["keys"]) if name is not None]
    assert len(set(renamed)) == len(renamed)  # none twice
    token = detector.backbone.out_channels  # their position of the class token
    assert sum(p.numel() for p in detector.parameters()) + token == stored["n_params"]


def test_class_token_is_dropped():
    stored = torch.arange(10.0).view(1, 10, 1)
    assert drop_class_token(stored)[0, :, :, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with pytest.raises(ValueError, match="expected"):
        drop_class_token(torch.zeros(1, 9, 1))


def test_names():
    assert rename("backbone.net.blocks.3.attn.qkv.weight", DETECTRON2) == "backbone.blocks.3.attn.qkv.weight"
    assert rename("roi_heads.box_head.2.conv4.norm.bias", DETECTRON2) == "roi_heads.stages.2.convs.3.norm.bias"
    assert rename("roi_heads.box_head.conv1.weight", DETECTRON2) == "roi_heads.stages.0.convs.0.conv.weight"
    assert rename("somewhere.else", DETECTRON2) is None


def test_unknown_names_are_an_error_and_made_buffers_are_not():
    weights = {"backbone.net.pos_embed": torch.zeros(1, 5, 2), "pixel_mean": torch.zeros(3),
               "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
    assert {name: tuple(t.shape) for name, t in to_ours(weights, DETECTRON2).items()} == {
        "backbone.pos_embed": (1, 2, 2, 2)
    }
    with pytest.raises(ValueError, match="1 tensors that this format does not know, such as head.extra"):
        to_ours(weights | {"head.extra": torch.zeros(1)}, DETECTRON2)
