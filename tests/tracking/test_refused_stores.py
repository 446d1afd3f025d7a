"""Permanent MLflow errors are raised in one line before the first step; transient errors are warnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow.exceptions import RestException

from tests.helpers.mlflow_answers import Server
from tests.tracking.test_register import client_of, enter, make_checkpoint
from tests.tracking.test_tracking import start
from vitdet.cli import main
from vitdet.config import load_config
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.client import first_line
from vitdet.tracking.comparison import start_parent_run
from vitdet.tracking.journal import find
from vitdet.tracking.mlflow import connect
from vitdet.tracking.runs import log_evaluation

ADDRESSES = ["localhost:5000", "mlflow:5000/", "10.0.0.7:5000/path", "[::1]:80"]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Return a SQLite store with the deleted experiment `test`, which has one run."""
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    tracker = start(tmp_path / "before", uri)
    tracker.close()
    client = tracking.open_client(uri)
    client.delete_experiment(client.get_experiment_by_name("test").experiment_id)
    return uri


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refused(act: Callable[[], object]) -> str:
    """Return the error's message; assert that it has one line and is not a KeyError."""
    with pytest.raises((ValueError, OSError, LookupError)) as caught:
        act()
    assert "\n" not in str(caught.value) and not isinstance(caught.value, KeyError)
    return str(caught.value)


def test_the_error_of_a_deleted_experiment_states_how_to_restore_it(
    tmp_path: Path, store: str
) -> None:
    advice = "'test' was deleted; restore it with `mlflow experiments restore -x 1`, or set tracking.experiment to"
    folder = tmp_path / "a"
    assert advice in refused(lambda: start(folder, store, output="a"))
    assert not files(folder)  # nothing for later runs to send
    place = {"uri": store, "folder": folder, "experiment": "test"}
    assert advice in refused(lambda: start_parent_run("group", ["a"], **place))
    tracking.open_client(store).restore_experiment("1")
    start(folder, store, output="a").close()
    assert len(tracking.open_client(store).search_runs(["1"])) == 2


def test_a_resumed_training_run_is_not_stopped_by_a_deleted_experiment(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = tracking.open_client(store)
    (run,) = client.search_runs(["1"], run_view_type=2)  # only deleted runs
    folder = tmp_path / "before"
    tracker = start(folder, store, run_id=run.info.run_id, resume_step=4)
    tracker.log({"loss": 1.0}, 5)
    tracker.close("KILLED")
    assert "restore it with `mlflow experiments restore -x 1`" in caplog.text
    assert find(folder, run.info.run_id).waiting()


@pytest.mark.parametrize("uri", ["foo://x", "file:///FOLDER/m", "/FOLDER/m", "s3://a/b", "sqlite:"])
def test_an_unsupported_store_is_rejected(tmp_path: Path, uri: str) -> None:
    uri = uri.replace("/FOLDER", str(tmp_path / "m"))
    folder = tmp_path / "a"
    said = refused(lambda: start(folder, uri, output="a"))
    assert said.startswith(f"{uri}: ") and "set tracking.uri or MLFLOW_TRACKING_URI" in said
    assert said == refused(lambda: tracking.connect(uri, folder))
    assert "no valid response" not in said and not files(tmp_path)


def test_a_file_that_is_not_a_database_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("notes " * 1000)
    assert "not a database" in refused(lambda: start(tmp_path / "a", f"sqlite:///{path}"))
    assert "not a database" in refused(lambda: tracking.connect("", tmp_path))


@pytest.mark.parametrize(
    "uri",
    [
        *ADDRESSES,
        *("http://", "https:///a", "http://h:99999", "http://h:a"),
        "http://h:1/#/experiments/1",  # copied from the UI
    ],
)
def test_wrong_uris_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    assert uri in refused(lambda: tracking.tracking_uri(uri, tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for act in (
        lambda: start(tmp_path / "a", ""),
        lambda: tracking.connect("", tmp_path),
        lambda: tracking.log_metrics("1" * 32, "", tmp_path, {"a": 1.0}, 1),
    ):
        assert refused(act).startswith("MLFLOW_TRACKING_URI")
    assert not list(tmp_path.iterdir())


def test_the_config_rejects_an_address_without_a_scheme() -> None:
    for uri in (*ADDRESSES, "me:secret@localhost:5000"):
        said = refused(lambda uri=uri: load_config("tiny", [f"tracking.uri={uri}"]))
        shown = uri.replace("me:secret", "***")
        assert said.startswith("tracking.uri must begin with a scheme, as in http://HOST:PORT or ")
        assert said.endswith(f", got {shown}")
    for uri in ("http://localhost:5000", "sqlite:///a:5000/b", "postgresql://h:5/d", "databricks"):
        assert load_config("tiny", [f"tracking.uri={uri}"]).tracking.uri == uri


def test_a_response_without_json_is_not_a_rejection(tmp_path: Path, answers: Server) -> None:
    """A proxy of an unavailable server may send any response."""
    answers.always = 404, b"<html>Not found</html>"
    tracker = start(tmp_path / "a", answers.uri)
    tracker.log({"loss": 1.0}, 1)
    tracker.close("KILLED")
    assert tracker.run_id.startswith("pending-")


def copied(folder: Path, run_id: str) -> Path:
    """Return the model.pt of a run on another machine."""
    path = make_checkpoint(folder / "model.pt", 0, run_id)
    torch.save(torch.load(path) | {"metrics": {}}, path)
    return path


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("run_id", ["1" * 32, "pending-" + "1" * 32, "not an id!"])
def test_a_copied_checkpoint_is_registered_without_its_run(tmp_path: Path, run_id: str) -> None:
    path = copied(tmp_path, run_id)
    for _ in range(2):
        assert enter(tmp_path, path) == ("detector", "1")
    version = client_of(tmp_path).get_model_version("detector", "1")
    assert not version.run_id and version.tags["training_run"] == run_id
    assert not (tmp_path / "journal").exists()


def test_the_evaluation_of_a_copied_checkpoint_is_not_tracked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(tmp_path, "1" * 32)
    assert log_evaluation(path, {"box_ap": 1.0}, None, tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    start(tmp_path, "").close()  # a store with other runs
    before = sorted(tmp_path.rglob("*"))
    assert log_evaluation(path, {"box_ap": 1.0}, None, tmp_path) is None
    assert sorted(tmp_path.rglob("*")) == before
    assert "nothing is logged" in caplog.text and "they wait in" not in caplog.text


def test_an_error_of_mlflow_is_printed_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(_: object) -> int:
        raise RestException({"message": " first http://a:b@host\nsecond", "error_code": "ABORTED"})

    monkeypatch.setattr("vitdet.cli.config.run_config", failing)
    with pytest.raises(SystemExit) as ended:
        main(["config", "tiny"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "vitdet: ABORTED:  first http://***@host\n"


def test_an_evaluation_is_not_lost_because_of_an_invalid_address(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(tmp_path, "1" * 32)
    stored = torch.load(path)
    stored["config"]["tracking"]["uri"] = "localhost:5000"
    torch.save(stored, path)
    assert log_evaluation(path, {"box_ap": 1.0}, None, tmp_path) is None
    assert "got localhost:5000: the metrics are not logged" in caplog.text


def test_a_failed_registration_prints_one_line_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = copied(tmp_path, "1" * 32)
    (tmp_path / "figures.json").write_text(json.dumps({"box_ap": 1.0}))
    monkeypatch.chdir(tmp_path)
    for uri in ("foo://x", "localhost:5000", "file:m"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(SystemExit) as ended:
            main(["register", str(path), "--metrics", "figures.json"])
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 1 and len(said) == 1 and said[0].startswith("vitdet: "), said
    assert sorted(child.name for child in tmp_path.iterdir()) == ["figures.json", "model.pt"]


def test_an_error_of_the_database_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow creates the folder of this URI
    path = tmp_path / "mlflow.db"
    experiment = connect("", tmp_path).create_experiment("e")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{path}?mode=ro&uri=true")
    reason = r": \(sqlite3.OperationalError\) attempt to write a readonly database$"
    with pytest.raises(ConnectionError, match=reason):
        connect("", tmp_path).create_run(experiment)
    assert "Traceback" not in capsys.readouterr().err


def test_the_cause_of_a_failed_connection_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Server() as absent:
        uri = absent.uri
    start(tmp_path, uri).close()  # no server listens there
    assert "Connection refused" in caplog.text


def test_a_long_message_keeps_its_end_and_hides_credentials() -> None:
    said = first_line(f"GET http://u:{'s3cret' * 50}@h/a failed{' again' * 100}: refused\nmore")
    assert len(said) <= 300 and said.startswith("GET http://***@h/a") and "s3cret" not in said
    assert said.endswith("again: refused")
