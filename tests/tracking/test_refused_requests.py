"""Servers that reject requests, are not MLflow, or do not accept artifacts: behavior of training runs and commands."""

from __future__ import annotations

import io
import json
import logging
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests
import sqlalchemy
import urllib3
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.helpers.mlflow_answers import Server
from tests.tracking.test_tracking import points, start
from vitdet.cli import main
from vitdet.config import load_config, save_config, to_dict
from vitdet.stages.workspace import result
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.address import HidingFilter
from vitdet.tracking.client import Client, RefusedError, repeating
from vitdet.tracking.journal import find, journals

Log, Patch = pytest.LogCaptureFixture, pytest.MonkeyPatch


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "found.png"
    path.write_bytes(b"picture")
    return path


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdet.tracking.client.TRIES", 1)


DENIED = [
    (401, b"You are not authenticated."),
    (401, b'{"detail": "Unauthorized"}'),
    (403, b"<html>Forbidden</html>"),
    (403, b'{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'),
]


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        *((*case, r"denies access .*set MLFLOW_TRACKING_USERNAME and") for case in DENIED),
        (200, b"{}", "is not an MLflow server"),  # another service responds
    ],
)
def test_a_training_run_rejected_by_the_server_ends_before_its_first_step(
    tmp_path: Path, answers: Server, code: int, body: bytes, said: str
) -> None:
    answers.always = code, body
    with pytest.raises(ValueError, match=said):
        start(tmp_path, answers.uri)
    assert not journals(tmp_path)
    with pytest.raises(ValueError, match=said):
        tracking.connect(answers.uri, tmp_path)


def test_a_later_loss_of_access_is_logged_and_nothing_is_lost(
    tmp_path: Path, answers: Server, caplog: pytest.LogCaptureFixture
) -> None:
    answers.always = 401, b"no"
    tracker = start(tmp_path, answers.uri, run_id="1" * 32, resume_step=5)
    tracker.log({"loss": 1.0}, 6)
    tracker.close()
    assert "the run's records are rejected" in caplog.text and "cannot be sent" not in caplog.text
    (journal,) = journals(tmp_path)
    assert journal.waiting() and journal.last_points() == {"loss": (6, 1.0)}


def test_a_failed_artifact_upload_does_not_delay_metrics(
    tmp_path: Path, store: str, picture: Path, monkeypatch: Patch, caplog: Log
) -> None:
    """The artifact is kept, and uploaded by the next command that uses the run."""
    upload, full = MlflowClient.log_artifact, MlflowException("the artifact store is full")
    monkeypatch.setattr(MlflowClient, "log_artifact", Mock(side_effect=full))
    tracker = start(tmp_path, store)
    tracker.artifact(picture, "predictions")
    tracker.log({"loss": 1.0}, 1)
    tracker.artifact(picture, "more")
    tracker.log({"loss": 2.0}, 2)
    tracker.close()
    client = tracking.open_client(store)
    assert points(store, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert caplog.text.count("found.png cannot be uploaded") == 1 and "store is full" in caplog.text
    assert len(find(tmp_path, tracker.run_id).entries()) == 2

    monkeypatch.setattr(MlflowClient, "log_artifact", upload)
    tracking.log_metrics(tracker.run_id, store, tmp_path, {"box_ap": 1.0}, 2)
    for folder in ("predictions", "more"):
        file = client.download_artifacts(tracker.run_id, f"{folder}/found.png")
        assert Path(file).read_bytes() == b"picture"
    assert not find(tmp_path, tracker.run_id).entries()
    assert points(store, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_hanging_artifact_store_delays_nothing(
    tmp_path: Path, store: str, picture: Path, monkeypatch: Patch, caplog: Log
) -> None:
    hanging, answered = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hanging.set()
        answered.wait()

    monkeypatch.setattr(MlflowClient, "log_artifact", hang)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.3)
    tracker = start(tmp_path, store)
    tracker.artifact(picture, "predictions")
    tracker.artifact(picture, "more")
    assert hanging.wait(60)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    tracking.log_metrics(tracker.run_id, store, tmp_path, {"box_ap": 1.0}, 2)
    _, run_id = tracking.connect_run(tracker.run_id, store, tmp_path)
    assert points(store, run_id, "loss") == [(1, 1.0)]
    assert points(store, run_id, "box_ap") == [(2, 1.0)]
    assert tracking.open_client(store).get_run(run_id).info.status == "FINISHED"
    assert len(find(tmp_path, run_id).entries()) == 2
    assert "files were not uploaded within 0.3 s" in caplog.text
    answered.set()
    for thread in threading.enumerate():  # otherwise, the thread uploads in the next test
        if thread.name == "uploads":
            thread.join(60)


def test_files_added_during_an_upload_are_uploaded(
    tmp_path: Path, store: str, picture: Path, monkeypatch: Patch
) -> None:
    uploading, added, taken = threading.Event(), threading.Event(), []

    def upload(self: MlflowClient, run_id: str, path: str, folder: str | None = None) -> None:
        uploading.set()
        assert added.wait(60)
        taken.append(folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", upload)
    tracker = start(tmp_path, store)
    tracker.artifact(picture, "first")
    assert uploading.wait(60)
    tracker.artifact(picture, "second")
    threading.Timer(0.5, added.set).start()
    tracker.close()
    assert taken == ["first", "second"] and not find(tmp_path, tracker.run_id).entries()


def test_a_rejected_file_does_not_delay_other_files(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command uploads files until one fails; the next command starts with the other files."""
    taken: list[str] = []

    def refuse(self: MlflowClient, run_id: str, path: str, folder: str | None = None) -> None:
        if folder == "bad":
            raise MlflowException("no such folder")
        taken.append(str(folder))

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    tracker = start(tmp_path, store)
    tracker.close()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    files = {tmp_path / "a": "bad", tmp_path / "b": "good"}
    tracking.log_metrics(tracker.run_id, store, tmp_path, {}, 1, files)
    assert not taken
    tracking.log_metrics(tracker.run_id, store, tmp_path, {}, 1)
    assert taken == ["good"]
    (entry,) = find(tmp_path, tracker.run_id).entries()
    assert [child.name for child in entry.iterdir()] == ["bad"]


def test_runs_of_another_server_are_not_sent_to_the_current_server(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "STOP_SECONDS", 0.3)
    with Server() as absent:
        away = absent.uri
    other = start(tmp_path, away, experiment="elsewhere")  # no server listens there
    other.log({"loss": 1.0}, 1)
    other.close()
    here = start(tmp_path, store)
    before = start(tmp_path, store)  # same server: sent by the folder's next run
    before._closing.set()
    before._thread.join()
    before.log({"loss": 3.0}, 3)
    here.abandon()
    last = start(tmp_path, store)
    for _ in range(100):
        if not find(tmp_path, before.run_id).waiting():
            break
        last._closing.wait(0.1)
    last.close()
    assert points(store, before.run_id, "loss") == [(3, 3.0)]
    assert find(tmp_path, other.run_id).waiting()
    assert tracking.open_client(store).get_experiment_by_name("elsewhere") is None


def test_the_command_line_shows_no_password(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    uri = "tracking.uri=http://alice:s3cret@127.0.0.1:9"
    with pytest.raises(SystemExit, match="1"):
        main(["train", "tiny", "--set", uri, "--output", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert "s3cret" not in out + err and "tracking.uri must not contain" in err


@pytest.mark.parametrize(
    "uri",
    [
        "http://alice:s3cret@mlflow:5000",
        "https://s3cret@mlflow",
        "postgresql://u:a/s3cret@h/d",
        "http://u:a/s3@s3cret@h",
        "mysql://h/d?ssl_key=k&auth_token=s3cret",
        "mssql+pyodbc:///?odbc_connect=UID%3Dsa%3BPWD%3Ds3cret%3BDatabase%3Dd",
        "https://mlflow/?key=s3cret",
    ],
)
def test_a_password_is_not_stored_in_a_config(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not contain credentials") as error:
        load_config("tiny", [f"tracking.uri={uri}"])
    assert "s3cret" not in str(error.value)
    config = load_config("tiny", ["train.keep_best=box_ap"])
    config = replace(config, tracking=replace(config.tracking, uri=uri))
    save_config(config, tmp_path / "config.yaml")  # like an earlier version
    assert result(tmp_path) == tmp_path / "best.pt"
    allowed = load_config("tiny", ["tracking.uri=sqlite:////data/a@b/mlflow.db"])
    assert "a@b" in json.dumps(to_dict(allowed))


FOREIGN = [
    requests.ConnectionError("HTTPConnectionPool: http://u:s3cret@h:1/x\nrefused"),
    requests.exceptions.ChunkedEncodingError("http://u:s3cret@h:1/x\nbroken"),
    urllib3.exceptions.ReadTimeoutError(None, "http://u:s3cret@h:1/x", "timed out\nmore"),
    sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("postgresql://u:s3cret@h/d\nx")),
    MlflowException("http://u:s3cret@h:1/x\nmore"),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_library_errors_are_raised_in_one_line_without_the_password(error: Exception) -> None:
    failing, uri = Mock(get_run=Mock(side_effect=error)), "http://u:s3cret@h:1"
    with pytest.raises(ConnectionError) as caught:
        Client(failing, uri).get_run()  # a traceback contains this line
    said = str(caught.value)
    assert said.startswith("http://***@h:1: ") and "\n" not in said and "s3cret" not in said
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_status_403_of_an_artifact_store_is_permanent() -> None:
    answer = requests.Response()
    answer.status_code = 403
    error = requests.HTTPError("403 Client Error: Forbidden", response=answer)
    with pytest.raises(RefusedError, match="denies access"), repeating("http://h:1"):
        raise error


def test_logged_messages_and_tracebacks_have_no_password() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(HidingFilter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("http://u:s3cret@h:1/x: no answer")
    except ValueError:
        logger.exception("%s failed", "http://u:s3cret@h:1")
    text = stream.getvalue()
    assert text.count("http://***@h:1") == 3 and "Traceback" in text and "s3cret" not in text
