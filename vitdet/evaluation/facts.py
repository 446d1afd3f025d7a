"""What the report states about an evaluation: which model, on which data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import vitdet
from vitdet.checkpoint import load_model_file
from vitdet.config import Config
from vitdet.data.fingerprint import fingerprint
from vitdet.evaluation.analysis import Analysis
from vitdet.evaluation.page import Facts
from vitdet.files import sha256


def of_checkpoint(
    checkpoint: Path, config: Config, images: int, device: str, analysis: Analysis
) -> Facts:
    """The facts of an evaluation of a checkpoint with this config; images: how many were evaluated."""
    model, data, settings = config.model, config.data, config.evaluate
    kind = model.architecture
    return Facts(
        title=f"{kind}, {model.backbone.name} on {data.val_split}",
        data={
            "Folder": data.root,
            "Split": f"{data.val_split} ({data.dataset})",
            **_counts(analysis, images),
            "Fingerprint": fingerprint(data, data.val_split),
        },
        model={
            "Detector": f"{kind}, backbone {model.backbone.name}",
            "Checkpoint": str(checkpoint),
            "Step": f"{load_model_file(checkpoint)['step']:,}",
            "Image size": f"{data.image_size} pixels",
            "Precision": f"{settings.precision}, {device}",
            "Detections": f"at most {settings.max_detections} per image, score of at least {settings.score_threshold:g}, NMS at IoU {settings.nms_iou:g}",
            "vitdet": vitdet.__version__,
        },
    )


def of_results(
    results: Path, annotations: Path, images: int, detections: Sequence[dict], analysis: Analysis
) -> Facts:
    """The facts of an evaluation of a file of results."""
    return Facts(
        title=f"{results.name} on {annotations.name}",
        data={
            "Annotations": str(annotations),
            **_counts(analysis, images),
            "SHA-256": sha256(annotations),
        },
        model={
            "Results": str(results),
            "Detections": f"{len(detections):,}",
            "vitdet": vitdet.__version__,
        },
    )


def _counts(analysis: Analysis, images: int) -> dict[str, str]:
    return {
        "Images": f"{images:,}",
        "Objects": f"{sum(one.objects for one in analysis.classes):,}",
        "Classes": f"{len(analysis.classes):,}",
    }
