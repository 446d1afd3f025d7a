"""The test-time pipeline of ViTAE-Transformer/ViTDet (mmdet, OpenCV): resize, RGB, normalization, padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.parity.case import load
from tests.parity.report import Report
from vitdet.data.transforms import resize_and_pad
from vitdet.models.detector import Detector

GRAY_LEVEL = 1 / 57  # of a normalized channel


def compute(folder: Path) -> dict[str, np.ndarray]:
    """Return each tag's results, {tag/out: normalized canvas (3, S, S), tag/img_shape: ..., ...}."""
    config = json.loads((folder / "config.json").read_text())
    inputs = load(folder / "io.npz", lambda name: name.endswith("/bgr"))
    parts = Detector(
        **{name: nn.Identity() for name in ("backbone", "pyramid", "rpn", "roi_heads")}
    )
    ours = {}
    for name, bgr in inputs.items():
        tag = name.removesuffix("/bgr")
        side = max(config[tag]["pad_shape"][:2])
        canvas, size = resize_and_pad(np.ascontiguousarray(bgr[..., ::-1]), side, antialias=False)
        normal = parts.normalize(torch.from_numpy(canvas)[None], torch.tensor([size]))
        factors = np.array([size[1] / bgr.shape[1], size[0] / bgr.shape[0]] * 2)
        ours |= {
            f"{tag}/out": normal[0].numpy(),
            f"{tag}/img_shape": np.array([*size, 3]),
            f"{tag}/pad_shape": np.array([*canvas.shape[1:], 3]),
            f"{tag}/scale_factor": factors,
            f"{tag}/ori_shape": np.array(bgr.shape),
        }
    return ours


def compare(folder: Path, found: dict[str, np.ndarray], report: Report) -> None:
    """Compare each tag's canvas, shapes and factors."""
    stored = load(folder / "io.npz")
    config = json.loads((folder / "config.json").read_text())
    for tag, values in config.items():
        stored |= {f"{tag}/{key}": np.array(value) for key, value in values.items()}
    tolerances = {"out": GRAY_LEVEL, "scale_factor": 1e-6}
    for name in stored:
        if name.endswith("/bgr"):
            report.skip(f"pipeline.{name}", "an input: it shows in what is made of it")
    report.table("pipeline", found, stored, lambda name: tolerances.get(name.split("/")[-1], 0.0))
