"""What each verb of the command line does: call a public function, print. One verb is one stage of dvc.yaml.

Imports stand inside the verbs: `vitdet --help` and `vitdet config` answer without torch. A verb gives the exit code
and raises the errors of what it calls; `vitdet.cli.main` makes one line of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vitdet.config import Config, dump_config, load_config, recipes, save_config
from vitdet.written import write_json, written


def run_config(given: argparse.Namespace) -> int:
    """vitdet config"""
    if given.recipe is None:
        if given.overrides or given.output:
            raise ValueError("of which recipe? `vitdet config` alone lists them")
        print("\n".join(recipes()))
        return 0
    config = load_config(given.recipe, given.overrides)
    if given.output:
        save_config(config, given.output)
    else:
        print(dump_config(config), end="")
    return 0


def run_data_tiny(given: argparse.Namespace) -> int:
    """vitdet data tiny"""
    from vitdet.data.tiny import make_tiny

    made = make_tiny(given.folder, given.train, given.val, given.seed)
    print(
        f"{given.folder}: {given.train} + {given.val} images" + ("" if made else ", already there")
    )
    return 0


def run_data_check(given: argparse.Namespace) -> int:
    """vitdet data check"""
    from vitdet.data import inventory
    from vitdet.data.check import check

    report = check(given.folder, images=given.images)
    try:
        if inventory.exists(given.folder):
            inventory.verify(given.folder, contents=given.images)
    except (ValueError, FileNotFoundError) as error:
        report.error(f"not as {inventory.NAME} says", str(error))
    print(*report.lines(), sep="\n")
    return 0 if report.ok else 1


def run_train(given: argparse.Namespace) -> int:
    """vitdet train"""
    from vitdet import distributed
    from vitdet.stages import train_tracked
    from vitdet.training import Stopped

    config = own_data(load_config(given.recipe, given.overrides), given)
    try:
        path = train_tracked(
            config,
            Path(given.recipe).stem,
            given.output,
            checkpoints=given.checkpoints,
            weights=given.weights,
            group=given.group,
        )
    except Stopped as stopped:
        print(f"vitdet: {stopped}", file=sys.stderr)
        return 143  # as the shell says of a process that SIGTERM ended
    if distributed.rank() == 0:
        print(path)
    return 0


def own_data(config: Config, given: argparse.Namespace) -> Config:
    """The config for the data that --set data.root puts in the place of a recipe's; says what this changes.

    A file of settings is taken at its word, as a recipe that --set goes on from is not.
    """
    if given.recipe not in recipes():
        return config
    from vitdet import distributed
    from vitdet.data.layout import follow

    config, found = follow(config, given.overrides)
    if found and distributed.rank() == 0:
        settings = ", ".join(f"{key}={value}" for key, value in found.items())
        logging.getLogger(__name__).info("%s has %s", config.data.root, settings)
    return config


def run_evaluate(given: argparse.Namespace) -> int:
    """vitdet evaluate"""
    if given.results or given.annotations or given.dataset:
        return score_results(given)
    if not given.checkpoint:
        raise ValueError("name a CHECKPOINT, or --results FILE and --annotations FILE")
    from vitdet import distributed
    from vitdet.evaluation import evaluate
    from vitdet.stages import log_evaluation, tracking_folder

    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)  # minutes before it is needed
    config = load_config(given.config) if given.config else None
    metrics = evaluate(
        given.checkpoint, given.overrides, config=config, pictures=given.pictures, plots=given.plots
    )
    if distributed.rank() != 0:
        return 0
    print(table(metrics))
    if given.output:
        write_json(given.output, metrics)
    uri = config.tracking.uri if config else None
    pictures = sorted(given.pictures.glob("*.jpg")) if given.pictures else ()
    log_evaluation(
        given.checkpoint, metrics, uri, tracking_folder(given.checkpoint.parent), pictures
    )
    return 0


def score_results(given: argparse.Namespace) -> int:
    """vitdet evaluate --results"""
    if given.checkpoint or given.config or given.overrides or given.pictures:
        raise ValueError(
            "with --results there is no CHECKPOINT, --config, --set or --pictures: nothing is detected"
        )
    if not given.results or not given.annotations:
        raise ValueError(
            "--results FILE and --annotations FILE go together; --dataset says by whose rules (coco)"
        )
    from vitdet.evaluation import evaluate_results

    metrics = evaluate_results(
        given.results, given.annotations, given.dataset or "coco", plots=given.plots
    )
    print(table(metrics))
    if given.output:
        write_json(given.output, metrics)
    return 0


def run_bench_evaluate(given: argparse.Namespace) -> int:
    """vitdet bench evaluate"""
    from vitdet.evaluation.bench import measure

    figures = measure(given.images, given.detections, given.rounds)
    print(
        f"{figures['images']} images x {figures['detections_per_image']} detections, seconds of one processor"
    )
    for name, seconds in figures["cpu_seconds"].items():
        print(f"{name:12}" + "".join(f"  {step} {value:.2f}" for step, value in seconds.items()))
    print(
        f"pycocotools takes {figures['ratio']:.2f} times as long; "
        f"the figures differ by {figures['largest_difference']:.0e}"
    )
    if given.output:
        write_json(given.output, figures)
    return 0


def run_bench_data(given: argparse.Namespace) -> int:
    """vitdet bench data"""
    from vitdet.evaluation.bench_data import measure

    figures = measure(given.folder, given.split or ("train2017", "val2017"), given.rounds)
    print(
        f"{figures['images']} images, {figures['objects']} objects: milliseconds of one processor an image"
    )
    for name, times in figures["cpu_ms"].items():
        ratio = figures["ratio"].get(name)
        print(
            f"{name:20} {times['mean']:7.2f}  least {times['least']:7.2f}"
            + (f"  vitdet takes {ratio:.2f} of it" if ratio else "")
        )
    if given.output:
        write_json(given.output, figures)
    return 0


def run_predict(given: argparse.Namespace) -> int:
    """vitdet predict"""
    from vitdet.predictor import Predictor, read_image

    if not 0 <= given.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {given.threshold}")
    for path in given.images:  # all of them, before anything is written
        read_image(path)
    targets = place(given.images, given.output)
    predictor = Predictor.load(given.checkpoint)
    given.output.mkdir(parents=True, exist_ok=True)
    table = {}
    for path, target in targets.items():
        found = predictor(path, given.threshold)
        with written(target) as temporary:
            found.draw(path).save(temporary, "JPEG", quality=92)
        table[target.name] = [
            {"name": name, "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for name, score, box in zip(
                found.names, found.scores.tolist(), found.boxes.tolist(), strict=True
            )
        ]
        named = ", ".join(f"{one['name']} {one['score']:.2f}" for one in table[target.name])
        print(f"{target}: {named or 'nothing'}")
    write_json(given.output / "detections.json", table)
    return 0


def place(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where the drawing of each picture goes: folder/NAME.jpg, and NAME_2.jpg for another picture of that name.

    Raises ValueError rather than draw over one of the pictures themselves.
    """
    targets: dict[Path, Path] = {}
    for path in images:
        target, number = folder / f"{path.stem}.jpg", 1
        while target in targets.values():
            number += 1
            target = folder / f"{path.stem}_{number}.jpg"
        targets.setdefault(path, target)
    own = {path.resolve() for path in images} & {target.resolve() for target in targets.values()}
    if own:
        raise ValueError(
            f"{min(own)}: the drawing would take the place of the picture; choose another --output"
        )
    return targets


def run_register(given: argparse.Namespace) -> int:
    """vitdet register"""
    from vitdet.stages import register_checkpoint, tracking_folder

    settings = load_config(given.config).tracking if given.config else None
    metrics = json.loads(given.metrics.read_text()) if given.metrics else None
    name, version = register_checkpoint(
        given.checkpoint, settings, metrics, tracking_folder(given.checkpoint.parent), given.alias
    )
    print(f"{name}, version {version} ({given.alias})")
    if given.output:
        write_json(given.output, {"name": name, "version": version, "alias": given.alias})
    return 0


def table(metrics: dict[str, float]) -> str:
    """AP of boxes and masks, a column a kind of figure."""
    kinds = [kind for kind in ("box", "mask") if any(key.startswith(f"{kind}_") for key in metrics)]
    columns = list(dict.fromkeys(key.partition("_")[2] for key in metrics))
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
