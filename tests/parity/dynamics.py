"""Twenty optimizer steps from the weights of a detector case: our losses follow the published implementation's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.parity.detector import Case
from tests.parity.report import Report
from vitdet.types import Target
from vitdet.weights.convert import DETECTRON2, rename

FIRST, EARLY, ALL = 8, 2e-3, 3e-2  # their own run from weights disturbed by 1e-6 wanders so far


def train(folder: Path, by_polygon: bool, steps: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Losses of every step, and the final norms of the parameters, of SGD on the case's images."""
    case = Case.read(folder)
    targets: list[Target] = case.polygons if by_polygon else case.bitmaps
    detector = case.detector.train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=2e-3, momentum=0.9)
    history = []
    for _ in range(steps):
        losses = detector(case.images, targets, case.sizes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: float(value) for name, value in losses.items()})
    return history, {name: float(p.detach().norm()) for name, p in detector.named_parameters()}


def check(folder: Path, report: Report) -> None:
    """Compares the 20 steps; the starting point is the sibling folder maskrcnn_coco."""
    start = folder.parent / "maskrcnn_coco"
    if not start.is_dir():
        report.out("dynamics", f"needs the weights of {start}, which is not there")
        return
    steps = 20
    runs = {kind: train(start, kind == "polygon", steps) for kind in ("bitmask", "polygon")}
    stored = json.loads((folder / "losses.json").read_text())
    for kind, values in stored.items():
        name = f"dynamics.{kind}"
        if kind in ("optimizer", "batch"):
            report.skip(name, "a text that says how it was made")
        elif kind.startswith("final_norms_"):
            _, norms = runs[kind.removeprefix("final_norms_")]
            for parameter, value in values.items():
                ours = rename(parameter, DETECTRON2)
                if parameter.endswith("pos_embed"):
                    report.skip(f"{name}.{parameter}", "theirs counts the class token's row, which is not used")
                elif ours not in norms:
                    report.out(f"{name}.{parameter}", "no such parameter here")
                else:
                    report.close(f"{name}.{parameter}", norms[ours], value, 1e-4, ALL)
        else:
            history, _ = runs[kind.split("_")[0]]
            if len(values) != steps:
                report.out(name, f"{len(values)} steps, expected {steps}")
                continue
            for step, (mine, theirs) in enumerate(zip(history, values, strict=True)):
                for loss, value in theirs.items():
                    relative = EARLY if step < FIRST else ALL
                    if kind == "polygon" and loss == "loss_mask":
                        relative = max(relative, 1e-2)  # targets are rasterised on the device, not by pycocotools
                    report.close(f"{name}.{step}.{loss}", mine.get(loss, float("nan")), value, 0.0, relative)
        report.seen.add(name)
    report.all_seen([f"dynamics.{kind}" for kind in stored])
