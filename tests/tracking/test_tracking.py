"""Tracking with real MLflow stores: a SQLite file, and a server that is killed with SIGKILL."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.conftest import ROOT
from tests.helpers.mlflow_server import Server
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.journal import find
from vitdet.tracking.naming import git_revision

WHAT = {
    "experiment": "test",
    "name": "run",
    "params": {"optim.lr": 1e-4, "data.scale_range": "[0.1, 2.0]"},
    "tags": {"recipe": "tiny"},
    "dataset": {"name": "tiny", "digest": "0123456789ab" * 5, "source": "data/tiny"},
}


@pytest.fixture(scope="module")
def server(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a real MLflow server, for the slow tests."""
    server = Server(store, tmp_path_factory.mktemp("artifacts"))
    server.start()
    yield server
    server.kill()


def start(
    folder: Path, uri: str, run_id: str | None = None, resume_step: int = 0, **more: object
) -> tracking.Tracker:
    return tracking.start_run(uri, folder, WHAT | more, run_id, resume_step)


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    history = tracking.open_client(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in history)


def log(tracker: tracking.Tracker, steps: range) -> None:
    for step in steps:
        tracker.log({"loss": step / 2}, step)


def once(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 2) for step in steps]


def test_a_run_contains_everything_logged(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    picture = tmp_path / "found.png"
    picture.write_bytes(b"first")
    tracker = start(tmp_path, "http://127.0.0.1:9")  # the environment has precedence
    for step in range(0, 60, 20):
        tracker.log({"loss": step / 2, "lr": 0.1}, step)
    tracker.artifact(picture, "predictions")
    picture.write_bytes(b"changed after it was logged")
    tracker.close()
    client = tracking.open_client(store)
    run = client.get_run(tracker.run_id)
    assert run.data.params == {"optim.lr": "0.0001", "data.scale_range": "[0.1, 2.0]"}
    assert run.data.tags["recipe"] == "tiny" and run.data.tags["mlflow.runName"] == "run"
    assert run.inputs.dataset_inputs[0].dataset.digest == ("0123456789ab" * 5)[:36]
    assert run.info.status == "FINISHED"
    assert points(store, tracker.run_id, "loss") == [(0, 0.0), (20, 10.0), (40, 20.0)]
    file = client.download_artifacts(tracker.run_id, "predictions/found.png")
    assert Path(file).read_bytes() == b"first"
    assert not list(tmp_path.glob("journal/*/*"))  # the pending copy is deleted


def test_the_default_store_is_a_file_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.tracking_uri("", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.tracking_uri("http://a", tmp_path) == "http://a"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    assert tracking.tracking_uri("http://a", tmp_path) == "http://b"


@pytest.mark.parametrize("journal_lost", [False, True])
def test_a_resumed_run_logs_each_step_once(tmp_path: Path, store: str, journal_lost: bool) -> None:
    first = start(tmp_path / "a", store)
    log(first, range(158))  # not closed, which simulates a kill
    while first._journal.waiting():
        time.sleep(0.01)
    folder = tmp_path / ("b" if journal_lost else "a")
    second = start(folder, store, run_id=first.run_id, resume_step=150)
    for step in range(150, 200):
        second.log({"loss": step / 2, "new": 1.0}, step)
    second.close()
    first._closing.set()
    assert second.run_id == first.run_id
    assert points(store, first.run_id, "loss") == once(range(200))
    assert len(points(store, first.run_id, "new")) == 50
    assert tracking.open_client(store).get_run(first.run_id).data.tags["resumed_at_step"] == "150"


def test_a_resumed_run_lists_the_changed_settings(tmp_path: Path, store: str) -> None:
    """MLflow rejects a changed parameter, so a tag lists it."""
    run_id = None
    for lr, expected in ((1e-4, None), (2e-4, "optim.lr: 0.0002, not 0.0001"), (1e-4, "")):
        params = {**WHAT["params"], "optim.lr": lr}
        tracker = start(tmp_path, store, run_id=run_id, params=params)
        tracker.close()
        run_id = tracker.run_id
        data = tracking.open_client(store).get_run(run_id).data
        assert data.tags.get("resumed_settings") == expected
        assert data.params["optim.lr"] == "0.0001"


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path: Path, store: str) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vitdet.tracking import mlflow as tracking\n"
        "tracking.SHIP_SECONDS = 0.05\n"
        f"t = tracking.start_run({store!r}, Path({str(tmp_path)!r}), {WHAT!r})\n"
        "print(t.run_id, flush=True)\n"
        "for step in range(10**6):\n"
        "    t.log({'loss': step / 2}, step); print(step, flush=True); time.sleep(0.002)"
    )
    words = [sys.executable, "-c", code]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    run_id = child.stdout.readline().strip()
    while int(child.stdout.readline()) < 150:
        pass
    child.kill()
    last = int(([150] + [int(line) for line in child.stdout.read().split()])[-1])
    child.wait()
    tracker = start(tmp_path, store, run_id=run_id, resume_step=100)
    log(tracker, range(100, last + 50))
    tracker.close()
    assert points(store, run_id, "loss") == once(range(last + 50))


def test_lost_responses_duplicate_nothing(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server processes all requests, and every second response is lost."""
    from mlflow import MlflowException

    class Lossy:
        uri = store

        def __init__(self) -> None:
            self.calls: dict[str, int] = {}

        def __getattr__(self, name: str) -> object:
            def call(*args: object, **kwargs: object) -> object:
                result = getattr(client, name)(*args, **kwargs)
                self.calls[name] = self.calls.get(name, 0) + 1
                queries = ("get_run", "search_runs", "get_metric_history")
                if self.calls[name] % 2 and name not in queries:
                    raise MlflowException("connection reset")
                return result

            return call

    client, lossy = tracking.open_client(store), Lossy()
    monkeypatch.setattr("vitdet.tracking.shipper.open_client", lambda uri: lossy)
    tracker = start(tmp_path, store, experiment="lossy")
    assert tracker.run_id.startswith("pending-")
    for step in range(100):
        tracker.log({"loss": step / 2}, step)
        time.sleep(0.01)
    tracker.close()
    monkeypatch.undo()
    (run,) = client.search_runs([client.get_experiment_by_name("lossy").experiment_id])
    assert run.info.run_id == tracker.run_id and run.info.status == "FINISHED"
    assert points(store, tracker.run_id, "loss") == once(range(100))


def test_a_rejected_metric_name_does_not_affect_other_metrics(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path, store)
    for step in range(5):
        tracker.log({"loss": step / 2, "ap (%)": 1.0, "nan": float("nan")}, step)
    tracker.close()
    assert points(store, tracker.run_id, "loss") == once(range(5))
    assert len(points(store, tracker.run_id, "nan")) == 5
    assert sum("rejects ap (%)" in record.message for record in caplog.records) == 1


def test_evaluation_extends_the_run_without_duplicates(tmp_path: Path, store: str) -> None:
    tracker = start(tmp_path, store)
    tracker.close()
    for value in (35.0, 35.0, 36.0):
        values = {"final/box_ap": value}
        run_id = tracking.log_metrics(tracker.run_id, store, tmp_path, values, 100)
        assert run_id == tracker.run_id
    assert points(store, tracker.run_id, "final/box_ap") == [(100, 35.0), (100, 36.0)]
    assert tracking.open_client(store).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_that_the_server_lost_is_recreated(tmp_path: Path, store: str) -> None:
    tracker = start(tmp_path, store)
    tracker.log({"loss": 0.0}, 0)
    tracker.close()
    deleted = tracker.run_id
    tracking.open_client(store).delete_run(deleted)
    again = start(tmp_path, store, run_id=deleted, resume_step=1)
    again.log({"loss": 0.5}, 1)
    again.close()
    assert again.run_id != deleted
    assert points(store, again.run_id, "loss") == once(range(2))
    # earlier checkpoints, such as best.pt, contain the ID of the deleted run
    assert tracking.log_metrics(deleted, store, tmp_path, {"box_ap": 1.0}, 1) == again.run_id
    assert tracking.connect_run(deleted, store, tmp_path)[1] == again.run_id


def test_a_run_that_is_deleted_during_training_is_recreated(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path, store)
    deleted = tracker.run_id
    tracking.open_client(store).delete_run(deleted)
    log(tracker, range(3))
    tracker.close()
    assert tracker.run_id != deleted and "rejects" not in caplog.text
    assert points(store, tracker.run_id, "loss") == once(range(3))


def test_connect_names_the_missing_server_or_run(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdet.tracking.client.TRIES", 2)
    with pytest.raises(ConnectionError, match="no valid response from MLflow"):
        tracking.connect_run("1" * 32, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(LookupError, match="has no run 1+, and"):
        tracking.connect_run("1" * 32, store, tmp_path)


def test_the_git_revision_is_read_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITDET_REVISION", raising=False)
    assert git_revision() is None
    monkeypatch.setenv("VITDET_REVISION", "1" * 40)  # the revision of the image
    assert git_revision() == "1" * 40
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = git_revision()
    (tmp_path / "file").write_text("b")
    assert len(clean) == 40 and clean != "1" * 40 and git_revision() == clean + "-dirty"


@pytest.mark.slow
def test_a_killed_server_loses_no_point_and_delays_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "found.png"
    picture.write_bytes(b"picture")
    server.wait()
    tracker = start(tmp_path, server.uri)
    assert not tracker.run_id.startswith("pending-")
    took, sent = [], []
    send = requests.Session.send

    def recorded(*args: object, **kwargs: object) -> requests.Response:
        sent.append(threading.current_thread())
        return send(*args, **kwargs)

    monkeypatch.setattr(requests.Session, "send", recorded)

    def timed(steps: range) -> None:
        before = sent.count(threading.current_thread())
        for step in steps:
            begun = time.perf_counter()
            tracker.log({"loss": step / 2, "lr": 0.1}, step)
            took.append(time.perf_counter() - begun)
            time.sleep(0.002)
        assert sent.count(threading.current_thread()) == before  # no request by this thread

    timed(range(300))
    server.kill()  # during uploads
    timed(range(300, 600))
    tracker.artifact(picture, "predictions")
    late = start(tmp_path / "late", server.uri)  # a run that starts without a server
    pending = late.run_id
    assert pending.startswith("pending-")
    log(late, range(50))
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 2.5)
    late.close()  # and ends before the server starts
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 30.0)

    server.start()
    timed(range(600, 900))
    server.wait()
    tracker.close()
    assert points(server.uri, tracker.run_id, "loss") == once(range(900))
    client = tracking.open_client(server.uri)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    file = client.download_artifacts(tracker.run_id, "predictions/found.png")
    assert Path(file).read_bytes() == b"picture"
    assert sent  # the uploading thread sent requests
    print(f"a call of log: {1e6 * statistics.median(took):.0f} us in the median")

    resumed = start(tmp_path / "late", server.uri, run_id=pending, resume_step=40)
    log(resumed, range(40, 60))
    resumed.close()
    assert points(server.uri, resumed.run_id, "loss") == once(range(60))
    assert find(tmp_path / "late", pending).run_id == resumed.run_id
