"""Requests to MLflow while it restarts, is overloaded, or rejects them permanently."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.conftest import ROOT
from tests.helpers.mlflow_answers import CUT, RUN_ID, Server, serving
from vitdet.tracking import client
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.comparison import start_parent_run

MISSING = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}, {})
START = {"experiment": "e", "name": "n", "params": {}, "tags": {}, "dataset": {}}
Log, Patch = pytest.LogCaptureFixture, pytest.MonkeyPatch
RETRY = logging.getLogger("urllib3.util.retry")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unset MLflow's variables, which the developer or an earlier test may have set."""
    names = (*client.DEFAULTS, client.FACTOR)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    monkeypatch.setattr(client, "USER_SETTINGS", {})
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record and skip the pauses between this thread's requests.

    An earlier test's tracker may still send requests in another thread.
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


def parent(uri: str, folder: Path) -> str:
    return start_parent_run("g", ["a"], uri=uri, folder=folder, experiment="e")


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "attempts left" in text]


@pytest.mark.parametrize("answer", [CUT, *((code, {}, {}) for code in (503, 500, 502, 429, 408))])
def test_transient_errors_are_retried_and_each_wait_is_logged(
    tmp_path: Path, answers: Server, slept: list[float], caplog: Log, answer: object
) -> None:
    answers.plan["runs/search"] = [answer] * 3
    assert parent(answers.uri, tmp_path) == RUN_ID
    assert answers.asked.count("runs/search") == 4 and answers.asked.count("runs/create") == 1
    assert len(waits(caplog)) == 3 and "attempts left: 6" in waits(caplog)[0]
    assert len(slept) == 2  # the first retry is immediate


def test_the_server_determines_how_long_to_wait(
    tmp_path: Path, answers: Server, slept: list[float]
) -> None:
    answers.plan["runs/search"] = [(429, {}, {"Retry-After": 17})]
    parent(answers.uri, tmp_path)
    assert slept == [17]


def test_requests_wait_for_a_restarting_server(
    tmp_path: Path, answers: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are refused until the second pause."""
    answers.shutdown()
    answers.server_close()
    again: list = []

    def restart(_: float) -> None:
        if not again:
            again.append(serving(answers.server_port))
            again[0].__enter__()

    monkeypatch.setattr("urllib3.util.retry.time.sleep", restart)
    assert parent(answers.uri, tmp_path) == RUN_ID
    again[0].__exit__(None, None, None)


def test_a_run_is_not_created_twice_after_a_lost_response(
    tmp_path: Path, answers: Server, slept: list[float]
) -> None:
    answers.plan["runs/create"] = [CUT]
    assert parent(answers.uri, tmp_path) == RUN_ID
    assert len(answers.runs) == 1 and answers.asked.count("runs/create") == 1


@pytest.mark.parametrize("retries", ["", "0", "2"])
def test_a_permanently_unavailable_server_is_reported_in_one_line(
    tmp_path: Path, answers: Server, slept: list[float], monkeypatch: Patch, retries: str
) -> None:
    """The user's setting determines the number of retries."""
    if retries:
        monkeypatch.setattr(client, "USER_SETTINGS", {client.RETRIES: retries})
    answers.plan["experiments/search"] = [(503, {}, {})] * 100
    with pytest.raises(ConnectionError, match="no valid response from MLflow") as error:
        parent(answers.uri, tmp_path)
    assert len(answers.asked) == (1 + int(retries) if retries else client.TRIES)
    assert retries or 30 < sum(slept) < 90
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (MISSING, LookupError),
        ((403, {"error_code": "PERMISSION_DENIED", "message": "no"}, {}), ValueError),
        ((400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "a\nb"}, {}), ValueError),
    ],
)
def test_permanent_errors_fail_at_once_in_one_line(
    tmp_path: Path, answers: Server, slept: list[float], answer: object, kind: type[Exception]
) -> None:
    answers.plan["runs/search"] = [answer] * 9
    with pytest.raises(kind) as error:
        parent(answers.uri, tmp_path)
    assert not slept and answers.asked.count("runs/search") == 1
    assert str(error.value).startswith(answers.uri) and "\n" not in str(error.value)


def test_contexts_of_two_threads_restore_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first thread starts and ends first; without a lock, the second restores wrong values."""
    monkeypatch.setenv(client.RETRIES, "0")
    began, end = threading.Event(), threading.Event()

    def first() -> None:
        with client.repeating("http://127.0.0.1:9"):
            assert os.environ[client.RETRIES] == "6"
            began.set()
            end.wait(60)

    def second() -> None:
        began.wait(60)
        threading.Timer(0.2, end.set).start()
        with client.repeating("http://127.0.0.1:9"):
            end.wait(60)
            threads[0].join(0.5)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert began.is_set() and os.environ[client.RETRIES] == "0"
    assert client.FACTOR not in os.environ and not RETRY.filters


def test_a_reused_client_has_the_same_settings() -> None:
    uri = "http://127.0.0.1:9"
    first = tracking.open_client(uri)
    del os.environ[client.RETRIES]
    assert tracking.open_client(uri) is first and int(os.environ[client.RETRIES]) == 0


PARENT = """
import json, os, subprocess, sys
from vitdet.tracking import client
if len(sys.argv) > 1:
    print(json.dumps(client.USER_SETTINGS))
else:
    client.open_client("http://127.0.0.1:9")
    for changes in ({}, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}):
        words = [sys.executable, "-c", sys.orig_argv[2], "child"]
        subprocess.run(words, env={**os.environ, **changes})
"""


@pytest.mark.parametrize(
    "settings",
    [{}, {client.RETRIES: "0"}, {client.FACTOR: "0"}, {client.RETRIES: "5", client.FACTOR: "3"}],
)
def test_settings_of_the_user_are_distinguished_from_settings_of_a_parent_process(
    settings: dict[str, str],
) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    printed = subprocess.check_output([sys.executable, "-c", PARENT], env=variables, text=True)
    found = [json.loads(line) for line in printed.splitlines()]
    assert found == [settings, {**settings, client.RETRIES: "3"}]


def test_an_object_is_created_again_only_if_it_does_not_exist() -> None:
    lost = ConnectionError("lost")
    assert client.create(lambda: None, Mock(side_effect=[lost, "new"])) == "new"
    for error in (lost, FileExistsError("is")):
        assert client.create(Mock(side_effect=[None, "old"]), Mock(side_effect=[error])) == "old"
    with pytest.raises(ConnectionError, match="lost"):
        client.create(lambda: None, Mock(side_effect=[lost, lost, lost]))
    with pytest.raises(ValueError, match="refused"):
        client.create(lambda: None, Mock(side_effect=ValueError("refused")))


def test_the_tracker_of_a_training_run_does_not_repeat_requests_itself(
    tmp_path: Path, answers: Server
) -> None:
    """The shipper's thread sends everything again; a hanging request would delay the end of training."""
    answers.plan["experiments/get-by-name"] = [(503, {}, {})] * 99
    shipper = tracking.Shipper(tracking.find(tmp_path, None), answers.uri)
    shipper.journal.append({"start": START})
    assert not shipper.deliver() and answers.asked == ["experiments/get-by-name"]


def test_evaluation_metrics_are_sent_once_the_server_is_available(
    tmp_path: Path, answers: Server, slept: list[float], caplog: Log
) -> None:
    answers.plan["experiments/get-by-name"] = [(503, {}, {}), CUT]
    journal = tracking.find(tmp_path, None)
    journal.append({"start": START})
    run_id = tracking.log_metrics(journal.run_id, answers.uri, tmp_path, {"box_ap": 1.0}, 1)
    assert run_id == RUN_ID and not journal.waiting()
    assert answers.asked.count("runs/log-batch") == 1 and len(waits(caplog)) == 2
