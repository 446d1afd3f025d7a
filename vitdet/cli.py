"""The command line: parse, call, print. One verb is one stage of dvc.yaml and one public function.

Imports stand inside the verbs: `vitdet --help` and `vitdet config` answer without torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config import Config, dump_config, flatten, load_config, recipes, save_config

if TYPE_CHECKING:
    from vitdet.progress import Progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on stderr and exit code 1 (2 for the command line itself)."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = given.run(given)
    except (ValueError, OSError, LookupError) as error:
        if isinstance(error, KeyError | IndexError):
            raise  # a mistake of ours, not of the user's
        code = fail(str(error))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def fail(message: str) -> int:
    """Prints the one line that says what was expected, what came and what to do."""
    print(f"vitdet: {message}", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    """All verbs and their arguments."""
    root = argparse.ArgumentParser(prog="vitdet", description="Plain Vision Transformer detectors.")
    verbs = root.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("config", help="print the resolved config of a recipe or file")
    verb.add_argument("recipe", help=f"a recipe ({', '.join(recipes())}) or a YAML file")
    add_set(verb)
    verb.add_argument("--output", type=Path, help="write it to this file instead")
    verb.set_defaults(run=run_config)

    verb = verbs.add_parser("data", help="make or check a data set")
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser("tiny", help="draw the small data set of the demo")
    kind.add_argument("folder", type=Path)
    kind.add_argument("--train", type=int, default=4000, help="training images (4000)")
    kind.add_argument("--val", type=int, default=200, help="validation images (200)")
    kind.add_argument("--seed", type=int, default=0)
    kind.set_defaults(run=run_data_tiny)
    kind = kinds.add_parser("check", help="list every problem of a folder in COCO's layout")
    kind.add_argument("folder", type=Path)
    kind.set_defaults(run=run_data_check)

    verb = verbs.add_parser("weights", help="initial weights")
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser("list", help="the weights that have a name")
    kind.set_defaults(run=run_weights_list)
    kind = kinds.add_parser("fetch", help="put a weights file into a folder")
    kind.add_argument("name", help="a name of the list, or a config file, whose train.init is meant")
    kind.add_argument("--output", type=Path, required=True, help="the folder")
    kind.set_defaults(run=run_weights_fetch)

    verb = verbs.add_parser("train", help="train a detector; goes on where an interrupted training stopped")
    verb.add_argument("recipe", help="a recipe's name or a YAML file")
    add_set(verb)
    verb.add_argument("--output", type=Path, required=True, help="folder for model.pt, config.yaml and checkpoints")
    verb.add_argument("--checkpoints", type=Path, help="keep training states here, by config and data, not in --output")
    verb.add_argument("--weights", type=Path, help="folder that `vitdet weights fetch` filled, for train.init")
    verb.set_defaults(run=run_train)

    verb = verbs.add_parser("evaluate", help="box and mask AP of a checkpoint on its validation images")
    verb.add_argument("checkpoint", type=Path)
    add_set(verb)
    verb.add_argument("--config", type=Path, help="take the data and evaluate settings from this file")
    verb.add_argument("--output", type=Path, help="write the figures to this JSON file")
    verb.add_argument("--pictures", type=Path, help="folder for pictures of detections beside ground truth")
    verb.add_argument("--plots", type=Path, help="folder for precision over recall and AP of each class, as JSON")
    verb.set_defaults(run=run_evaluate)

    verb = verbs.add_parser("predict", help="draw what a checkpoint finds in pictures")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    verb.add_argument("--output", type=Path, required=True, help="folder for the drawn pictures and detections.json")
    verb.add_argument("--threshold", type=float, default=0.5, help="least score (0.5)")
    verb.set_defaults(run=run_predict)

    verb = verbs.add_parser("register", help="add a checkpoint to the MLflow model registry")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("--alias", default="candidate", help="name that then points to this version (candidate)")
    verb.add_argument("--config", type=Path, help="take the tracking settings from this file")
    verb.add_argument("--metrics", type=Path, help="JSON file of `vitdet evaluate`, for the version's tags")
    verb.add_argument("--output", type=Path, help="write name and version to this JSON file")
    verb.set_defaults(run=run_register)
    return root


def add_set(verb: argparse.ArgumentParser) -> None:
    """The one way to change a setting."""
    verb.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                      help="change a setting, as in optim.lr=2e-4; may be repeated")


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


def run_weights_list(given: argparse.Namespace) -> int:
    """vitdet weights list"""
    from vitdet.weights import CATALOGUE

    for name, what in CATALOGUE.items():
        print(f"{name:20} {what}")
    return 0


def run_weights_fetch(given: argparse.Namespace) -> int:
    """vitdet weights fetch"""
    from vitdet.weights import resolve

    is_config = given.name.endswith((".yaml", ".yml"))
    name = load_config(given.name).train.init if is_config else given.name
    source = resolve(name)
    given.output.mkdir(parents=True, exist_ok=True)
    if source is None:
        print("train.init is empty: training starts from random weights")
        return 0
    temporary = given.output / f".{source.name}.{os.getpid()}.tmp"
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(given.output / source.name)
    finally:
        temporary.unlink(missing_ok=True)
    print(given.output / source.name)
    return 0


def run_train(given: argparse.Namespace) -> int:
    """vitdet train"""
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
    print(path)
    return 0


def start_tracker(
    config: Config, recipe: str, output: Path, identity: str, run_id: str | None, step: int
) -> Progress:
    """Progress for the eye, MLflow behind it where that is installed."""
    from vitdet.progress import Progress
    from vitdet.training.trainer import Silent

    tracker = Silent()
    if importlib.util.find_spec("mlflow"):
        from vitdet.tracking import start_run

        data = config.data
        tracker = start_run(
            uri=config.tracking.uri, folder=tracking_folder(output), experiment=config.tracking.experiment,
            name=output.name if recipe == "config" else recipe, params=flatten(config), tags={"recipe": recipe},
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
    from vitdet.evaluation import evaluate
    from vitdet.training.checkpoint import load_model_file

    overrides = [*sections(given.config, ("data", "evaluate")), *given.overrides]
    metrics = evaluate(given.checkpoint, overrides, pictures=given.pictures, plots=given.plots)
    print(table(metrics))
    if given.output:
        write_json(given.output, metrics)
    stored = load_model_file(given.checkpoint)
    if stored["run_id"] and importlib.util.find_spec("mlflow"):
        from vitdet.tracking import log_metrics

        config = load_config(given.config) if given.config else None
        files = sorted(given.pictures.glob("*.jpg")) if given.pictures else []
        log_metrics(stored["run_id"], config.tracking.uri if config else stored["config"]["tracking"]["uri"],
                    tracking_folder(given.checkpoint.parent), metrics, stored["step"],
                    {path: "pictures" for path in files})
    return 0


def run_predict(given: argparse.Namespace) -> int:
    """vitdet predict"""
    from vitdet.predictor import Predictor

    if not 0 <= given.threshold <= 1:
        return fail(f"--threshold must lie between 0 and 1, got {given.threshold}")
    missing = [path for path in given.images if not path.is_file()]
    if missing:
        return fail(f"{missing[0]}: no such image file")
    predictor = Predictor.load(given.checkpoint)
    given.output.mkdir(parents=True, exist_ok=True)
    table = {}
    for path in given.images:
        found = predictor(path, given.threshold)
        target = given.output / f"{path.stem}.jpg"
        if target.name in table:  # two pictures of one name from two folders
            target = given.output / f"{path.stem}_{len(table)}.jpg"
        found.draw(path).save(target, quality=92)
        table[target.name] = [
            {"name": name, "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for name, score, box in zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        ]
        named = ", ".join(f"{one['name']} {one['score']:.2f}" for one in table[target.name])
        print(f"{target}: {named or 'nothing'}")
    write_json(given.output / "detections.json", table)
    return 0


def run_register(given: argparse.Namespace) -> int:
    """vitdet register"""
    if not importlib.util.find_spec("mlflow"):
        return fail("mlflow is not installed; install vitdet with its extra 'tracking'")
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
