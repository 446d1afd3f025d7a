"""What each verb of the command line does: call a public function, print. One verb is one stage of dvc.yaml.

Imports stand inside the verbs: `vitdet --help` and `vitdet config` answer without torch. A verb gives the exit code
and raises the errors of what it calls; `vitdet.cli.main` makes one line of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config import Config, digest, dump_config, flatten, load_config, save_config

if TYPE_CHECKING:
    from vitdet.progress import Progress


def run_config(given: argparse.Namespace) -> int:
    """vitdet config"""
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
    print(f"{given.folder}: {given.train} + {given.val} images" + ("" if made else ", already there"))
    return 0


def run_data_check(given: argparse.Namespace) -> int:
    """vitdet data check"""
    from vitdet.data.check import check

    report = check(given.folder)
    print(*report.lines(), sep="\n")
    return 0 if report.ok else 1


def run_train(given: argparse.Namespace) -> int:
    """vitdet train"""
    from vitdet import distributed
    from vitdet.training import Stopped, train
    from vitdet.weights import resolve

    config = load_config(given.recipe, given.overrides)
    source = resolve(config.train.init, given.weights)

    def start_tracking(identity: str, run_id: str | None, step: int) -> Progress:
        return start_tracker(config, Path(given.recipe).stem, given.output, identity, run_id, step)

    try:
        path = train(config, given.output, checkpoints=given.checkpoints, weights=source, start_tracking=start_tracking)
    except Stopped as stopped:
        print(f"vitdet: {stopped}", file=sys.stderr)
        return 143  # as the shell says of a process that SIGTERM ended
    if distributed.rank() == 0:
        print(path)
    return 0


def start_tracker(
    config: Config, recipe: str, output: Path, identity: str, run_id: str | None, step: int
) -> Progress:
    """Progress for the eye, MLflow behind it where that is installed."""
    from vitdet.progress import Progress, Tracker

    tracker = Tracker()
    if importlib.util.find_spec("mlflow"):
        from vitdet.tracking import start_run

        data = config.data
        tracker = start_run(
            uri=config.tracking.uri, folder=tracking_folder(output), experiment=config.tracking.experiment,
            name=f"{output.name if recipe == 'config' else recipe} {digest(config)[:6]}", params=flatten(config),
            tags={"recipe": recipe},
            dataset={"name": Path(data.root).name, "digest": identity, "source": str(Path(data.root).resolve())},
            run_id=run_id, resume_step=step,
        )
    else:
        logging.getLogger(__name__).warning("mlflow is not installed: this training is not tracked")
    return Progress(tracker, config.optim.steps, step)


def tracking_folder(output: Path) -> Path:
    """Where the default MLflow store of a run lies: beside the run's folder, so that runs can be compared."""
    return output.resolve().parent


def run_evaluate(given: argparse.Namespace) -> int:
    """vitdet evaluate"""
    from vitdet import distributed
    from vitdet.evaluation import evaluate
    from vitdet.training.checkpoint import load_model_file

    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)  # minutes before it is needed
    overrides = [*sections(given.config, ("data", "evaluate")), *given.overrides]
    metrics = evaluate(given.checkpoint, overrides, pictures=given.pictures, plots=given.plots)
    if distributed.rank() != 0:
        return 0
    print(table(metrics))
    if given.output:
        write_json(given.output, metrics)
    stored = load_model_file(given.checkpoint)
    if stored["run_id"] and importlib.util.find_spec("mlflow"):
        from vitdet.tracking import log_metrics, tracking_uri

        config = load_config(given.config) if given.config else None
        uri = config.tracking.uri if config else stored["config"]["tracking"]["uri"]
        folder = tracking_folder(given.checkpoint.parent)
        kind, _, path = tracking_uri(uri, folder).partition(":///")
        if kind != "sqlite" or Path(path).exists():  # else the checkpoint was carried away from its run
            files = sorted(given.pictures.glob("*.jpg")) if given.pictures else []
            log_metrics(stored["run_id"], uri, folder, metrics, stored["step"], dict.fromkeys(files, "pictures"))
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
            for name, score, box in zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
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
        raise ValueError(f"{min(own)}: the drawing would take the place of the picture; choose another --output")
    return targets


def run_register(given: argparse.Namespace) -> int:
    """vitdet register"""
    if not importlib.util.find_spec("mlflow"):
        raise ValueError("mlflow is not installed; install vitdet with its extra 'tracking'")
    import tempfile

    import numpy as np

    from vitdet.config import from_dict
    from vitdet.serving import register
    from vitdet.training.checkpoint import load_model_file
    from vitdet.wheel import build_wheel

    stored = load_model_file(given.checkpoint)
    settings = (load_config(given.config) if given.config else from_dict(stored["config"])).tracking
    metrics = json.loads(given.metrics.read_text()) if given.metrics else stored["metrics"]
    side = stored["config"]["data"]["image_size"]
    example = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        name, version = register(
            given.checkpoint, run_id=stored["run_id"], uri=settings.uri,
            folder=tracking_folder(given.checkpoint.parent), model_name=settings.model_name, alias=given.alias,
            metrics={key: metrics[key] for key in ("box_ap", "mask_ap") if metrics.get(key) is not None},
            example=example, wheel=build_wheel(Path(folder)), tags={"dataset_digest": stored["dataset_digest"]},
        )
    print(f"{name}, version {version} ({given.alias})")
    if given.output:
        write_json(given.output, {"name": name, "version": version, "alias": given.alias})
    return 0


def sections(path: Path | None, names: Sequence[str]) -> list[str]:
    """The settings of some sections of a config file, as overrides."""
    if path is None:
        return []
    return [f"{key}={value}" for key, value in flatten(load_config(path)).items() if key.split(".")[0] in names]


def table(metrics: dict[str, float]) -> str:
    """AP of boxes and masks, a column a kind."""
    columns = [key.removeprefix("box_") for key in metrics if key.startswith("box_")]
    rows = [f"{'':6}" + "".join(f"{column:>11}" for column in columns)]
    for kind in ("box", "mask"):
        cells = [metrics.get(f"{kind}_{column}") for column in columns]
        rows.append(f"{kind:6}" + "".join(f"{'-' if cell is None else format(cell, '.1f'):>11}" for cell in cells))
    return "\n".join(rows)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The name under which to write a file; it takes its own name when it is whole, else nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
