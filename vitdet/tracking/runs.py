"""The MLflow run of a training; without MLflow, progress is only printed."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, flatten
from vitdet.tracking.address import hide_credentials
from vitdet.tracking.measured import beside
from vitdet.tracking.naming import code_tags, description, machine, recipe_of, run_name
from vitdet.tracking.tracker import Progress, Tracker

log = logging.getLogger(__name__)

MATCHES_FOLDER = "evaluation"  # artifact folder of matches.npz


def has_mlflow() -> bool:
    """Whether the extra `tracking` is installed."""
    return importlib.util.find_spec("mlflow") is not None


def require_mlflow() -> None:
    """Raise ValueError if the extra `tracking` is not installed."""
    if not has_mlflow():
        raise ValueError("mlflow is not installed; install vitdet with its extra 'tracking'")


def default_folder(output: Path) -> Path:
    """Return the folder of the default MLflow store: the parent of `output`, shared by its runs."""
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
    """Return a tracker that prints progress, and logs to MLflow if it is installed."""
    if group:  # the pipeline appends a digest of the config
        recipe = re.sub(r"-[0-9a-f]{8}$", "", recipe)
    tracker = Tracker()
    if has_mlflow():
        from vitdet.tracking.mlflow import start_run

        recipe, builtin = recipe_of(config, recipe)
        data = Path(config.data.root).name
        tags = {
            "recipe": recipe,
            "data": data,
            "data_fingerprint": data_digest,
            "mlflow.note.content": description(config, builtin, output),
            **machine(),
        }
        tracker = start_run(
            uri=config.tracking.uri,
            folder=default_folder(output),
            experiment=config.tracking.experiment,
            name=hide_credentials(run_name(config, recipe, builtin)),
            params=flatten(config),
            tags={key: hide_credentials(value) for key, value in tags.items()},
            group=group,
            dataset={
                "name": data,
                "digest": data_digest,
                "source": str(Path(config.data.root).resolve()),
            },
            run_id=run_id,
            resume_step=step,
            output=output.resolve().name,
        )
    else:
        log.warning("mlflow is not installed: this training is not tracked")
    return Progress(tracker, config.optim.steps, step)


def log_files(config: Config, output: Path, files: Sequence[Path], place: str) -> None:
    """Log files to the run of the training that last started in `output`, in this artifact folder.

    Does nothing if the training did not get as far as its run. What a server does not take now
    waits in the journal.
    """
    if not has_mlflow():
        return
    from vitdet.tracking.journal import PENDING, journals
    from vitdet.tracking.mlflow import log_metrics

    folder, started = default_folder(output), []
    for journal in journals(folder):
        start = journal.start() or {}
        if start.get("output") == output.name:
            started.append((start["time"], PENDING + journal.key))
    if started:
        _, run_id = max(started)
        log_metrics(run_id, config.tracking.uri, folder, {}, 0, dict.fromkeys(files, place))


def log_evaluation(
    checkpoint: Path,
    metrics: dict[str, float],
    config: Config | None,
    folder: Path,
    pictures: Path | None = None,
    plots: Path | None = None,
    report: Path | None = None,
) -> str | None:
    """Log metrics, images, matches, the HTML report and the code's tags to the run that trained the checkpoint;
    return its id.

    config: selects the server; default: the checkpoint's config. folder: folder of the default
    store. plots: the folder with matches and report. report: default: that in `plots`. Returns None
    if the store does not exist, e.g. because the checkpoint was moved.
    """
    stored = load_model_file(checkpoint)
    if not stored["run_id"] or not has_mlflow():
        return None
    from vitdet.evaluation.matches import MATCHES
    from vitdet.evaluation.report import REPORT
    from vitdet.tracking.mlflow import log_metrics, tracking_uri

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
    except ValueError as error:  # the metrics matter more
        log.warning("%s: the metrics are not logged", error)
        return None
    if kind == "sqlite" and not Path(path).exists():
        return None
    named = with_metric_names(metrics)
    # the training's own tags remain: the evaluation may have run in another image
    tags = {f"evaluation.{key}": value for key, value in code_tags().items()}
    return log_metrics(stored["run_id"], uri, folder, named, stored["step"], files, tags)


def with_metric_names(metrics: dict[str, float]) -> dict[str, float]:
    """Return the values under names that MLflow accepts; of several with the same name, the later ones get
    the suffix _2, _3 and so on.
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
    """Return a name that MLflow accepts: at most 250 characters, of letters, digits and "_-. :/",
    which as a path does not resolve to another one.
    """
    name = re.sub(r"[^\w\-. :/]", "_", name)
    head, slash, tail = name.partition("/")
    # in the name of a class a slash, or a dot in front, would be part of a path
    tail = re.sub(r"^\.+|\.+$", "_", tail.replace("/", "_")) or "_" * len(slash)
    return f"{head}{slash}{tail}"[:250]
