"""The folders of a workspace, which the steps of a pipeline run share.

WORKSPACE/...                     data sets and files of weights, where the recipes' relative paths say
WORKSPACE/weights/                what train.init names
WORKSPACE/runs/NAME-RUN/          a training: config, checkpoints, model.pt, best.pt; NAME is recipe and digest of its config,
                                  RUN the first digits of the pipeline run's id
WORKSPACE/runs/pipeline-RUN/      a pipeline run: the configs of its trainings, and their comparison
WORKSPACE/runs/mlflow.db          MLflow's store, where no server is named
"""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from vitdet.config import Config, load_stored
from vitdet.digest import digest, legacy_digest


def weights_folder(workspace: str) -> Path:
    """The folder of the initial weights."""
    return Path(workspace) / "weights"


def runs_folder(workspace: str) -> Path:
    """The folder of the trainings, and of MLflow's store if no server is named."""
    return Path(workspace) / "runs"


def run_folder(workspace: str, run_id: str) -> Path:
    """The folder of a pipeline run, for what belongs to all of its trainings."""
    return runs_folder(workspace) / f"pipeline-{run_id[:8]}"


def training_folder(workspace: str, name: str, run_id: str) -> Path:
    """A folder for each training of each pipeline run, the same for a step that is retried.

    Also one that version 0.1 began under its own digest of the config, if there is one.
    """
    run, (recipe, _, digits) = run_id[:8], name.rpartition("-")
    folder = runs_folder(workspace) / f"{name}-{run}"
    if not folder.exists():
        pattern = f"{glob.escape(recipe)}-????????-{run}/config.yaml"
        for other in runs_folder(workspace).glob(pattern):
            config = load_stored(other)
            old = (legacy_digest(config) or "")[:8]
            if digest(config)[:8] == digits and other.parent.name == f"{recipe}-{old}-{run}":
                return other.parent
    return folder


def result(checkpoint: Path) -> Path:
    """The detector of a training's folder: best.pt with train.keep_best, else model.pt; a file is itself."""
    if not checkpoint.is_dir():
        return checkpoint
    config = checkpoint / "config.yaml"
    keeps = config.is_file() and load_stored(config).train.keep_best
    return checkpoint / ("best.pt" if keeps else "model.pt")


def logs_folder(workspace: str, name: str, run_id: str) -> Path:
    """The folder for the last lines of each rank of a training job."""
    return training_folder(workspace, name, run_id) / "logs"


def resolve_paths(config: Config, workspace: Path) -> Config:
    """The config with the relative paths of data and weights below the workspace."""
    init = config.train.init
    settings = (
        replace(config.train, init=str(workspace / init)) if Path(init).suffix else config.train
    )
    data = replace(config.data, root=str(workspace / config.data.root))
    return replace(config, data=data, train=settings)
