"""A backbone's golden case: from images to the four maps of strides 4 to 32.

In ViTAE-Transformer/ViTDet the backbone includes the resampling of its map to four (fpn1 to fpn4); here this is the
first part of the simple pyramid's levels, whose convolutions the cases do not contain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from tests.helpers import parts
from tests.parity.case import as_tensors, load
from tests.parity.device import CPU
from tests.parity.report import Report
from vitdet.models.vitae import wide_branch
from vitdet.weights.formats.mmdet import mmdet_format
from vitdet.weights.formats.swin import SWIN_MMDET
from vitdet.weights.formats.table import Format, to_ours
from vitdet.weights.formats.vitaev2 import VITAEV2

TOLERANCE = 1e-4  # absolute; the reference's float32 and float64 runs differ by less than 4e-5
STRIDE = 16
NOTES = ("kind", "seed", "note", "float64_max_abs_diff")


class System(NamedTuple):
    """A type of backbone in config.json: how its module is built from its settings, and the names of its weights.

    The module computes the four maps of images; `settings` are the supported ones; all others are rejected.
    """

    build: Callable[[dict], nn.Module]
    layout: Callable[[dict], Format]
    settings: tuple[str, ...]


class Resampled(nn.Module):
    """A backbone with one map, and its resampling to four scales: (B, 3, H, W) -> four maps (B, C, ., .)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        channels, stride = backbone.out_channels, backbone.stride
        self.pyramid = parts.pyramid(channels, 1, stride, halve_channels=False)
        self.pyramid.levels = nn.ModuleList(level[:-2] for level in self.pyramid.levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of strides 4, 8, 16 and 32."""
        return self.pyramid(self.backbone(images))[:4]


def grid_of(settings: dict) -> tuple[int, int]:
    """Return the token grid of the one image size that the reference's backbone accepts."""
    height, width = to_2tuple(settings["img_size"])
    return height // STRIDE, width // STRIDE


def global_blocks(settings: dict) -> list[int]:
    """Return the indices of global blocks: listed for ViTAE-S, every `interval`-th for the others."""
    if "globalBlock" in settings:
        return list(settings["globalBlock"])
    interval = settings.get("interval", 3)
    return [i for i in range(settings["depth"]) if (i + 1) % interval == 0]


def build_vit(settings: dict) -> nn.Module:
    """Build the backbone of ViT-B or ViTAE-B at the size in the settings."""
    dim, mlp_ratio, branch = settings["embed_dim"], settings.get("mlp_ratio", 4), None
    if settings["type"] == "ViTAE":
        branch = partial(wide_branch, dim, int(mlp_ratio * dim))
    return parts.vit(
        dim=dim,
        depth=settings["depth"],
        heads=settings["num_heads"],
        global_blocks=global_blocks(settings),
        mlp_ratio=mlp_ratio,
        pos_embed_grid=grid_of(settings),
        rel_pos_size=to_2tuple(settings["img_size"]),
        scaled_rel_pos=True,
        final_norm=True,
        branch=branch,
    )


def build_vitae_small(settings: dict) -> nn.Module:
    """Build the backbone of ViTAE-S at the size in the settings."""
    widths, dims = settings["embed_dims"], settings["token_dims"]
    return parts.vitae_small(
        dim=dims[-1],
        depth=settings["NC_depth"][-1],
        heads=settings["NC_heads"][-1],
        widths=widths,
        cell_dims=dims[:-1],
        groups=settings["NC_group"][-1],
        global_blocks=global_blocks(settings),
        window_size=to_2tuple(settings["window_size"])[0],
        rel_pos_size=to_2tuple(settings["img_size"]),
        mlp_ratio=settings["mlp_ratio"],
        scaled_rel_pos=True,
        final_norm=True,
    )


class Hierarchical(nn.Module):
    """A backbone with four maps, named `backbone` as in a detector."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, C, ., .)."""
        return self.backbone(images)


def fixed(settings: dict, values: dict) -> None:
    """Raise ValueError for a setting that differs from its only supported value."""
    for name, value in values.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, got {settings[name]}")


def build_swin(settings: dict) -> nn.Module:
    """Build mmdet's Swin at the size in the settings. Raises ValueError for settings of no known size."""
    fixed(settings, {"mlp_ratio": 4})
    return Hierarchical(
        parts.swin(
            dim=settings["embed_dims"],
            depths=settings["depths"],
            heads=settings["num_heads"],
            window_size=settings["window_size"],
        )
    )


def build_vitaev2(settings: dict) -> nn.Module:
    """Build ViTAEv2 at the size in the settings. Raises ValueError for settings of no known size."""
    attention = ["window", "window", "transformer", "transformer"]
    values = {"in_chans": 3, "stages": 4, "downsample_ratios": [4, 2, 2, 2], "mlp_ratio": 4}
    tokens = {"RC_tokens_type": attention, "NC_tokens_type": attention}
    fixed(settings, {**values, **tokens, "out_indices": [0, 1, 2, 3]})
    return Hierarchical(
        parts.vitaev2(
            widths=settings["embed_dims"],
            dims=settings["token_dims"],
            depths=settings["NC_depth"],
            reduction_heads=settings["RC_heads"],
            heads=settings["NC_heads"],
            reduction_groups=settings["RC_group"],
            groups=settings["NC_group"],
            window_size=settings["window_size"],
        )
    )


def fork_layout(settings: dict) -> Format:
    """Return the table of ViTAE-Transformer/ViTDet's names."""
    return mmdet_format(grid=grid_of(settings), wide=global_blocks(settings))


def resampled(build: Callable[[dict], nn.Module]) -> Callable[[dict], nn.Module]:
    """Return a function that builds the backbone with its resampling to four maps."""
    return lambda settings: Resampled(build(settings))


RATES = ("type", "drop_rate", "attn_drop_rate", "drop_path_rate", "use_checkpoint", "qk_scale")
PLAIN = (
    *RATES,
    *("img_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "use_abs_pos_emb"),
    "interval",
)
CELLS = (
    *RATES,
    *("img_size", "RC_tokens_type", "NC_tokens_type", "stages", "embed_dims", "token_dims"),
    *("window_size", "downsample_ratios", "NC_depth", "NC_heads", "RC_heads", "NC_group"),
    *("RC_group", "mlp_ratio", "globalBlock"),
)
SYSTEMS = {
    "ViT": System(resampled(build_vit), fork_layout, PLAIN),
    "ViTAE": System(resampled(build_vit), fork_layout, PLAIN),
    "ViTAE_S": System(resampled(build_vitae_small), fork_layout, CELLS),
    "ViTAEv2": System(
        build_vitaev2,
        lambda settings: VITAEV2,
        (*(name for name in CELLS if name != "globalBlock"), "in_chans", "out_indices"),
    ),
    "SwinTransformer": System(
        build_swin,
        lambda settings: SWIN_MMDET,
        (*RATES, "embed_dims", "depths", "num_heads", "window_size", "mlp_ratio"),
    ),
}


def system_of(settings: dict) -> System:
    """Return the system of a config. Raises ValueError for an unsupported type, setting or value."""
    system = SYSTEMS.get(settings["type"])
    kind = settings["type"]
    if system is None:
        raise ValueError(f"a backbone of type {kind}: expected one of {', '.join(SYSTEMS)}")
    if unknown := sorted(settings.keys() - set(system.settings)):
        raise ValueError(f"settings of a {kind} that are not rebuilt here: {', '.join(unknown)}")
    if settings.get("qk_scale") is not None:
        raise ValueError(f"qk_scale: expected null (head_dim ** -0.5), got {settings['qk_scale']}")
    return system


def compute(folder: Path, device: torch.device = CPU) -> dict[str, Tensor]:
    """Read only the settings, weights and images; return the maps by name."""
    settings = json.loads((folder / "config.json").read_text())["backbone"]
    system = system_of(settings)
    weights = as_tensors(load(folder / "weights.npz"), "backbone.")
    images = torch.from_numpy(load(folder / "io.npz", lambda name: name == "img")["img"])
    model = system.build(settings)
    model.load_state_dict(to_ours(weights, system.layout(settings)))
    model, images = model.to(device), images.to(device)
    with torch.no_grad():
        return {f"feat{i}": feature for i, feature in enumerate(model.eval()(images))}


def compare(folder: Path, found: dict[str, Tensor], report: Report) -> None:
    """Compare every array of io.npz, and config.json's statements about them."""
    stored = load(folder / "io.npz")
    report.skip("backbone.img", "an input: it shows in the maps")
    for name, ours in found.items():
        # Of large maps, only every second pixel is stored.
        forms = {name: ours, f"{name}_s2": ours[:, :, ::2, ::2]}
        for form in forms.keys() & stored.keys():
            report.close(f"backbone.{form}", forms[form], stored[form], TOLERANCE)
        if not forms.keys() & stored.keys():
            report.out(f"backbone.{name}", "computed here but not stored")
    report.all_seen([f"backbone.{name}" for name in stored])
    config = json.loads((folder / "config.json").read_text())
    said = {
        "input_shape": (stored["img"].shape,),
        "feat_shapes": [f.shape for f in found.values()],
        "feat_std": [f.std() for f in found.values()],
    }
    for name, value in config.items():
        if name == "backbone" or name in NOTES:
            report.skip(
                f"config.{name}", "a note" if name in NOTES else "an input: it shows in the maps"
            )
        elif name in said:
            theirs = [value] if name == "input_shape" else value
            report.close(f"config.{name}", np.array(said[name]), np.array(theirs), TOLERANCE)
        else:
            report.out(f"config.{name}", "not compared: this check does not know the entry")
