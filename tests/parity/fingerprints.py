"""The three detectors of ViTAE-Transformer/ViTDet at 1024 x 1024, built from our recipes: a few values per stage.

Weights and image are not stored but drawn (`drawn`). The seed of a weight is its name in the reference (`weight`), so
the table of names is also compared. A detector takes about half a minute and 4 GB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from tests.parity.device import CPU
from tests.parity.report import Report
from vitdet.config import load_config
from vitdet.models import build_detector, mask_head
from vitdet.models.detector import Detector
from vitdet.models.roi_pool import pool
from vitdet.weights.formats.mmdet import mmdet_format
from vitdet.weights.formats.table import to_ours, to_theirs

TOLERANCE = 2e-3
RECIPES = {
    "vit_b": "mask_rcnn_vit_b_coco",
    "vitae_b": "mask_rcnn_vitae_b_coco",
    "vitae_s": "mask_rcnn_vitae_s_coco",
}
SPLIT = {"vitae_b": (2, 5, 8, 11)}  # blocks with separate biases of queries and values
SIDE, SEED = 1024, 123
ROIS = torch.tensor([[10.0, 20, 300, 200], [500, 400, 560, 470], [0, 0, 1024, 1024]])


def drawn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return normal float32 numbers that depend on the seed only."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return random values for a tensor of the reference, scaled to keep activations in range."""
    r = drawn(crc32(name.encode()), shape)
    if name.endswith("running_var"):
        return 0.3 * np.abs(r) + 0.6
    if name.endswith("running_mean"):
        return 0.2 * r
    if "rel_pos_" in name or "pos_embed" in name:
        return 0.5 * r
    if name.endswith(("q_bias", "v_bias")):
        return 0.3 * r
    if name.endswith("attn.w"):
        return r
    if len(shape) == 1:
        return 1 + 0.2 * r if name.endswith("weight") else 0.1 * r
    transposed = any(part in name for part in ("fpn1.", "fpn2.", "upsample"))
    fan = shape[0] if transposed else np.prod(shape[1:])
    return r * np.float32(fan**-0.5 * (0.5 if "kqv" in name else 1.0))


def build(tag: str) -> Detector:
    """Build one of the three detectors with weights from `weight`."""
    detector = build_detector(load_config(RECIPES[tag]).model)
    theirs = to_theirs(detector.state_dict(), mmdet_format(split=SPLIT.get(tag, ())))
    made = {
        name: tensor
        if name.endswith("num_batches_tracked")
        else torch.from_numpy(np.asarray(weight(name, tuple(tensor.shape)), np.float32))
        for name, tensor in theirs.items()
    }
    detector.load_state_dict(to_ours(made, mmdet_format()))
    return detector.eval()


def stages(detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """Compute everything that a fingerprint names, from the backbone's input."""
    heads, pyramid = detector.roi_heads, detector.pyramid
    last = detector.backbone(images)
    found = {f"feat{i}": level[:-2](last) for i, level in enumerate(pyramid.levels)}
    features = pyramid(last)
    found |= {f"neck{i}": feature for i, feature in enumerate(features)}
    for i, (logits, deltas) in enumerate(map(detector.rpn.head, features)):
        found |= {f"rpn_cls{i}": logits, f"rpn_reg{i}": deltas}
    rois = ROIS.to(images.device)
    every = torch.ones(1, len(rois), dtype=torch.bool, device=images.device)
    logits, deltas = heads.run_stage(0, features, rois[None], every)
    found |= {"roi_cls_score": logits[0], "roi_bbox_pred": deltas[0].flatten(1)}
    # The head returns the logits of each RoI's own class; its last layer, of all classes.
    hook = heads.mask.deconv.register_forward_hook(
        lambda _, __, output: found.update(mask_logits=heads.mask.logits(output.relu()))
    )
    first = torch.zeros(len(rois), dtype=torch.long, device=images.device)
    heads.mask(pool(features, rois, first, heads.strides, mask_head.BINS, 0), first)
    hook.remove()
    return found


def compute(folder: Path, device: torch.device = CPU) -> dict[str, dict[str, dict]]:
    """Compute the values at the detectors, stages and indices in fingerprints.json; read only these."""
    wanted = {
        tag: {stage: entry["index"] for stage, entry in entries.items()}
        for tag, entries in json.loads((folder / "fingerprints.json").read_text()).items()
    }
    image = torch.from_numpy(drawn(SEED, (1, 3, SIDE, SIDE))).to(device)
    found = {}
    for tag in wanted.keys() & RECIPES.keys():
        with torch.no_grad():
            maps = stages(build(tag).to(device), image)
        known = wanted[tag].keys() & maps.keys()
        found[tag] = {stage: print_of(maps[stage], wanted[tag][stage]) for stage in known}
    return found


def print_of(array: Tensor, index: list[int]) -> dict:
    """Return the shape, mean, standard deviation and values at flat indices of an array."""
    flat = array.flatten()
    return {
        "shape": list(array.shape),
        "mean": float(flat.double().mean()),
        "std": float(flat.double().std()),
        "value": flat[torch.tensor(index)].tolist(),
    }


def compare(folder: Path, found: Mapping[str, Mapping[str, dict]], report: Report) -> None:
    """Compare every entry of fingerprints.json."""
    stored = json.loads((folder / "fingerprints.json").read_text())
    if not stored:
        report.out("fingerprints", "it holds no stored result")
    for tag, stages_of_tag in stored.items():
        for stage, entries in stages_of_tag.items():
            ours = found.get(tag, {}).get(stage)
            if ours is None:
                unknown = "this check does not know the detector or the stage"
                report.out(f"{tag}.{stage}", f"not compared: {unknown}")
                continue
            for name, theirs in entries.items():
                full = f"{tag}.{stage}.{name}"
                if name == "index":
                    report.skip(full, "an input: the places of the values")
                elif name in ours:
                    tolerance = 0.0 if name == "shape" else TOLERANCE
                    report.close(full, np.array(ours[name]), np.array(theirs), tolerance)
                else:
                    report.out(full, "not compared: this check does not know the quantity")
