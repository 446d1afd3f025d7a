"""Known contents of the published files: tensor names, shapes, and the codebases that wrote them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vitdet.config import load_config
from vitdet.models import Detector
from vitdet.weights.convert import shapes_of

GOLDEN = Path(__file__).parents[1] / "golden"
# {name: {keys: {tensor: shape}, n_params of detectors}}
PUBLISHED: dict[str, dict] = json.loads(gzip.decompress((GOLDEN / "keys.json.gz").read_bytes()))
DETECTORS = {
    **{
        f"detectron2/{data}_{kind}mask_rcnn_vitdet_{size}_{epochs}ep": f"{kind}mask_rcnn_vitdet_{size}_{data.lower()}"
        for data, schedule in (
            ("COCO", {"b": 100, "l": 100, "h": 75}),
            ("LVIS", {"b": 100, "l": 100, "h": 100}),
        )
        for kind in ("", "cascade_")
        for size, epochs in schedule.items()
    },
    **{f"mmdet/{name}": f"mask_rcnn_{name}_coco" for name in ("vit_b", "vitae_b", "vitae_s")},
}
# (file, recipe) -> number of resized tensors
BACKBONES = {
    ("mae/base", "mask_rcnn_vitdet_b_coco"): 0,
    ("mae/base", "cascade_mask_rcnn_vitdet_b_lvis"): 0,
    ("mae/base", "mask_rcnn_vit_b_coco"): 1,
    ("mae/large", "mask_rcnn_vitdet_l_coco"): 0,
    ("mae/huge", "mask_rcnn_vitdet_h_coco"): 2,
    ("vitae_cls/Base", "mask_rcnn_vitae_b_coco"): 1,
    ("vitae_cls/Small", "mask_rcnn_vitae_s_coco"): 0,
    ("vitae_cls/Base", "cascade_mask_rcnn_vitdet_vitae_b_lvis"): 0,
}


@cache
def model_of(recipe: str) -> Detector:
    """Return the recipe's detector on the meta device."""
    return shapes_of(load_config(recipe))


@cache
def file_of(name: str) -> dict[str, Tensor]:
    """Return random tensors under published names; convolutions and large matrices are constant."""
    generator = torch.Generator().manual_seed(len(name))
    return {key: draw(shape, generator) for key, shape in PUBLISHED[name]["keys"].items()}


def draw(shape: list[int], generator: torch.Generator) -> Tensor:
    if len(shape) == 0:
        return torch.tensor(7)
    positions = len(shape) == 3 or len(shape) == 2 and shape[0] < 128
    drawn = torch.randn(shape if len(shape) == 1 or positions else (), generator=generator)
    return drawn.expand(shape)
