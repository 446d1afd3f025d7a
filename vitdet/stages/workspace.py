"""The folders of a workspace, which all steps of a pipeline run share.

WORKSPACE/...                data sets and weights files, at the relative paths in the recipes
WORKSPACE/weights/           initial weights (`train.init`)
WORKSPACE/runs/NAME-RUN/     a training run: config, checkpoints, model.pt, best.pt
WORKSPACE/runs/pipeline-RUN/ a pipeline run: configs of its training runs, and their comparison
WORKSPACE/runs/mlflow.db     MLflow's store, if there is no tracking server

NAME is RECIPE-DIGEST. DIGEST and RUN are the first 8 digits of the config's digest and the run ID.
"""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitdet.config import Config, load_stored
from vitdet.config.digest import digest, legacy_digest


def weights_folder(workspace: str) -> Path:
    """Return the folder of the initial weights."""
    return Path(workspace) / "weights"


def runs_folder(workspace: str) -> Path:
    """Return the folder of the training runs, which also contains MLflow's default store."""
    return Path(workspace) / "runs"


def run_folder(workspace: str, run_id: str) -> Path:
    """Return the folder of a pipeline run, for files shared by all of its training runs."""
    return runs_folder(workspace) / f"pipeline-{run_id[:8]}"


def training_folder(workspace: str, name: str, run_id: str) -> Path:
    """Return the folder of a training run; if a step is repeated, it uses the same folder.

    If vitdet 0.1 started the training run, the folder's name contains that version's config digest.
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


def champion_file(workspace: str, name: str, run_id: str) -> Path:
    """Return the JSON file of the champion's evaluation, for the gate of a training run."""
    return training_folder(workspace, name, run_id) / "champion.json"


def result(checkpoint: Path) -> Path:
    """Return the detector's file in a folder: best.pt with `train.keep_best`, else model.pt.

    If `checkpoint` is a file, it is returned unchanged.
    """
    if not checkpoint.is_dir():
        return checkpoint
    config = checkpoint / "config.yaml"
    keeps = config.is_file() and load_stored(config).train.keep_best
    return checkpoint / ("best.pt" if keeps else "model.pt")


def resolve_paths(config: Config, workspace: Path) -> Config:
    """Return the config with the relative paths of data and weights resolved in the workspace."""
    train, data = config.train, config.data
    if Path(train.init).suffix:
        train = replace(train, init=str(workspace / train.init))
    return replace(config, data=replace(data, root=str(workspace / data.root)), train=train)


def registry(config: Config, workspace: str) -> dict[str, Any]:
    """Return uri, folder and model_name, which select a registered model in `vitdet.tracking`."""
    tracking, folder = config.tracking, runs_folder(workspace)
    return {"uri": tracking.uri, "folder": folder, "model_name": tracking.model_name}
