"""`vitdet evaluate`: a checkpoint, or a file of results."""

from __future__ import annotations

import argparse

from vitdet import torchrun
from vitdet.cli.overrides import add_set, log_resolved
from vitdet.cli.paths import CHECKPOINT, given_path


def add_evaluate(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `evaluate`."""
    verb.add_argument("checkpoint", type=given_path, nargs="?", help=CHECKPOINT)
    add_set(verb)
    verb.add_argument(
        "--config",
        metavar="FILE",
        type=given_path,
        help="file with the data and evaluate settings (default: those of the checkpoint)",
    )
    verb.add_argument(
        "--output",
        metavar="FILE",
        type=given_path,
        help="JSON file for the metrics, with AP of each class; NAME.measured.json beside it "
        "describes data and settings",
    )
    verb.add_argument(
        "--pictures",
        metavar="DIR",
        type=given_path,
        help="folder for images of detections beside the ground truth",
    )
    verb.add_argument(
        "--plots",
        metavar="DIR",
        type=given_path,
        help="folder for report.html, the data of plots, results.json, and the matches that "
        "`vitdet compare` reads",
    )
    verb.add_argument(
        "--report",
        type=given_path,
        metavar="FILE",
        help="HTML report: curves, classes, errors, confusion matrix, worst and best images",
    )
    verb.add_argument(
        "--results",
        type=given_path,
        metavar="FILE",
        help="evaluate this JSON list of COCO results instead of a checkpoint",
    )
    verb.add_argument(
        "--annotations", type=given_path, metavar="FILE", help="with --results: the ground truth"
    )
    verb.add_argument(
        "--dataset",
        choices=("coco", "lvis"),
        help="with --results: evaluation protocol (default: coco)",
    )
    verb.set_defaults(run=run_evaluate)


def run_evaluate(given: argparse.Namespace) -> int:
    """vitdet evaluate"""
    if given.results or given.annotations or given.dataset:
        return score_results(given)
    if not given.checkpoint:
        raise ValueError("name a CHECKPOINT, or --results FILE and --annotations FILE")
    torchrun.end_with_torchrun()
    from vitdet import distributed, stages
    from vitdet.data.layout import resolve_config
    from vitdet.stages.workspace import result
    from vitdet.tracking.runs import default_folder

    for path in filter(None, (given.output, given.report)):
        path.parent.mkdir(parents=True, exist_ok=True)  # minutes before it is needed
    config = None
    if given.config:
        config, found = resolve_config(given.config)
        if distributed.rank() == 0:
            log_resolved(config, found)
    given.checkpoint = result(given.checkpoint)
    metrics, _ = stages.evaluate(
        given.checkpoint,
        given.overrides,
        folder=default_folder(given.checkpoint.parent),
        config=config,
        output=given.output,
        pictures=given.pictures,
        plots=given.plots,
        report=given.report,
    )
    if distributed.rank() == 0:
        print(table(metrics))
    return 0


def score_results(given: argparse.Namespace) -> int:
    """vitdet evaluate --results"""
    if given.checkpoint or given.config or given.overrides or given.pictures:
        raise ValueError(
            "--results cannot be combined with CHECKPOINT, --config, --set or --pictures"
        )
    if not given.results or not given.annotations:
        raise ValueError(
            "--results and --annotations must be given together; --dataset selects the evaluation "
            "protocol (default: coco)"
        )
    from vitdet.evaluation.evaluator import evaluate_results
    from vitdet.tracking.measured import write_metrics

    metrics = evaluate_results(
        given.results,
        given.annotations,
        given.dataset or "coco",
        plots=given.plots,
        report=given.report,
        detailed=True,
    )
    print(table(metrics))
    if given.output:
        write_metrics(given.output, metrics, None)
    return 0


def table(metrics: dict[str, float]) -> str:
    """AP of boxes and masks, a column a kind of figure."""
    kinds = [kind for kind in ("box", "mask") if any(key.startswith(f"{kind}_") for key in metrics)]
    shown = [key for key in metrics if key.partition("_")[0] in kinds]
    columns = list(dict.fromkeys(key.partition("_")[2] for key in shown))
    rows = [f"{'':6}" + "".join(f"{column:>{max(len(column) + 2, 7)}}" for column in columns)]
    for kind in kinds:
        cells = [metrics.get(f"{kind}_{column}") for column in columns]
        rows.append(
            f"{kind:6}"
            + "".join(
                f"{'-' if cell is None else format(cell, '.1f'):>{max(len(column) + 2, 7)}}"
                for column, cell in zip(columns, cells, strict=True)
            )
        )
    return "\n".join(rows)
