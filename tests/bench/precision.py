"""Train a detector on a small data set in COCO's format; compare its detections in fp32 and another precision.

    python -m tests.bench.precision FOLDER --steps 2000 --output figures.json

Each detection whose score reaches the threshold is matched to the detection in the other precision that has the same
class and the highest IoU. Detections without a match are counted for both precisions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from vitdet.checkpoint import restore_detector
from vitdet.config import Config
from vitdet.data.layout import resolve_config
from vitdet.data.loader import val_loader
from vitdet.predictor import PRECISIONS, autocast
from vitdet.training import train
from vitdet.types import Detections

SAME = 0.5  # minimum IoU of a match


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="data set in COCO's layout")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rare = [f"{name}={given.steps}" for name in ("train.eval_every", "train.save_every")]
    overrides = [f"data.root={given.folder}", f"optim.steps={given.steps}", *rare, *given.overrides]
    config, _ = resolve_config(given.recipe, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as output:
        detector, *_ = restore_detector(train(config, output))
    detector.to(device).eval()
    exact, other = (detect(detector, config, kind, device) for kind in ("fp32", given.precision))
    figures = compare(exact, other, given.threshold)
    print(json.dumps(figures, indent=2))
    if given.output:
        given.output.write_text(json.dumps(figures, indent=2))


@torch.no_grad()
def detect(
    detector: nn.Module, config: Config, precision: str, device: torch.device
) -> list[Detections]:
    """Return the detections in the images of both splits."""
    found: list[Detections] = []
    for split in (config.data.train_split, config.data.val_split):
        data = replace(config.data, val_split=split)
        for batch in val_loader(data, config.evaluate.batch_size):
            with autocast(precision, device):
                here = detector(batch.images.to(device), None, batch.sizes.to(device))
            found += [detections.to("cpu") for detections in here]
    return found


def compare(exact: Sequence[Detections], other: Sequence[Detections], threshold: float) -> dict:
    """Compare detections of the same images in fp32 and in another precision."""
    ious, differences, alone = matches(exact, other, threshold)
    _, _, theirs = matches(other, exact, threshold)
    if not len(ious):
        raise SystemExit(f"no score of a match is at least {threshold}: train longer (--steps)")
    apart = differences.abs()
    return {
        "images": len(exact),
        "matched": len(ious),
        "in fp32 only": alone,
        "in the other only": theirs,
        "mean IoU": ious.mean().item(),
        "IoU exceeded by 99%": ious.quantile(0.01).item(),
        "mean difference of scores": apart.mean().item(),
        "share of scores within 0.02": (apart <= 0.02).double().mean().item(),
        "largest difference of scores": apart.max().item(),
    }


def matches(
    ours: Sequence[Detections], theirs: Sequence[Detections], threshold: float
) -> tuple[Tensor, Tensor, int]:
    """Return IoUs and score differences (M,) of matched detections, and the number in `ours` without a match.

    The threshold applies to `ours` only, as the score of the match in `theirs` may be slightly lower.
    """
    ious, differences, alone = [torch.zeros(0)], [torch.zeros(0)], 0
    for image, other in zip(ours, theirs, strict=True):
        image = image[image.scores >= threshold]
        overlap = box_iou(image.boxes.float(), other.boxes.float())
        overlap[image.labels[:, None] != other.labels] = 0.0
        best, partner = F.pad(overlap, (0, 1)).max(dim=1)  # the added column never matches
        paired = best >= SAME
        ious.append(best[paired])
        differences.append(image.scores[paired] - other.scores[partner[paired]])
        alone += int((~paired).sum())
    return torch.cat(ious), torch.cat(differences), alone


if __name__ == "__main__":
    main()
