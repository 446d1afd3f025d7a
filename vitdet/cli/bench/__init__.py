"""`vitdet bench`: speed of training, detection, evaluation and reading data."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.cli.overrides import add_set
from vitdet.cli.paths import given_path
from vitdet.files import write_json


def add_bench(verb: argparse.ArgumentParser) -> None:
    """Add the kinds of the verb `bench`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser(
        "evaluate", help="time AP of synthetic results, compared with pycocotools (about 3 minutes)"
    )
    _add_number(kind, "--images", 5000, "number of images")
    _add_number(kind, "--detections", 100, "detections per image")
    _add_number(kind, "--rounds", 1, "number of repetitions; the fastest is reported")
    kind.set_defaults(run=run_bench_evaluate)
    kind = kinds.add_parser(
        "data",
        help="time reading and augmenting a training image, and Detectron2's mapper if installed",
    )
    kind.add_argument("folder", type=given_path, help="folder of a data set in COCO's layout")
    kind.add_argument(
        "--split", action="append", help="split; may be repeated (default: train2017 and val2017)"
    )
    _add_number(kind, "--rounds", 5, "passes over all images")
    kind.set_defaults(run=run_bench_data)
    for name, section, text in (
        ("train", "train", "measure training steps on synthetic images"),
        ("infer", "evaluate", "measure detection on synthetic images"),
    ):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("recipe", help="name of a recipe, or a YAML file")
        add_set(kind)
        kind.add_argument(
            "--batch", default="1,2,4,8", metavar="N,N", help="batch sizes (default: %(default)s)"
        )
        kind.add_argument(
            "--precision", metavar="P,P", help="precisions, e.g. fp32,bf16 (default: the recipe's)"
        )
        _add_number(kind, "--steps", 20, "measured steps")
        kind.set_defaults(run=run_bench_recipe, section=section)
    for kind in kinds.choices.values():
        kind.add_argument(
            "--output", type=given_path, metavar="FILE", help="JSON file for the results"
        )


def _add_number(kind: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    text = f"{text} (default: %(default)s)"
    kind.add_argument(name, metavar="N", type=int, default=default, help=text)


def run_bench_recipe(given: argparse.Namespace) -> int:
    """vitdet bench train, vitdet bench infer"""
    from vitdet import distributed
    from vitdet.cli.bench.inference import measure_inference
    from vitdet.cli.bench.measurement import report
    from vitdet.cli.bench.training import measure_training
    from vitdet.config import load_config

    measure = measure_training if given.section == "train" else measure_inference
    numbers = [int(one) if one.isdecimal() else 0 for one in given.batch.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--batch: expected positive integers, as in 1,8; got {given.batch!r}")
    if given.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {given.steps}")
    config = load_config(given.recipe, given.overrides)
    precisions = (given.precision or getattr(config, given.section).precision).split(",")
    with distributed.process_group() as device:
        measured = measure(config, numbers, precisions, given.steps, device)
    measured = {"recipe": given.recipe, "overrides": given.overrides, **measured}
    print(report(measured))
    return _written(measured, given.output)


def _written(measured: dict, output: Path | None) -> int:
    if output:
        write_json(output, measured)
    return 0


def run_bench_evaluate(given: argparse.Namespace) -> int:
    """vitdet bench evaluate"""
    from vitdet.cli.bench.evaluation import measure

    measured = measure(given.images, given.detections, given.rounds)
    print(
        f"{measured['images']} images x {measured['detections_per_image']} detections, CPU seconds"
    )
    for name, seconds in measured["cpu_seconds"].items():
        print(f"{name:12}" + "".join(f"  {step} {value:.2f}" for step, value in seconds.items()))
    print(
        f"pycocotools takes {measured['ratio']:.2f} times as long; "
        f"the metrics differ by {measured['largest_difference']:.0e}"
    )
    return _written(measured, given.output)


def run_bench_data(given: argparse.Namespace) -> int:
    """vitdet bench data"""
    from vitdet.cli.bench.data import measure

    measured = measure(given.folder, given.split or ("train2017", "val2017"), given.rounds)
    print(f"{measured['images']} images, {measured['objects']} objects: CPU milliseconds per image")
    for name, times in measured["cpu_ms"].items():
        ratio = measured["ratio"].get(name)
        share = f"  vitdet takes {ratio:.2f} of this time" if ratio else ""
        print(f"{name:20} {times['mean']:7.2f}  min {times['least']:7.2f}{share}")
    return _written(measured, given.output)
