"""The logs of a training job are stored in its folder and its MLflow run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import minimal
from vitdet import stages
from vitdet.config import load_config
from vitdet.stages.workspace import training_folder
from vitdet.tracking.mlflow import tracking_uri
from vitdet.tracking.runs import start_tracker

RUN = "0b1c2d3e-1f3e-4b7e-9b1b-0d6c35f7a001"
FILES = {"rank-00000.log": "step 1\n", "rank-00001.log": "vitdet: bad image 7.jpg\n"}


def test_the_logs_of_a_job_are_files_and_artifacts_of_its_run(tmp_path: Path, tiny: Path) -> None:
    settings = str(tmp_path / "settings")
    (name,) = stages.resolve_configs(["tiny"], minimal(tiny), str(tmp_path), settings)
    output = training_folder(str(tmp_path), name, RUN)
    config = load_config(tmp_path / "settings" / f"{name}.yaml")
    stages.keep_logs(settings, name, str(tmp_path), RUN, FILES)  # before the run exists
    for status in ("KILLED", "FAILED"):
        tracker = start_tracker(config, name, output, "", "d", None, 0)
        tracker.log({"loss": 1.0, "images_per_second": 1.0}, 1)
        tracker.close(status)
    stages.keep_logs(settings, name, str(tmp_path), RUN, FILES)
    for file, text in FILES.items():
        assert (output / "logs" / file).read_text() == text
    client = MlflowClient(tracking_uri("", output.parent))
    first, last = sorted(client.search_runs(["1"]), key=lambda run: run.info.start_time)
    found = [file.path for file in client.list_artifacts(last.info.run_id, "logs")]
    assert found == [f"logs/{file}" for file in FILES]
    assert last.info.status == "FAILED" and not client.list_artifacts(first.info.run_id, "logs")


def test_logs_that_cannot_be_saved_do_not_hide_the_result(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = str(tmp_path / "settings")
    (name,) = stages.resolve_configs(["tiny"], minimal(tiny), str(tmp_path), settings)
    output = training_folder(str(tmp_path), name, RUN)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("a file in place of the folder")
    stages.keep_logs(settings, name, str(tmp_path), RUN, FILES)
    assert "the logs of the job could not be saved: " in caplog.text
