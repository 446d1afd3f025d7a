"""Training for `vitdet train` and for a pipeline step, in the step's process or in a job."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config import Config, load_config, save_config
from vitdet.stages.outcomes import recorded
from vitdet.stages.preparation import verified_config
from vitdet.stages.workspace import result, training_folder, weights_folder

if TYPE_CHECKING:
    from vitdet.tracking.tracker import Tracker

log = logging.getLogger(__name__)


def train(
    config: Config,
    recipe: str,
    output: Path,
    *,
    checkpoints: Path | None = None,
    weights: Path | None = None,
    group: str = "",
    profile: bool = False,
) -> Path:
    """Train a detector; log to MLflow if MLflow is installed; return the path OUTPUT/model.pt.

    Args:
        config: The resolved config.
        recipe: The recipe's name (in a pipeline: the training run's name), for the MLflow run.
        output: The folder for model.pt, best.pt and config.yaml.
        checkpoints: Folder for the training states of several runs. Default: OUTPUT/checkpoints.
        weights: The folder of the initial weights. Default: the package or the cache.
        group: The ID of the pipeline run, whose MLflow run becomes the parent; "": no parent.
        profile: Whether to trace a few steps.

    Raises the errors of `vitdet.train`, `vitdet.weights.resolve` and
    `vitdet.tracking.address.tracking_uri`.
    """
    from vitdet import training
    from vitdet.tracking.address import tracking_uri
    from vitdet.tracking.runs import default_folder, has_mlflow, start_tracker
    from vitdet.weights import resolve

    if has_mlflow():
        # reject an invalid MLflow address before training
        tracking_uri(config.tracking.uri, default_folder(output))

    def start_tracking(data_digest: str, run_id: str | None, step: int) -> Tracker:
        return start_tracker(config, recipe, output, group, data_digest, run_id, step)

    return training.train(
        config,
        output,
        checkpoints=checkpoints,
        weights=resolve(config.train.init, weights),
        start_tracking=start_tracking,
        profile=profile,
    )


def train_recipe(
    settings: str, name: str, data: str, workspace: str, run_id: str, checkpoint: str
) -> None:
    """Train in this process and copy the detector to `checkpoint`.

    Raises the errors of `verified_config` and `train`.
    """
    with recorded(workspace, name, run_id, "train"):
        config = verified_config(settings, name, data)
        if not is_trained(workspace, name, run_id):
            output = training_folder(workspace, name, run_id)
            train(config, name, output, weights=weights_folder(workspace), group=run_id)
        copy_checkpoint(workspace, name, run_id, checkpoint)


def train_argv(settings: str, name: str, data: str, workspace: str, run_id: str) -> list[str]:
    """Return the arguments of `vitdet` for a training job, and save the config for the job.

    Raises the errors of `verified_config` and `vitdet.weights.resolve`.
    """
    from vitdet.weights import resolve

    config = verified_config(settings, name, data)
    output, weights = training_folder(workspace, name, run_id), weights_folder(workspace)
    resolve(config.train.init, weights)
    file = output / f"{name}.yaml"
    save_config(config, file)
    options = {"--output": output, "--weights": weights, "--group": run_id}
    return ["train", str(file), *(str(word) for pair in options.items() for word in pair)]


def check_processes(settings: str, name: str, processes: int) -> None:
    """Raise ValueError if the training run's batch cannot be divided evenly among the processes."""
    from vitdet.data.samplers import check_batch_size

    train = load_config(Path(settings) / f"{name}.yaml").train
    check_batch_size(train.batch_size, processes, train.accumulate)


def is_trained(workspace: str, name: str, run_id: str) -> bool:
    """Return whether the training run is complete."""
    folder = training_folder(workspace, name, run_id)
    return (folder / "model.pt").is_file() and result(folder).is_file()


def keep_logs(settings: str, name: str, workspace: str, run_id: str, files: dict[str, str]) -> None:
    """Write the logs of a job, {file name: text}, to the training run's folder and its MLflow run.

    An OSError or ValueError is logged as a warning and not raised.
    """
    from vitdet.tracking.runs import log_files

    output = training_folder(workspace, name, run_id)
    folder = output / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        config = load_config(Path(settings) / f"{name}.yaml")
        log_files(config, output, [folder / file for file in files], "logs")
    except (OSError, ValueError) as error:
        log.warning("the logs of the job could not be saved: %s", error)


def copy_checkpoint(workspace: str, name: str, run_id: str, checkpoint: str) -> None:
    """Copy a training run's detector (see `result`) to the file `checkpoint`."""
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(result(training_folder(workspace, name, run_id)), checkpoint)
