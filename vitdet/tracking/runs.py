"""The MLflow run of a training run: its start, and later files and evaluations.

Without MLflow, i.e. if the extra `tracking` is not installed, nothing is logged. mlflow is
imported inside the functions, so that commands without tracking do not wait for the import.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, flatten
from vitdet.tracking.address import hide_credentials, tracking_uri
from vitdet.tracking.measured import beside
from vitdet.tracking.naming import code_tags, description, machine, recipe_of, run_name
from vitdet.tracking.tracker import Progress, Tracker

log = logging.getLogger(__name__)

MATCHES_FOLDER = "evaluation"  # artifact folder of matches.npz


def has_mlflow() -> bool:
    """Return whether the extra `tracking` is installed."""
    return importlib.util.find_spec("mlflow") is not None


def require_mlflow() -> None:
    """Raise ValueError if the extra `tracking` is not installed."""
    if not has_mlflow():
        raise ValueError("mlflow is not installed; install vitdet with its extra 'tracking'")


def default_folder(output: Path) -> Path:
    """Return the default MLflow store's folder: the parent of a training run's output folder."""
    return output.resolve().parent


def start_tracker(
    config: Config,
    recipe: str,
    output: Path,
    group: str,
    data_digest: str,
    run_id: str | None,
    step: int,
) -> Progress:
    """Start or resume the MLflow run of a training run; return a tracker that prints progress.

    recipe: the recipe's name, or the stem of the config file. output: the training run's folder.
    group: the ID of the pipeline run, "" if there is none. run_id: the MLflow run that continues at
    `step`; None: a new run, or an unfinished run in `output` without metrics.
    """
    tracker = Tracker()
    if has_mlflow():
        from vitdet.tracking.mlflow import start_run

        if group:  # remove the config's digest, which the pipeline appended
            recipe = re.sub(r"-[0-9a-f]{8}$", "", recipe)
        recipe, builtin = recipe_of(config, recipe)
        root = Path(config.data.root)
        tags = {
            "recipe": recipe,
            "data": root.name,
            "data_fingerprint": data_digest,
            "mlflow.note.content": description(config, builtin, output),
            **machine(),
        }
        what = {
            "experiment": config.tracking.experiment,
            "name": hide_credentials(run_name(config, recipe, builtin)),
            "params": flatten(config),
            "tags": {key: hide_credentials(value) for key, value in tags.items()},
            "dataset": {"name": root.name, "digest": data_digest, "source": str(root.resolve())},
            "group": group,
            "output": output.resolve().name,
        }
        folder = default_folder(output)
        tracker = start_run(config.tracking.uri, folder, what, run_id, step)
    else:
        log.warning("mlflow is not installed: this training run is not tracked")
    return Progress(tracker, config.optim.steps, step)


def log_files(config: Config, output: Path, files: Sequence[Path], artifact_folder: str) -> None:
    """Log files to an artifact folder of the run that was last started in `output`, if any.

    Files that cannot be sent yet are kept in the journal.
    """
    if not has_mlflow():
        return
    from vitdet.tracking.journal import journals
    from vitdet.tracking.mlflow import log_metrics

    folder = default_folder(output)
    starts = [(journal.start() or {}, journal.run_id) for journal in journals(folder)]
    times = [(start["time"], run) for start, run in starts if start.get("output") == output.name]
    if times:
        _, run_id = max(times)
        artifacts = dict.fromkeys(files, artifact_folder)
        log_metrics(run_id, config.tracking.uri, folder, {}, 0, artifacts)


def log_evaluation(
    checkpoint: Path,
    metrics: dict[str, float],
    config: Config | None,
    folder: Path,
    pictures: Path | None = None,
    plots: Path | None = None,
    report: Path | None = None,
) -> str | None:
    """Log an evaluation to the MLflow run that trained the checkpoint; return the run's ID.

    Returns None if nothing is logged, e.g. if MLflow is not installed or if the run does not exist.

    Args:
        config: The config with the server's address. Default: the config in the checkpoint.
        folder: The folder of the default store.
        pictures: A folder of images with detections.
        plots: The folder with the matches and the report.
        report: The report page. Default: the page in `plots`.
    """
    stored = load_model_file(checkpoint)
    if not stored["run_id"] or not has_mlflow():
        return None
    from vitdet.evaluation.matches import MATCHES
    from vitdet.evaluation.report import REPORT
    from vitdet.tracking.mlflow import log_metrics

    files = dict.fromkeys(sorted(pictures.glob("*.jpg")) if pictures else (), "pictures")
    if plots:
        matches = plots / MATCHES
        files |= dict.fromkeys((matches, beside(matches)), MATCHES_FOLDER)
        report = report or plots / REPORT
    if report:
        files[report] = ""
    uri = config.tracking.uri if config else stored["config"]["tracking"]["uri"]
    try:
        kind, _, path = tracking_uri(uri, folder).partition(":///")
    except ValueError as error:  # not raised, so that the caller does not lose the metrics
        log.warning("%s: the metrics are not logged", error)
        return None
    if kind == "sqlite" and not Path(path).exists():
        return None
    # the prefix avoids replacing the tags of the training run
    tags = {f"evaluation.{key}": value for key, value in code_tags().items()}
    named = with_metric_names(metrics)
    return log_metrics(stored["run_id"], uri, folder, named, stored["step"], files, tags)


def with_metric_names(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics under names that MLflow accepts (see `metric_name`).

    The second and later values with the same name get the suffixes _2, _3 and so on.
    """
    named: dict[str, float] = {}
    for key, value in metrics.items():
        name = plain = metric_name(key)
        number = 2
        while name in named:
            suffix = f"_{number}"
            name, number = plain[: 250 - len(suffix)] + suffix, number + 1
        named[name] = value
    return named


def metric_name(name: str) -> str:
    """Convert a metric's name, e.g. box_ap or class_ap/CLASS, to a name that MLflow accepts.

    MLflow accepts up to 250 characters: letters, digits and "_-. :/". The name must be a normalized
    path: no part between slashes may be empty, "." or "..".
    """
    name = re.sub(r"[^\w\-. :/]", "_", name)
    head, slash, tail = name.partition("/")
    # MLflow interprets slashes and parts such as .. in a class name as a path
    tail = re.sub(r"^\.+|\.+$", "_", tail.replace("/", "_")) or "_" * len(slash)
    return f"{head}{slash}{tail}"[:250]
