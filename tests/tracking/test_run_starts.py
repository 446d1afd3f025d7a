"""Start and end of a tracked run: slow servers, kills, passwords, repeated values."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from tests.helpers.mlflow_answers import Server
from tests.tracking.test_tracking import WHAT, points, start
from vitdet.config import load_config
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.address import hide_credentials
from vitdet.tracking.journal import journals

Log, Patch = pytest.LogCaptureFixture, pytest.MonkeyPatch


def runs(uri: str, experiment: str) -> list:
    client = tracking.open_client(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


@pytest.mark.parametrize("status", ["KILLED", "FINISHED"])
def test_an_unresponsive_server_delays_neither_start_nor_end(
    tmp_path: Path, answers: Server, monkeypatch: Patch, caplog: Log, status: str
) -> None:
    """The server never responds while the tracker is open, and the tracker never waits."""
    monkeypatch.setattr(tracking, "START_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 600.0)
    answers.answering.clear()
    tracker = start(tmp_path, answers.uri)
    assert tracker.run_id.startswith("pending-")
    tracker.log({"loss": 1.0}, 1)
    tracker.close(status)
    assert tracker._thread.is_alive() and not answers.answering.is_set()
    (journal,) = journals(tmp_path)
    assert journal.waiting() and journal.state()[0]["end"] == status
    assert "run the same command again to send them" in caplog.text


@pytest.mark.parametrize("status", [None, "FAILED"])
def test_training_killed_before_its_first_state_continues_the_same_run(
    tmp_path: Path, store: str, status: str | None
) -> None:
    experiment = f"killed {status}"
    first = start(tmp_path, store, experiment=experiment, output="run")
    if status:
        first.close(status)
    first._closing.set()
    second = start(tmp_path, store, experiment=experiment, output="run")
    second.log({"loss": 1.0}, 1)
    second.close()
    (run,) = runs(store, experiment)
    assert run.info.run_id == second.run_id == first.run_id and run.info.status == "FINISHED"
    third = start(tmp_path, store, experiment=experiment, output="run")  # model.pt was removed
    third.close()
    assert len(runs(store, experiment)) == 2


@pytest.mark.parametrize("what", ["metrics", "settings"])
def test_a_killed_run_that_cannot_resume_is_ended(tmp_path: Path, store: str, what: str) -> None:
    experiment = f"ended {what}"
    first = start(tmp_path, store, experiment=experiment, output="run")
    if what == "metrics":
        first.log({"loss": 1.0}, 1)
    first._closing.set()  # killed
    params = {**WHAT["params"], **({"optim.lr": 2e-4} if what == "settings" else {})}
    other = start(tmp_path, store, experiment=experiment, output="other")
    second = start(tmp_path, store, experiment=experiment, output="run", params=params)
    for journal in journals(tmp_path):
        tracking.Shipper(journal, store).deliver(60)
    found = {run.info.run_id: run.info.status for run in runs(store, experiment)}
    assert found == {first.run_id: "KILLED", other.run_id: "RUNNING", second.run_id: "RUNNING"}
    second.close()
    other.close()


def test_a_reopened_finished_run_is_ended_and_not_resumed(tmp_path: Path, store: str) -> None:
    first = start(tmp_path, store)
    first.log({"loss": 1.0}, 1)
    first.close()
    ended = tracking.open_client(store).get_run(first.run_id).info.end_time
    # as if the request that ends the run was lost
    tracking.open_client(store).update_run(first.run_id, "RUNNING")
    for _ in range(2):
        start(tmp_path, store, run_id=first.run_id, resume_step=1).close()
        run = tracking.open_client(store).get_run(first.run_id)
        assert (run.info.status, run.info.end_time) == ("FINISHED", ended)
        assert "resumed_at_step" not in run.data.tags
    assert points(store, first.run_id, "loss") == [(1, 1.0)]


def test_a_run_killed_after_its_last_value_is_sent_and_ended(tmp_path: Path, store: str) -> None:
    first = start(tmp_path, "http://127.0.0.1:9")
    first.log({"box_ap": 40.0}, 10)
    first._closing.set()  # killed before the run ended
    first._thread.join()  # a killed process holds no lock
    again = start(tmp_path, store, run_id=first.run_id, resume_step=10)
    again.close()
    assert points(store, again.run_id, "box_ap") == [(10, 40.0)]
    assert tracking.open_client(store).get_run(again.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("value", [40.0, float("nan"), float("inf"), -float("inf")])
def test_a_delayed_value_is_not_sent_twice(
    tmp_path: Path, store: str, monkeypatch: Patch, value: float
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    values = {"box_ap": value, "mask_ap": 1.0}
    tracker = start(tmp_path, "http://127.0.0.1:9")
    tracker.log(values, 10)
    tracker.close()
    tracker._thread.join()  # the process ends
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 60.0)
    for _ in range(2):
        run_id = tracking.log_metrics(tracker.run_id, store, tmp_path, values, 10)
        assert len(points(store, run_id, "box_ap")) == len(points(store, run_id, "mask_ap")) == 1


@pytest.mark.parametrize(
    ("first", "second"), [(35.0, 36.0), (sys.float_info.max, -sys.float_info.max)]
)
def test_metrics_of_alternating_evaluations_are_not_lost(
    tmp_path: Path, store: str, first: float, second: float
) -> None:
    tracker = start(tmp_path, store)
    tracker.close()
    for value in (first, second, second, first):
        tracking.log_metrics(tracker.run_id, store, tmp_path, {"ap": value}, 100)
    history = tracking.open_client(store).get_metric_history(tracker.run_id, "ap")
    history.sort(key=lambda point: point.timestamp)
    assert [point.value for point in history] == [first, second, first]


@pytest.mark.parametrize(
    "uri", ["http://alice:s3cret@127.0.0.1:9", "http://alice:s3c@ret@127.0.0.1:9/base"]
)
def test_a_password_in_the_address_is_never_shown(
    tmp_path: Path, caplog: Log, monkeypatch: Patch, uri: str
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr("vitdet.tracking.client.TRIES", 1)
    tracker = start(tmp_path, uri, params={"tracking.uri": uri, "lr": 1.0})
    tracker.close()
    start(tmp_path, uri, run_id=tracker.run_id, params={"tracking.uri": "", "lr": 1.0}).close()
    with pytest.raises(ConnectionError) as error:
        tracking.connect(uri, tmp_path)
    shown = [caplog.text, str(error.value), *(p.read_text() for p in tmp_path.rglob("*.jsonl"))]
    assert "s3c" not in "".join(shown)
    assert "http://***@127.0.0.1:9" in caplog.text and "http://***@127.0.0.1" in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:////data/a:1/a@b/mlflow.db", ""),
        ("http://[::1]:5000/a@b", ""),
        ("https://host/a@b?page=2&tokenizer", ""),
        ("s3://bucket/a@b", ""),
        ("http://host:x: no answer (a@b.c)", ""),
        ("'http://host:x', 'a@b.c'", ""),
        ("postgresql://h/d?sslmode=require&sslrootcert=ca.pem&sslkey=/a.key&ssl_key=b", ""),
        ("postgresql+psycopg2://u:p%40@h/d, x", "postgresql+psycopg2://***@h/d, x"),
        ("postgresql://u:se/cret@h/db", "postgresql://***@h/db"),
        ("postgresql://u:12/cret@h/db", "postgresql://***@h/db"),
        ("'http://u:se/cr'et@h:1/a' a@b", "'http://***@h:1/a' a@b"),
        ("x://h?user=u&password=secret&b=1 c", "x://h?user=u&password=***&b=1 c"),
        ("http://u:p@h/?access_key=a&API-Key=b", "http://***@h/?access_key=***&API-Key=***"),
        ("http://***@h/?token=***", "http://***@h/?token=***"),
    ],
)
def test_only_credentials_are_hidden(text: str, shown: str) -> None:
    assert hide_credentials(text) == (shown or text)


@pytest.mark.parametrize(
    "setting",
    [
        *(f"tracking.model_name={name}" for name in ("a/b", "a:b", "it's", 'a"b', "..", "x" * 300)),
        *("tracking.model_name=", "tracking.experiment=", f"tracking.experiment={'x' * 600}"),
    ],
)
def test_names_that_mlflow_rejects_are_rejected_in_the_config(setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{key} must have 1 to 256 characters.*got ") as error:
        load_config("tiny", [setting])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vitdet", "Größe 1.2_b-c", "a.b", ".a", "ViT (B) #1, 50%"])
def test_names_that_mlflow_accepts_are_accepted(name: str) -> None:
    from mlflow.utils.validation import _validate_experiment_name, _validate_model_name

    _validate_model_name(name)
    _validate_experiment_name(name)
    config = load_config("tiny", [f"tracking.model_name={name}", f"tracking.experiment={name}"])
    assert config.tracking.model_name == config.tracking.experiment == name


@pytest.mark.parametrize("alias", ["", "LATEST", "v1", "a/b", "x" * 256])
def test_aliases_that_mlflow_rejects_are_rejected_at_the_start(
    vitdet: object, trained: Path, alias: str
) -> None:
    code, _, err = vitdet("register", trained / "model.pt", "--alias", alias)
    assert code == 1 and err.startswith("vitdet: the alias must have 1 to 255 ")
    assert len(err.splitlines()) == 1
