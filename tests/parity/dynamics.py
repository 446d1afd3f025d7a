"""SGD from the weights of a detector case: the first step is checked, the other 19 are printed.

Twenty steps amplify rounding: the reference's own run from weights perturbed by 1e-6 changes a discrete
choice (one more background candidate shifts every sampled box) and then differs by 2% of the total
loss. Which step changes first, from the second on, depends on the processor. These quantities are
portable and checked:

* the losses before the first step, in float32, against those stored;
* the gradients that the first step applies, (weights before - weights after) / learning rate, in
  float64, against the norms and sums stored with the detector case;
* that all losses stay finite, and that each step has the reference's losses by name.

The differences of the later steps and of the final norms are printed as `info` and never fail.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.parity.case import Case
from tests.parity.compare_detector import GRADIENTS64, LOSSES
from tests.parity.device import CPU, moved
from tests.parity.report import Report
from vitdet.models.detector import Detector
from vitdet.types import Target

STEPS = 20
LR, MOMENTUM = 2e-3, 0.9
# how the stored text starts
OPTIMIZER = "SGD, lr 2e-3, momentum 0.9, no weight decay, no schedule, no clipping"
START = "maskrcnn_coco"
# Polygon targets are rasterized from the outlines directly, not by pycocotools.
POLYGON_MASKS = 1e-2

Losses = dict[str, float]


@dataclass
class Run:
    """The losses, and the norms of the parameters (by the reference's names), of every step."""

    losses: list[Losses]
    norms: list[dict[str, float]]


@dataclass
class Computed:
    """The runs by kind of mask, and the first step's gradients (by the reference's names)."""

    runs: dict[str, Run]
    applied: dict[str, Tensor]


def compute(folder: Path, device: torch.device = CPU) -> Computed:
    """Train with both kinds of masks, from the weights of the case next to the folder."""
    start = folder.parent / START
    if not start.is_dir():
        raise FileNotFoundError(f"training starts from the weights of {start}, which is missing")
    runs = {"bitmask": train(start, False, device), "polygon": train(start, True, device)}
    return Computed(runs, applied_gradients(start, device))


def sgd(detector: Detector) -> torch.optim.SGD:
    """Return the optimizer of the stored run."""
    return torch.optim.SGD(detector.parameters(), lr=LR, momentum=MOMENTUM)


def step(
    case: Case, detector: Detector, targets: list[Target], optimizer: torch.optim.Optimizer
) -> Losses:
    """Run one optimizer step on the images of a case; return the losses before it."""
    losses = detector(case.images, targets, case.sizes)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def train(folder: Path, by_polygon: bool, device: torch.device) -> Run:
    """Run all steps, in float32 as stored."""
    case = moved(Case.read(folder), device)
    targets = case.polygons if by_polygon else case.bitmaps
    detector, names, run = case.detector.train(), case.their_names(), Run([], [])
    optimizer = sgd(detector)
    for _ in range(STEPS):
        run.losses.append(step(case, detector, targets, optimizer))
        parameters = detector.named_parameters()
        run.norms.append({names[name]: float(p.detach().norm()) for name, p in parameters})
    return run


def applied_gradients(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Return the gradients that the first step applied to the weights, in float64."""
    case = moved(Case.read(folder), device)
    detector, names = case.detector.double().train(), case.their_names()
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    step(case, detector, case.bitmaps, sgd(detector))
    return {
        names[name]: (before[name] - p.detach()) / LR for name, p in detector.named_parameters()
    }


def compare(folder: Path, found: Computed, report: Report) -> None:
    """Compare losses.json, and the first step with the gradients of the detector case."""
    stored = json.loads((folder / "losses.json").read_text())
    lengths = {kind: len(values) for kind, values in stored.items() if isinstance(values, list)}
    for kind, values in stored.items():
        name, base = f"dynamics.{kind}", kind.removeprefix("final_norms_")
        run, length = found.runs.get(base.split("_")[0]), lengths.get(base, STEPS)
        if kind == "optimizer":
            report.line(name, f"{OPTIMIZER!r} expected", values.startswith(OPTIMIZER))
        elif kind == "batch":
            report.skip(name, "a description of the batch")
        elif run is None or not 0 < length <= STEPS:
            report.out(name, f"expected a run of {', '.join(found.runs)} with 1 to {STEPS} steps")
        elif kind.startswith("final_norms_"):
            compare_norms(name, values, run.norms[length - 1], report)
        else:
            compare_steps(name, values, run.losses, kind == "polygon", report)
        report.seen.add(name)
    report.all_seen([f"dynamics.{kind}" for kind in stored])
    compare_gradients(folder.parent / START, found.applied, report)


def compare_gradients(start: Path, applied: dict[str, Tensor], report: Report) -> None:
    """Compare the first step's gradients with the norms and sums in the detector case."""
    stored = json.loads((start / "losses.json").read_text())
    norms, sums = stored["grad_norms_float64"], stored["grad_sums"]
    report.names("dynamics.first_step names", applied, norms)
    for name in (name for name in norms if name in applied):
        gradient = applied[name]
        allowed = 1e-6 + GRADIENTS64 * norms[name]
        report.close(f"dynamics.first_step.norm.{name}", gradient.norm(), norms[name], allowed)
        # The error of a sum of canceling terms is relative to the terms.
        allowed = 1e-6 + GRADIENTS64 * float(gradient.abs().sum())
        report.close(f"dynamics.first_step.sum.{name}", gradient.sum(), sums[name], allowed)


def compare_norms(name: str, stored: Losses, norms: dict[str, float], report: Report) -> None:
    """Compare the names of the final norms; print the differences of their values."""
    report.names(f"{name} names", norms, stored)
    for parameter in (parameter for parameter in stored if parameter in norms):
        if parameter.endswith("pos_embed"):
            report.skip(f"{name}.{parameter}", "the reference includes the unused class token")
        else:
            report.inform(f"{name}.{parameter}", share(norms[parameter], stored[parameter]))


def compare_steps(
    name: str, stored: list[Losses], losses: list[Losses], by_polygon: bool, report: Report
) -> None:
    """Check the losses before the first step; print those of later steps."""
    report.line(f"{name} finite", f"{len(losses)} steps", all(map(finite, losses)))
    for i, theirs in enumerate(stored):
        ours = losses[i]
        report.names(f"{name}.{i} names", ours, theirs)
        for loss in (loss for loss in theirs if loss in ours):
            if i > 0:
                report.inform(f"{name}.{i}.{loss}", share(ours[loss], theirs[loss]))
            else:
                relative = POLYGON_MASKS if by_polygon and loss == "loss_mask" else LOSSES
                report.close(f"{name}.0.{loss}", ours[loss], theirs[loss], 0.0, relative)
        if i > 0:
            total = share(sum(ours.values()), sum(theirs.values()))
            report.inform(f"{name}.{i}.total", total)


def finite(losses: Losses) -> bool:
    """Return whether all losses of a step are finite."""
    return all(map(math.isfinite, losses.values()))


def share(ours: float, theirs: float) -> str:
    """Return both values and their relative difference as text."""
    return f"{ours:.6g}, reference {theirs:.6g}, {(ours - theirs) / (theirs or 1.0):+.2%}"
