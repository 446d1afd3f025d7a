"""The MLflow run of a training; without MLflow, progress is only printed."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, digest, flatten
from vitdet.tracking.tracker import Progress, Tracker

log = logging.getLogger(__name__)


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
    recipe = re.sub(r"-[0-9a-f]{8}$", "", recipe)  # the pipeline appends a digest of the config
    tracker = Tracker()
    if has_mlflow():
        from vitdet.tracking.mlflow import start_run

        data = config.data
        tracker = start_run(
            uri=config.tracking.uri,
            folder=default_folder(output),
            experiment=config.tracking.experiment,
            name=f"{output.name if recipe == 'config' else recipe} {digest(config)[:6]}",
            params=flatten(config),
            tags={"recipe": recipe},
            group=group,
            dataset={
                "name": Path(data.root).name,
                "digest": data_digest,
                "source": str(Path(data.root).resolve()),
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
) -> str | None:
    """Log metrics and images to the run that trained the checkpoint; return its id.

    config: selects the server; default: the checkpoint's config. folder: folder of the default
    store. Returns None if the store does not exist, e.g. because the checkpoint was moved.
    """
    stored = load_model_file(checkpoint)
    if not stored["run_id"] or not has_mlflow():
        return None
    from vitdet.tracking.mlflow import log_metrics, tracking_uri

    uri = config.tracking.uri if config else stored["config"]["tracking"]["uri"]
    try:
        kind, _, path = tracking_uri(uri, folder).partition(":///")
    except ValueError as error:  # the measured figures matter more
        log.warning("%s: the metrics are not logged", error)
        return None
    if kind == "sqlite" and not Path(path).exists():
        return None
    files = dict.fromkeys(sorted(pictures.glob("*.jpg")) if pictures else (), "pictures")
    return log_metrics(stored["run_id"], uri, folder, metrics, stored["step"], files)
