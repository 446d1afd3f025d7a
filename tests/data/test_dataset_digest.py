"""The data set digest is equal on the command line, in dvc.yaml and in the pipeline, for COCO and LVIS layouts,
for any location, and for copies and links.
"""

# ruff: noqa: F401, F811 - imported fixtures
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, minimal, options
from tests.data.test_lvis_data import lvis
from vitdet import stages
from vitdet.tracking import mlflow as tracking
from vitdet.training import Stopped

RUN = "0123456789abcdef"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests passed to MLflow, one per training run; each run is stopped at that point."""
    told: list[str] = []

    def start_run(uri: str, folder: Path, what: dict, *_: object) -> None:
        told.append(what["dataset"]["digest"])
        raise Stopped("seen enough")

    monkeypatch.setattr(tracking, "start_run", start_run)
    return told


def place(source: Path, target: str, copy: Callable = shutil.copyfile) -> str:
    shutil.copytree(source, target, copy_function=copy)
    return target


@pytest.mark.parametrize("dataset", ["coco", "lvis"])
def test_every_way_to_train_logs_the_same_digest(
    dataset: str, request: pytest.FixtureRequest, tmp_path: Path, vitdet: Run, logged: list[str]
) -> None:
    source = request.getfixturevalue("tiny" if dataset == "coco" else "lvis")

    def settings(root: str) -> list[str]:
        return [*minimal(root, optim__steps=1), f"data.dataset={dataset}"]

    # symbolic links, which DVC may check out instead of files
    own, held = (place(source, "own"), place(source, "work/data/held", os.symlink))
    assert vitdet("train", "tiny", *options(settings(own)), "--output", "runs/a")[0] == 143

    words = ["config", "tiny", *options(settings(held)), "--output", "work/config.yaml"]
    assert vitdet(*words)[0] == 0
    command = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["cmd"][0].split()
    Path("work/weights").mkdir()
    assert vitdet(*command[1:])[0] == 143

    names = ("space", "settings", "manifest", "configs")
    space, configs, manifest, resolved = (str(tmp_path / name) for name in names)
    place(source, "space/sets/there")
    (name,) = stages.resolve_configs(["tiny"], settings("sets/there"), space, configs)
    key = stages.prepare_data(configs, space, resolved, manifest).fingerprint
    with pytest.raises(Stopped):
        stages.train_recipe(configs, name, key, space, RUN, str(tmp_path / "model.pt"))
    assert logged == 3 * [key]
