"""The MLflow plugin of Kubeflow Pipelines: steps use its tree of runs, and no unrelated run."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.tracking.test_register import METRICS, enter, make_checkpoint
from tests.tracking.test_tracking import start
from vitdet.tracking import comparison
from vitdet.tracking.address import VARIABLES, tracking_uri

PROTOCOL = {"val_fingerprint": "0123456789abcdef", "evaluate_settings": "fedcba9876543210"}
VERDICT = {"passed": True, "reason": "better", "metrics": {"box_ap": 35.0}}
ROW = {"name": "tiny", **PROTOCOL, **VERDICT}


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store, store)


def plugin(
    client: MlflowClient, folder: Path, patch: pytest.MonkeyPatch, owner: str, loops: int = 1
) -> Run:
    """Create the runs and set the variables of the plugin; return the pipeline run's MLflow run."""
    place = client.create_experiment(f"admin {uuid.uuid4()}", (folder / "mlartifacts").as_uri())
    tags = {"kfp.pipeline_run_id": owner, "kfp.pipeline_run_url": "https://kf.example.com"}
    root = client.create_run(place, None, tags, "a pipeline run")
    inner = root
    for number in range(loops + 1):
        parent = {"mlflow.parentRunId": inner.info.run_id}
        inner = client.create_run(place, None, parent, f"loop or step {number}")
    patch.setenv("MLFLOW_RUN_ID", inner.info.run_id)
    patch.setenv("MLFLOW_EXPERIMENT_ID", place)
    return root


def pipeline(folder: Path, group: str) -> tuple[str, str]:
    """Run the steps that use MLflow, in experiment `group`; return the IDs of the parent run and the training run."""
    place = {"uri": "", "folder": folder, "experiment": group}
    parent = comparison.start_parent_run(group, ["tiny"], **place)
    tracker = start(folder, "", experiment=group, group=group)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    enter(folder, make_checkpoint(folder / "model.pt", 0, tracker.run_id))
    rows = [{**ROW, "run_id": tracker.run_id}]
    comparison.compare(group, rows, {}, {}, model_name="detector", **place)
    comparison.end_parent_run(group, "SUCCEEDED", **place)
    return parent, tracker.run_id


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("loops", [0, 1])
def test_the_plugin_and_the_steps_share_one_run_tree(
    client: MlflowClient, folder: Path, monkeypatch: pytest.MonkeyPatch, loops: int
) -> None:
    group = str(uuid.uuid4())
    root = plugin(client, folder, monkeypatch, group, loops)
    parent, training = pipeline(folder, group)
    assert parent == root.info.run_id
    run, child = client.get_run(parent), client.get_run(training)
    assert child.data.tags["mlflow.parentRunId"] == parent
    assert child.info.experiment_id == run.info.experiment_id == root.info.experiment_id
    assert child.data.metrics == {"loss": 1.0} | METRICS and child.info.status == "FINISHED"
    assert client.get_experiment_by_name(group) is None
    # the table is in the parent run, which keeps its name and is ended by the plugin
    assert run.data.tags["best"] == "tiny" and run.data.metrics == {"box_ap/tiny": 35.0}
    assert [file.path for file in client.list_artifacts(parent)] == ["comparison.md"]
    assert run.info.run_name == "a pipeline run" and run.info.status == "RUNNING"


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("left", ["another pipeline run", "a shell", "nothing"])
def test_an_unrelated_run_is_not_used(
    client: MlflowClient, folder: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    group = str(uuid.uuid4())
    foreign = plugin(client, folder, monkeypatch, "0" * 36)
    if left == "a shell":
        monkeypatch.setenv("MLFLOW_RUN_ID", foreign.info.run_id)
    elif left == "nothing":
        monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # a deleted run
    before = [run.to_dictionary() for run in client.search_runs([foreign.info.experiment_id])]
    parent, training = pipeline(folder, group)
    place = client.get_experiment_by_name(group).experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([place])}
    assert set(runs) == {parent, training} and runs[parent].info.status == "FINISHED"
    assert runs[training].data.tags["mlflow.parentRunId"] == parent
    after = [run.to_dictionary() for run in client.search_runs([foreign.info.experiment_id])]
    assert after == before


@pytest.mark.parametrize(
    ("plugin", "secret", "used"),
    [
        # without the plugin: a Secret with a password, and a Secret without a password
        ({}, ("http://ours", "me", "pass"), ("http://ours", "me", "pass")),
        ({}, ("http://ours", "", ""), ("http://ours", "", "")),
        # the plugin injects all variables, or only its password
        (("http://plugin", "p", "p"), ("http://ours", "me", "pass"), ("http://plugin", "p", "p")),
        (("", "p", "p"), ("http://ours", "me", "pass"), ("http://ours", "me", "pass")),
        (("", "p", "p"), ("http://ours", "", ""), ("http://ours", "", "")),
        # there is no Secret
        (("http://plugin", "", ""), ("", "", ""), ("http://plugin", "", "")),
    ],
)
def test_the_address_and_the_password_come_from_the_same_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plugin: tuple, secret: tuple, used: tuple
) -> None:
    for name, own, given in zip(VARIABLES, secret, plugin or ("", "", ""), strict=True):
        for variable, value in ((f"VITDET_{name}", own), (name, given)):
            monkeypatch.setenv(variable, value)
            if not value:
                monkeypatch.delenv(variable)
    assert tracking_uri("", tmp_path) == used[0]
    assert tuple(os.environ.get(name, "") for name in VARIABLES) == used
