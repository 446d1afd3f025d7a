"""The findings of an evaluation as rows that `dvc plots` draws: AP of each class, precision over recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.matches import IOUS, RECALLS, save_matches
from vitdet.evaluation.matching import Comparison
from vitdet.files import write_json


def class_rows(finished: Mapping[str, Comparison]) -> list[dict[str, str | float | None]]:
    """AP of each class that has objects, as rows {class, box_ap, box_ap50, mask_ap, mask_ap50} in percent."""
    rows: dict[str, dict[str, str | float | None]] = {}
    for kind, comparison in finished.items():
        for place, category in enumerate(comparison.categories):
            ap = comparison.ap(chosen=[place])
            if ap is not None:
                row = rows.setdefault(category["name"], {"class": category["name"]})
                row[f"{NAMES[kind]}_ap"] = ap
                row[f"{NAMES[kind]}_ap50"] = comparison.ap(0.5, chosen=[place])
    return list(rows.values())


def curve_rows(
    finished: Mapping[str, Comparison], thresholds: Sequence[float] = (0.5, 0.75)
) -> list[dict[str, str | float]]:
    """Precision over recall, mean of the classes, as rows {curve: 'box IoU 0.5', recall, precision} in 0..1."""
    rows: list[dict[str, str | float]] = []
    for kind, comparison in finished.items():
        precision = comparison.precision[:, :, :, 0, -1]  # (T, R, K) of all sizes, most detections
        known = (precision >= 0).all((0, 1))
        for iou in thresholds if known.any() else ():
            means = precision[int(np.abs(IOUS - iou).argmin())][:, known].mean(1)
            rows += [
                {
                    "curve": f"{NAMES[kind]} IoU {iou}",
                    "recall": round(float(recall), 4),
                    "precision": float(mean),
                }
                for recall, mean in zip(RECALLS, means, strict=True)
            ]
    return rows


def write_report(
    folder: str | Path, finished: Mapping[str, Comparison], results: list[dict]
) -> None:
    """Writes classes.json (AP of each class), curve.json (precision over recall), results.json (as COCO) and
    matches.npz (`vitdet.evaluation.matches`).
    """
    for name, value in (
        ("classes", class_rows(finished)),
        ("curve", curve_rows(finished)),
        ("results", results),
    ):
        write_json(Path(folder) / f"{name}.json", value, indent=None if name == "results" else 1)
    save_matches(
        Path(folder) / "matches.npz", {kind: one.matches for kind, one in finished.items()}
    )
