"""The baselines' published weights map completely to the models and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.published import PUBLISHED, file_of
from vitdet.config import from_dict
from vitdet.models import Detector, build_detector
from vitdet.weights.formats import FORMATS
from vitdet.weights.formats.swin import SWIN, SWIN_MMDET
from vitdet.weights.formats.table import to_ours, to_theirs
from vitdet.weights.load import Source, fitted

NAMES = {"swin_mmdet/swin_t": "swin_t", "vitaev2/vitaev2_s": "vitaev2_s"}


def detector_of(backbone: str) -> Detector:
    """Return the detector of the backbone's recipe on the meta device."""
    model = {
        "backbone": {"name": backbone, "window_size": 7},
        "pyramid": {"kind": "fpn"},
        "rpn": {"num_convs": 1},
        "roi_heads": {"num_convs": 0, "num_fcs": 2, "norm": False},
        "mask": {"norm": False},
    }
    config = from_dict({"model": model})
    with torch.device("meta"):
        return build_detector(config.model)


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def microsoft(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename mmdet's tensors like Swin-Transformer-Object-Detection; the shapes are equal."""
    parts = {"stages": "layers", "attn.w_msa": "attn", "projection": "proj"}
    parts |= {"ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2"}
    renamed = {}
    for name, tensor in theirs.items():
        if name.startswith("backbone."):
            for ours, other in parts.items():
                name = name.replace(ours, other)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("name", NAMES)
def test_a_published_detector_is_converted_in_both_directions(name: str) -> None:
    layout, theirs, detector = name.split("/")[0], file_of(name), detector_of(NAMES[name])
    source = Source(to_ours(theirs, FORMATS[layout]), layout, None)
    weights, notes = fitted(source, detector, Path("file"))
    assert shapes(weights) == shapes(detector.state_dict()) and not notes
    assert sum(p.numel() for p in detector.parameters()) == PUBLISHED[name]["n_params"]
    back = to_theirs(weights, FORMATS[layout])
    made = {key for key in theirs if key.endswith("relative_position_index")}
    assert set(theirs) - set(back) == made and not set(back) - set(theirs)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in back.items())
    assert len(made) == (12 if layout == "swin_mmdet" else 0)


def test_swin_is_converted_with_the_names_of_its_authors() -> None:
    theirs, detector = microsoft(file_of("swin_mmdet/swin_t")), detector_of("swin_t")
    ours = to_ours(theirs, SWIN)
    assert shapes(ours) == shapes(detector.state_dict())
    index = "attn.relative_position_index"
    stored = {name: tensor for name, tensor in theirs.items() if not name.endswith(index)}
    assert shapes(to_theirs(ours, SWIN)) == shapes(stored)
    halving = torch.randn(384, 768)  # inputs ordered by pixel, as in this project
    ours = to_ours({"backbone.layers.1.downsample.reduction.weight": halving}, SWIN)
    assert torch.equal(ours["backbone.layers.2.downsample.reduction.weight"], halving)


def test_published_classifiers_initialize_the_backbones() -> None:
    swin = {
        name.removeprefix("backbone."): tensor
        for name, tensor in microsoft(file_of("swin_mmdet/swin_t")).items()
        if name.startswith("backbone.") and not name.startswith("backbone.norm")
    }
    classifier = {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768)}
    classifier |= {"head.bias": (1000,), "layers.0.blocks.1.attn_mask": (64, 49, 49)}
    swin |= {name: torch.zeros(size) for name, size in classifier.items()}
    vitaev2 = {
        name.removeprefix("backbone."): tensor
        for name, tensor in file_of("vitaev2/vitaev2_s").items()
        if name.startswith("backbone.")
    }
    vitaev2 |= {"head.weight": torch.zeros(1000, 512), "head.bias": torch.zeros(1000)}
    fresh = [f"backbone.norms.{s}.{part}" for s in range(4) for part in ("weight", "bias")]
    cases = (("swin_t", "swin_cls", swin, fresh), ("vitaev2_s", "vitaev2_cls", vitaev2, []))
    for backbone, layout, theirs, lacking in cases:
        detector = detector_of(backbone)
        source = Source(to_ours(theirs, FORMATS[layout]), layout, None)
        weights, notes = fitted(source, detector, Path("file"))
        own = {name for name in detector.state_dict() if name.startswith("backbone.")}
        assert own - set(weights) == set(lacking) and not set(weights) - own and not notes


def test_patch_merging_is_equal_in_both_input_orders() -> None:
    """mmdet orders the inputs by channel (unfold), this project by pixel."""
    torch.manual_seed(0)
    norm, reduction = nn.LayerNorm(4 * 6), nn.Linear(4 * 6, 12, bias=False)
    x = torch.randn(2, 6, 8, 10)
    for parameter in (norm.weight, norm.bias):
        nn.init.normal_(parameter)
    wanted = reduction(norm(F.unfold(x, 2, stride=2).transpose(1, 2)))
    stem = "backbone.stages.0.downsample."
    theirs = {f"{stem}norm.{name}": parameter for name, parameter in norm.named_parameters()}
    theirs[f"{stem}reduction.weight"] = reduction.weight
    ours = {name.rpartition("downsample.")[2]: t for name, t in to_ours(theirs, SWIN_MMDET).items()}
    pixels = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=1)
    pixels = pixels.flatten(2).transpose(1, 2)
    normed = F.layer_norm(pixels, (24,), ours["norm.weight"], ours["norm.bias"])
    assert torch.allclose(normed @ ours["reduction.weight"].T, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"residual_blocks": [1]}, {"scaled_rel_pos": True}, {"final_norm": True}]
)
def test_swin_refuses_options_of_plain_backbones(setting: dict) -> None:
    backbone = {"name": "swin_t", "window_size": 7, **setting}
    config = from_dict({"model": {"backbone": backbone, "pyramid": {"kind": "fpn"}}})
    with pytest.raises(
        ValueError, match=f"{next(iter(setting))} applies to plain backbones only, not to swin_t"
    ):
        build_detector(config.model)
