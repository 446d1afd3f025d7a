"""Evaluation of a detector or a results file with COCO's or LVIS's metrics."""

from vitdet.evaluation.detections import batch_to_results, detections_to_results, results_of
from vitdet.evaluation.evaluator import detect, evaluate, evaluate_detector, evaluate_results
from vitdet.evaluation.pictures import write_pictures
from vitdet.evaluation.report import write_report

__all__ = [
    "batch_to_results",
    "detect",
    "detections_to_results",
    "evaluate",
    "evaluate_detector",
    "evaluate_results",
    "results_of",
    "write_pictures",
    "write_report",
]
