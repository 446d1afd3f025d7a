"""`vitdet compare`: test whether detectors differ in AP, and list differing settings."""

from __future__ import annotations

import argparse
import os

from vitdet.cli.arguments import add_file


def add_compare(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet compare`."""
    verb.add_argument(
        "results",
        nargs="+",
        metavar="RUN|CHECKPOINT|RESULTS.json",
        help="MLflow run (ID or unique name), checkpoint, output folder of a training run, or COCO "
        "results file; the first input is the baseline",
    )
    add_file(verb, "--annotations", "for results files: annotation file with the ground truth")
    help = "for results files: evaluation protocol (default: coco)"
    verb.add_argument("--dataset", choices=("coco", "lvis"), help=help)
    help = (
        "URI of the MLflow store (default: MLFLOW_TRACKING_URI, if set; otherwise, for a "
        "checkpoint, its own store and, for a run, mlflow.db in the current folder)"
    )
    verb.add_argument("--tracking-uri", default="", metavar="URI", help=help)
    help = "number of bootstrap resamples of the images (default: %(default)s)"
    verb.add_argument("--resamples", type=_count, default=1000, metavar="N", help=help)
    add_file(verb, "--output", "also write the comparison to this Markdown file")
    verb.set_defaults(run=run_compare)


def _count(text: str) -> int:
    if not text.isdecimal() or not 100 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected an integer from 100 to 1000000, got {text!r}")
    return int(text)


def run_compare(args: argparse.Namespace) -> int:
    """Run `vitdet compare`."""
    from vitdet.cli.compare.inputs import Reader, check_comparable
    from vitdet.cli.compare.text import comparison_text
    from vitdet.evaluation.bootstrap import bootstrap
    from vitdet.files import atomic_write
    from vitdet.tracking.address import check_uri

    if len(args.results) < 2:
        raise ValueError(f"expected at least two results to compare, got {len(args.results)}")
    if args.tracking_uri:
        check_uri("--tracking-uri", args.tracking_uri)
        os.environ["MLFLOW_TRACKING_URI"] = args.tracking_uri
    reader = Reader(args.annotations, args.dataset or "coco")
    compared = [reader.read(name) for name in args.results]
    check_comparable(compared)
    matches = [found.matches for found in compared]
    kinds = [kind for kind in matches[0] if all(kind in by_kind for by_kind in matches)]
    if not kinds:
        raise ValueError(
            "some results have only boxes, others only masks; expected boxes in all or masks in all"
        )
    resampled = {
        kind: bootstrap([by_kind[kind] for by_kind in matches], args.resamples) for kind in kinds
    }
    text = comparison_text(compared, resampled)
    print(text, end="")
    if args.output:
        with atomic_write(args.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0
