"""Output files of an evaluation: rows for `dvc plots`, results, matches and the report page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vitdet.evaluation.analysis import Analysis, analyse, mean_curves
from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.matches import MATCHES, RECALLS, Matches, save_matches
from vitdet.evaluation.matching import Comparison
from vitdet.evaluation.page import Facts, write_page
from vitdet.evaluation.pictures import Images
from vitdet.evaluation.results import Truth
from vitdet.files import write_json

REPORT = "report.html"


def class_rows(finished: Mapping[str, Comparison]) -> list[dict[str, str | float | None]]:
    """Return rows {class, box_ap, box_ap50, mask_ap, mask_ap50}: AP in percent of each class that
    has objects.
    """
    rows: dict[str, dict[str, str | float | None]] = {}
    for kind, comparison in finished.items():
        for index, category in enumerate(comparison.categories):
            ap = comparison.ap(chosen=[index])
            if ap is not None:
                row = rows.setdefault(category["name"], {"class": category["name"]})
                row[f"{NAMES[kind]}_ap"] = ap
                row[f"{NAMES[kind]}_ap50"] = comparison.ap(0.5, chosen=[index])
    return list(rows.values())


def curve_rows(finished: Mapping[str, Comparison]) -> list[dict[str, float]]:
    """Return rows {recall, box_iou50, box_iou75, mask_iou50, mask_iou75}: the precision at each
    recall in 0..1, averaged over classes; [] without objects.
    """
    rows: list[dict[str, float]] = [{"recall": round(float(recall), 4)} for recall in RECALLS]
    for kind, comparison in finished.items():
        curves = mean_curves(comparison)
        for iou in ("0.5", "0.75") if curves else ():
            for row, precision in zip(rows, curves[iou], strict=True):
                row[f"{NAMES[kind]}_iou{100 * float(iou):.0f}"] = float(precision)
    return rows if len(rows[0]) > 1 else []


def threshold_rows(analyses: Sequence[Analysis]) -> list[dict[str, float]]:
    """Return rows {threshold, box_precision, box_recall, box_f1, mask_precision, ...}: precision,
    recall and F1 at each score threshold, pooled over all classes.
    """
    rows: dict[float, dict[str, float]] = {}
    for analysis in analyses:
        for threshold in analysis.thresholds:
            row = rows.setdefault(threshold.score, {"threshold": threshold.score})
            for name in ("precision", "recall", "f1"):
                row[f"{analysis.kind}_{name}"] = getattr(threshold, name)
    return list(rows.values())


def details(finished: Mapping[str, Comparison]) -> dict[str, float]:
    """Return AP in percent of each class that has objects, as class_ap/NAME for boxes and
    class_mask_ap/NAME for masks, and the numbers of images, objects and detections.
    """
    names = {"bbox": "class_ap", "segm": "class_mask_ap"}
    values = {
        f"{names[kind]}/{category['name']}": ap
        for kind, comparison in finished.items()
        for index, category in enumerate(comparison.categories)
        if (ap := comparison.ap(chosen=[index])) is not None
    }
    matches = next(iter(finished.values())).matches
    return values | {
        "images": len(matches.image_ids),
        "objects": len(matches.object_image),
        "detections": int((~matches.ignored[:, 0]).sum()),
    }


def write_reports(
    plots: str | Path | None,
    report: str | Path | None,
    finished: Mapping[str, Comparison],
    metrics: Mapping[str, float],
    truth: Truth,
    results: list[dict],
    facts: Callable[[Matches], Facts],
    images: Images | None,
) -> None:
    """Write the files of `write_report` to the folder `plots`, and the report page to
    PLOTS/report.html and to the path `report`. A path that is None is skipped.

    `facts` is called with the matches and returns the page's facts. For `images`, see `write_page`.
    """
    pages = {Path(report)} if report else set()
    pages |= {Path(plots) / REPORT} if plots else set()
    if not pages:
        return
    # the AP of masks is undefined for a data set without outlines
    known = {kind: found for kind, found in finished.items() if found.ap() is not None}
    analyses = [analyse(kind, found, metrics, truth) for kind, found in known.items()]
    if plots:
        write_report(plots, finished, results, analyses)
    for page in pages:
        page_facts = facts(next(iter(known.values())).matches)
        write_page(page, analyses, page_facts, truth, results, images)


def write_report(
    folder: str | Path,
    finished: Mapping[str, Comparison],
    results: list[dict],
    analyses: Sequence[Analysis],
) -> None:
    """Write these files to `folder`: classes.json (AP of each class), curve.json (precision over
    recall), thresholds.json (precision, recall and F1 at each score threshold), results.json (COCO
    results) and matches.npz (`vitdet.evaluation.matches`).
    """
    for name, value in (
        ("classes", class_rows(finished)),
        ("curve", curve_rows(finished)),
        ("thresholds", threshold_rows(analyses)),
        ("results", results),
    ):
        write_json(Path(folder) / f"{name}.json", value, indent=None if name == "results" else 1)
    save_matches(Path(folder) / MATCHES, {kind: found.matches for kind, found in finished.items()})
