"""The report of an evaluation: one self-contained HTML page, from the template `page.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import vitdet
from vitdet.checkpoint import load_model_file
from vitdet.config import Config
from vitdet.data.fingerprint import fingerprint
from vitdet.evaluation.analysis import Analysis
from vitdet.evaluation.matches import Matches
from vitdet.evaluation.pictures import Images, draw_pairs
from vitdet.evaluation.results import Truth
from vitdet.files import atomic_write, sha256
from vitdet.pages import data_uri, render

QUALITY = 75  # of the JPEG images


@dataclass(frozen=True)
class Facts:
    """The title of the page, and facts about the data and the model as {name: value}."""

    title: str
    data: Mapping[str, str]
    model: Mapping[str, str]


def write_page(
    path: Path,
    analyses: Sequence[Analysis],
    facts: Facts,
    truth: Truth,
    results: Sequence[dict],
    images: Images | None,
) -> None:
    """Write the page of an evaluation; its images are the worst and best of the first analysis.

    Without `images`, the page has no pictures. Images that cannot be read are omitted.
    """
    first = analyses[0]
    chosen = {result.image_id for result in (*first.worst, *first.best)}
    pairs = draw_pairs(truth, results, chosen, first.confusion.score, images) if images else {}
    values = {
        "analyses": analyses,
        "facts": facts,
        "worst": [result for result in first.worst if result.image_id in pairs],
        "best": [result for result in first.best if result.image_id in pairs],
        "pictures": {
            image_id: [data_uri(picture, QUALITY) for picture in pair]
            for image_id, pair in pairs.items()
        },
        "headline": {analysis.kind: _headline(analysis.metrics) for analysis in analyses},
    }
    page = render("evaluation/page.html", values)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the headline metrics by title: every AP, and AR with the largest detection limit."""
    titles = {key: key.replace("ap", "AP", 1).replace("_", " ") for key in metrics}
    tiles = {titles[key]: value for key, value in metrics.items() if key.startswith("ap")}
    limits = [int(key[3:]) for key in metrics if key.startswith("ar_") and key[3:].isdecimal()]
    if limits:
        tiles[f"AR, {max(limits)} detections"] = metrics[f"ar_{max(limits)}"]
    return tiles


def checkpoint_facts(checkpoint: Path, config: Config, device: str, matches: Matches) -> Facts:
    """Return the facts about an evaluation of a checkpoint with this config on this device."""
    model, data, settings = config.model, config.data, config.evaluate
    return Facts(
        title=f"{model.architecture}, {model.backbone.name} on {data.val_split}",
        data={
            "Folder": data.root,
            "Split": f"{data.val_split} ({data.dataset})",
            **_counts(matches),
            "Fingerprint": fingerprint(data, data.val_split),
        },
        model={
            "Detector": f"{model.architecture}, backbone {model.backbone.name}",
            "Checkpoint": str(checkpoint),
            "Step": f"{load_model_file(checkpoint)['step']:,}",
            "Image size": f"{data.image_size} pixels",
            "Precision": f"{settings.precision}, {device}",
            "Detections": f"at most {settings.max_detections} per image, score of at least "
            f"{settings.score_threshold:g}, NMS at IoU {settings.nms_iou:g}",
            "vitdet": vitdet.__version__,
        },
    )


def results_facts(results: Path, annotations: Path, detections: int, matches: Matches) -> Facts:
    """Return the facts about an evaluation of a results file with this number of detections."""
    return Facts(
        title=f"{results.name} on {annotations.name}",
        data={
            "Annotations": str(annotations),
            **_counts(matches),
            "SHA-256": sha256(annotations),
        },
        model={
            "Results": str(results),
            "Detections": f"{detections:,}",
            "vitdet": vitdet.__version__,
        },
    )


def _counts(matches: Matches) -> dict[str, str]:
    return {
        "Images": f"{len(matches.image_ids):,}",
        "Objects": f"{len(matches.object_image):,}",
        "Classes": f"{len(matches.category_ids):,}",
    }
