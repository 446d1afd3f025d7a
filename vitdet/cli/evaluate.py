"""`vitdet evaluate`: evaluate a checkpoint or a results file."""

from __future__ import annotations

import argparse

from vitdet import torchrun
from vitdet.cli.arguments import CHECKPOINT, add_file, add_folder, given_path
from vitdet.cli.overrides import add_set, log_resolved
from vitdet.files import make_parent


def add_evaluate(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet evaluate`."""
    verb.add_argument("checkpoint", type=given_path, nargs="?", help=CHECKPOINT)
    add_set(verb, "override a data or evaluate setting, e.g. data.root=DIR; may be repeated")
    help = "YAML file with the data and evaluate settings (default: the checkpoint's settings)"
    add_file(verb, "--config", help)
    help = (
        "write the metrics and the AP of each class to this JSON file and, for a checkpoint, the "
        "settings and the data's fingerprint to NAME.measured.json next to it"
    )
    add_file(verb, "--output", help)
    add_folder(verb, "--pictures", "folder for pictures of the ground truth next to detections")
    help = "folder for report.html, plot data, results.json, and the matches for `vitdet compare`"
    add_folder(verb, "--plots", help)
    help = "HTML report to write: curves, classes, errors, confusion matrix, worst and best images"
    add_file(verb, "--report", help)
    add_file(verb, "--results", "evaluate this file of COCO results instead of a checkpoint")
    add_file(verb, "--annotations", "with --results: annotation file with the ground truth")
    help = "with --results: evaluation protocol (default: coco)"
    verb.add_argument("--dataset", choices=("coco", "lvis"), help=help)
    verb.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """Run `vitdet evaluate`."""
    if args.results or args.annotations or args.dataset:
        return _evaluate_results(args)
    if not args.checkpoint:
        raise ValueError(
            "expected a CHECKPOINT, or --results FILE and --annotations FILE, but got neither"
        )
    torchrun.end_with_torchrun()
    from vitdet import distributed, stages
    from vitdet.data.layout import resolve_config
    from vitdet.stages.workspace import result
    from vitdet.tracking.runs import default_folder

    _prepare_outputs(args)
    config = None
    if args.config:
        config, found = resolve_config(args.config)
        if distributed.rank() == 0:
            log_resolved(config, found)
    checkpoint = result(args.checkpoint)
    metrics, _ = stages.evaluate(
        checkpoint,
        args.overrides,
        folder=default_folder(checkpoint.parent),
        config=config,
        output=args.output,
        pictures=args.pictures,
        plots=args.plots,
        report=args.report,
    )
    if distributed.rank() == 0:
        print(table(metrics))
    return 0


def _prepare_outputs(args: argparse.Namespace) -> None:
    """Raise OSError for an output of the wrong kind before the evaluation, not after it."""
    for path in filter(None, (args.output, args.report)):
        make_parent(path)
    for folder in filter(None, (args.plots, args.pictures)):
        if folder.is_file():
            raise NotADirectoryError(f"{folder}: is a file; expected the name of a folder")


def _evaluate_results(args: argparse.Namespace) -> int:
    """Run `vitdet evaluate --results`."""
    if args.checkpoint or args.config or args.overrides or args.pictures:
        raise ValueError(
            "--results cannot be combined with CHECKPOINT, --config, --set or --pictures"
        )
    if not args.results or not args.annotations:
        raise ValueError(
            "--results and --annotations must be given together; --dataset requires both options"
        )
    from vitdet.evaluation.evaluator import evaluate_results
    from vitdet.tracking.measured import write_metrics

    _prepare_outputs(args)
    metrics = evaluate_results(
        args.results,
        args.annotations,
        args.dataset or "coco",
        plots=args.plots,
        report=args.report,
        detailed=True,
    )
    print(table(metrics))
    if args.output:
        write_metrics(args.output, metrics, None)
    return 0


def table(metrics: dict[str, float]) -> str:
    """Return a text table of the metrics, with one row for boxes and one for masks."""
    shown = [key.split("_", 1) for key in metrics if key.startswith(("box_", "mask_"))]
    columns = list(dict.fromkeys(column for _, column in shown))
    rows = [["", *columns]]
    for kind in ("box", "mask"):
        if kind in dict(shown):
            values = [metrics.get(f"{kind}_{column}") for column in columns]
            rows.append([kind, *("-" if value is None else f"{value:.1f}" for value in values)])
    widths = [max(len(column) + 2, 7) for column in columns]
    lines = []
    for kind, *cells in rows:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{kind:6}{''.join(padded)}")
    return "\n".join(lines)
