"""Requests to MLflow while it restarts, is overloaded, or refuses for good."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from urllib3.util import Retry

from tests.conftest import ROOT
from vitdet.tracking import client as requests
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.comparison import start_parent_run

RUN = {"run": {"info": {"run_id": "1" * 32, "status": "RUNNING"}, "data": {}}}
EXPERIMENT = {"experiment_id": "7", "name": "e", "lifecycle_stage": "active"}
MISSING = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}, {})


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of MLflow's settings are set, as by the developer or an earlier test; afterwards they are as before."""
    names = (*requests.DEFAULTS, requests.FACTOR)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    monkeypatch.setattr(requests, "USER_SETTINGS", {})
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


class Server(http.server.ThreadingHTTPServer):
    """MLflow's answers to a few requests; `plan`: what comes first, by the end of the path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: dict[str, list] = {}
        self.asked: list[str] = []
        self.runs: list[dict] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:  # noqa: N802 - named by http.server
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
        self.server.asked.append(path)
        if path == "runs/create":
            self.server.runs.append(RUN["run"])
        plan = self.server.plan.get(path)
        answer = plan.pop(0) if plan else None
        if answer == "cut":
            self.connection.close()
            return
        bodies = {
            "experiments/search": {"experiments": [EXPERIMENT]},
            "experiments/get-by-name": {"experiment": EXPERIMENT},
            "runs/search": {"runs": self.server.runs},
            "runs/create": RUN,
            "runs/log-batch": {},
            "metrics/get-history": {"metrics": []},
        }
        code, body, headers = answer or (200, bodies[path], {})
        content = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between this thread's requests, which are not waited for.

    A tracker of an earlier test may still look for its server in another thread.
    """
    found: list[float] = []
    sleep, own = time.sleep, threading.current_thread()

    def record(seconds: float) -> None:
        if threading.current_thread() is own:
            found.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr("urllib3.util.retry.time.sleep", record)
    return found


def parent(server: Server, folder: Path) -> str:
    return start_parent_run("g", ["a"], uri=server.uri, folder=folder, experiment="e")


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "more tries" in text]


@pytest.mark.parametrize(
    "answer", ["cut", (503, {}, {}), (500, {}, {}), (502, {}, {}), (429, {}, {}), (408, {}, {})]
)
def test_what_passes_is_tried_again_and_each_wait_is_logged(
    tmp_path: Path,
    server: Server,
    slept: list[float],
    caplog: pytest.LogCaptureFixture,
    answer: object,
) -> None:
    server.plan["runs/search"] = [answer] * 3
    assert parent(server, tmp_path) == "1" * 32
    assert server.asked.count("runs/search") == 4 and server.asked.count("runs/create") == 1
    assert len(waits(caplog)) == 3 and "6 more tries" in waits(caplog)[0]
    assert len(slept) == 2  # the first is tried again at once


def test_the_server_says_how_long_to_wait(
    tmp_path: Path, server: Server, slept: list[float]
) -> None:
    server.plan["runs/search"] = [(429, {}, {"Retry-After": 17})]
    parent(server, tmp_path)
    assert slept == [17]


def test_a_server_that_restarts_is_waited_for(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused connections until the second wait."""
    port, uri = server.server_port, server.uri
    server.shutdown()
    server.server_close()
    again: list[Server] = []

    def restart(_: float) -> None:
        if not again:
            monkeypatch.setattr(Server, "__init__", lambda self: None)
            one = Server()
            one.plan, one.asked, one.runs = {}, [], []
            http.server.ThreadingHTTPServer.__init__(one, ("127.0.0.1", port), Handler)
            threading.Thread(target=one.serve_forever, daemon=True).start()
            again.append(one)

    monkeypatch.setattr("urllib3.util.retry.time.sleep", restart)
    assert start_parent_run("g", ["a"], uri=uri, folder=tmp_path, experiment="e") == "1" * 32
    again[0].shutdown()
    again[0].server_close()


def test_a_run_whose_answer_was_lost_is_found_and_not_created_again(
    tmp_path: Path, server: Server, slept: list[float]
) -> None:
    server.plan["runs/create"] = ["cut"]
    assert parent(server, tmp_path) == "1" * 32
    assert len(server.runs) == 1 and server.asked.count("runs/create") == 1


def test_a_server_that_stays_away_ends_in_one_line(
    tmp_path: Path, server: Server, slept: list[float]
) -> None:
    server.plan["experiments/search"] = [(503, {}, {})] * 100
    with pytest.raises(ConnectionError, match="no answer from MLflow") as error:
        parent(server, tmp_path)
    assert len(server.asked) == requests.TRIES and 30 < sum(slept) < 90
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (MISSING, LookupError),
        ((403, {"error_code": "PERMISSION_DENIED", "message": "no"}, {}), ValueError),
        ((400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "a\nb"}, {}), ValueError),
    ],
)
def test_what_does_not_pass_fails_at_once_in_one_line(
    tmp_path: Path, server: Server, slept: list[float], answer: object, kind: type[Exception]
) -> None:
    server.plan["runs/search"] = [answer] * 9
    with pytest.raises(kind) as error:
        parent(server, tmp_path)
    assert not slept and server.asked.count("runs/search") == 1
    assert str(error.value).startswith(server.uri) and "\n" not in str(error.value)


def test_the_settings_of_a_training_and_of_the_loggers_come_back(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(requests.RETRIES, "0")
    monkeypatch.delenv(requests.FACTOR, raising=False)
    with requests.repeating(server.uri):
        assert os.environ[requests.RETRIES] == "6"
    assert os.environ[requests.RETRIES] == "0"
    assert requests.FACTOR not in os.environ
    assert not requests.logging.getLogger("urllib3.util.retry").filters


def test_blocks_of_two_threads_leave_the_settings_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one to begin is the first one to end: without a lock the second would restore the first's values."""
    monkeypatch.setenv(requests.RETRIES, "0")
    began, end = threading.Event(), threading.Event()

    def first() -> None:
        with requests.repeating("http://127.0.0.1:9"):
            began.set()
            end.wait(60)

    def second() -> None:
        began.wait(60)
        threading.Timer(0.2, end.set).start()
        with requests.repeating("http://127.0.0.1:9"):
            end.wait(60)
            threads[0].join(0.5)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.environ[requests.RETRIES] == "0"
    assert not requests.logging.getLogger("urllib3.util.retry").filters


def test_a_client_that_is_used_again_has_the_same_settings() -> None:
    uri = "http://127.0.0.1:9"
    first = tracking.open_client(uri)
    del os.environ[requests.RETRIES]
    assert tracking.open_client(uri) is first and int(os.environ[requests.RETRIES]) == 0


PARENT = """
import json, os, subprocess, sys
from vitdet.tracking import client
if len(sys.argv) > 1:
    print(json.dumps(client.USER_SETTINGS))
else:
    client.open_client("http://127.0.0.1:9")
    for changes in ({}, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}):
        subprocess.run([sys.executable, "-c", sys.orig_argv[2], "child"], env={**os.environ, **changes})
"""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {requests.RETRIES: "0"},
        {requests.RETRIES: "5"},
        {requests.FACTOR: "0"},
        {requests.RETRIES: "0", requests.FACTOR: "3"},
    ],
)
def test_settings_of_the_user_are_told_from_those_of_a_parent_process(
    settings: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [settings, {**settings, requests.RETRIES: "3"}]


@pytest.mark.parametrize("retries", ["0", "2"])
def test_the_number_of_retries_that_the_user_has_set_is_used(
    tmp_path: Path,
    server: Server,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    retries: str,
) -> None:
    monkeypatch.setattr(requests, "USER_SETTINGS", {requests.RETRIES: retries})
    server.plan["experiments/search"] = [(503, {}, {})] * 100
    with pytest.raises(ConnectionError, match="no answer from MLflow"):
        parent(server, tmp_path)
    assert len(server.asked) == 1 + int(retries)


def test_urllib3_tells_of_its_retries_as_is_expected_here() -> None:
    retry = Retry(total=2, status_forcelist=[503])
    assert retry.increment("GET", "/", error=None, response=None).history


def created(*answers: object) -> Callable[[], str]:
    left = list(answers)

    def make() -> str:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    return make


def test_a_thing_is_created_again_only_if_it_is_not_there() -> None:
    lost = ConnectionError("lost")
    assert requests.create(lambda: None, created(lost, "new")) == "new"
    assert requests.create(iter([None, "old"]).__next__, created(lost)) == "old"
    assert requests.create(iter([None, "old"]).__next__, created(FileExistsError("is"))) == "old"
    with pytest.raises(ConnectionError, match="lost"):
        requests.create(lambda: None, created(lost, lost, lost))
    with pytest.raises(ValueError, match="refused"):
        requests.create(lambda: None, created(ValueError("refused")))


def test_the_tracker_of_a_training_does_not_repeat_requests_itself(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread sends everything again; a request that hangs on would hold up the end of a training."""
    monkeypatch.setenv(requests.RETRIES, "0")
    server.plan["experiments/get-by-name"] = [(503, {}, {})] * 99
    shipper = tracking.Shipper(tracking.find(tmp_path, None), server.uri)
    shipper.journal.append(
        {"start": {"experiment": "e", "name": "n", "params": {}, "tags": {}, "dataset": {}}}
    )
    assert not shipper.deliver() and server.asked == ["experiments/get-by-name"]


def test_values_of_an_evaluation_are_sent_when_the_server_is_back(
    tmp_path: Path, server: Server, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server.plan["experiments/get-by-name"] = [(503, {}, {}), "cut"]
    start = {"experiment": "e", "name": "n", "params": {}, "tags": {}, "dataset": {}}
    journal = tracking.find(tmp_path, None)
    journal.append({"start": start})
    run_id = tracking.log_metrics(journal.run_id, server.uri, tmp_path, {"box_ap": 1.0}, 1)
    assert run_id == "1" * 32 and not journal.waiting()
    assert server.asked.count("runs/log-batch") == 1 and len(waits(caplog)) == 2
