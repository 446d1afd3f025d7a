"""`vitdet bench`: measure the speed of training, detection, evaluation or data loading."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.cli.arguments import add_file, add_folder, add_kind
from vitdet.cli.overrides import add_set
from vitdet.files import write_json


def add_bench(verb: argparse.ArgumentParser) -> None:
    """Add the subcommands of `vitdet bench`."""
    kinds = verb.add_subparsers(required=True, metavar="SUBCOMMAND")
    help = "measure the CPU time of evaluation by vitdet and by pycocotools (about 3 minutes)"
    kind = add_kind(kinds, "evaluate", help)
    _add_number(kind, "--images", 5000, "number of images")
    _add_number(kind, "--detections", 100, "number of detections per image")
    _add_number(kind, "--rounds", 1, "number of repetitions; the fastest is reported")
    kind.set_defaults(run=run_bench_evaluate)
    help = "measure the CPU time of data loading by vitdet and, if installed, by Detectron2"
    kind = add_kind(kinds, "data", help)
    add_folder(kind, "folder", "folder of a data set in COCO's layout")
    help = "name of a split; may be repeated (default: train2017 and val2017)"
    kind.add_argument("--split", action="append", help=help)
    _add_number(kind, "--rounds", 5, "number of passes over all images")
    kind.set_defaults(run=run_bench_data)
    for name, section, help in (
        ("train", "train", "measure the speed and memory of training steps on synthetic images"),
        ("infer", "evaluate", "measure the speed and memory of detection on synthetic images"),
    ):
        kind = add_kind(kinds, name, help)
        kind.add_argument("recipe", help="name of a recipe, or a YAML file")
        add_set(kind)
        help = "batch sizes to measure (default: %(default)s)"
        kind.add_argument("--batch", default="1,2,4,8", metavar="N,N", help=help)
        help = f"precisions to measure, e.g. fp32,bf16 (default: {section}.precision)"
        kind.add_argument("--precision", metavar="P,P", help=help)
        _add_number(kind, "--steps", 20, "number of measured steps")
        kind.set_defaults(run=run_bench_recipe, section=section)
    for kind in kinds.choices.values():
        add_file(kind, "--output", "write the results to this JSON file")


def _add_number(kind: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    text = f"{text} (default: %(default)s)"
    kind.add_argument(name, metavar="N", type=int, default=default, help=text)


def run_bench_recipe(args: argparse.Namespace) -> int:
    """Run `vitdet bench train` or `vitdet bench infer`."""
    from vitdet import distributed
    from vitdet.cli.bench.inference import measure_inference
    from vitdet.cli.bench.measurement import report
    from vitdet.cli.bench.training import measure_training
    from vitdet.config import load_config

    measure = measure_training if args.section == "train" else measure_inference
    numbers = [int(size) if size.isdecimal() else 0 for size in args.batch.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--batch: expected positive integers, e.g. 1,8; got {args.batch!r}")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    config = load_config(args.recipe, args.overrides)
    precisions = (args.precision or getattr(config, args.section).precision).split(",")
    with distributed.process_group() as device:
        measured = measure(config, numbers, precisions, args.steps, device)
    measured = {"recipe": args.recipe, "overrides": args.overrides, **measured}
    print(report(measured))
    return _written(measured, args.output)


def _written(measured: dict, output: Path | None) -> int:
    if output:
        write_json(output, measured)
    return 0


def run_bench_evaluate(args: argparse.Namespace) -> int:
    """Run `vitdet bench evaluate`."""
    from vitdet.cli.bench.evaluation import measure

    measured = measure(args.images, args.detections, args.rounds)
    print(
        f"{measured['images']} images x {measured['detections_per_image']} detections, CPU seconds"
    )
    for name, seconds in measured["cpu_seconds"].items():
        print(f"{name:12}" + "".join(f"  {step} {value:.2f}" for step, value in seconds.items()))
    print(
        f"pycocotools takes {measured['ratio']:.2f} times as long as vitdet; the largest "
        f"difference in a metric is {measured['largest_difference']:.0e} percentage points"
    )
    return _written(measured, args.output)


def run_bench_data(args: argparse.Namespace) -> int:
    """Run `vitdet bench data`."""
    from vitdet.cli.bench.data import measure

    measured = measure(args.folder, args.split or ("train2017", "val2017"), args.rounds)
    print(f"{measured['images']} images, {measured['objects']} objects: CPU milliseconds per image")
    for name, times in measured["cpu_ms"].items():
        ratio = measured["ratio"].get(name)
        share = f"  vitdet takes {ratio:.2f} times as long" if ratio else ""
        print(f"{name:20} {times['mean']:7.2f}  min {times['least']:7.2f}{share}")
    return _written(measured, args.output)
