"""Evaluation of a detector, or of a file of results, in COCO's or LVIS's metrics."""

from vitdet.evaluation.evaluator import (
    detect,
    detections_to_results,
    evaluate,
    evaluate_detector,
    evaluate_results,
)
from vitdet.evaluation.pictures import write_pictures
from vitdet.evaluation.report import write_report

__all__ = [
    "detect",
    "detections_to_results",
    "evaluate",
    "evaluate_detector",
    "evaluate_results",
    "write_pictures",
    "write_report",
]
