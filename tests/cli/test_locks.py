"""Inter-process locks, including file systems without lock support."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.cli.test_cli import python
from tests.conftest import ROOT, environment, minimal, options
from tests.helpers.lockless import KINDS, patches
from vitdet import files, stages
from vitdet.checkpoint import Checkpoints
from vitdet.config import load_config
from vitdet.files import locked

HOLDING = """
import os, sys, time
from pathlib import Path
from vitdet.files import locked
with locked(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_earlier_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_warned", set())


def test_a_killed_process_releases_its_lock_while_its_forked_workers_run(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    words, env = [sys.executable, "-c", HOLDING, path], environment(tmp_path)
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match="locked by another process"), locked(path):
            pass
        process.kill()
        process.wait()
        os.kill(worker, 0)  # the worker still runs
        with locked(path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_content_of_a_locked_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "download"
    path.write_bytes(b"the bytes so far")
    with locked(path):
        pass
    assert path.read_bytes() == b"the bytes so far"


def test_a_temporary_lock_file_is_removed(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "lock", remove=True):
            assert (tmp_path / "lock").exists()
        assert not (tmp_path / "lock").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "lock"):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_without_locks_the_missing_protection_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for name, function in patches(kind).items():
        monkeypatch.setattr(fcntl, name, function)
    states = Checkpoints(tmp_path / "states", 1)
    with states.locked(), locked(tmp_path / "a"), locked(tmp_path / "b", waiting="waiting"):
        is_refused = pytest.raises(ValueError, match="another training run is writing")
        # the last kind can lock files that are open for writing
        with is_refused if kind == "nfs4" else nullcontext(), states.locked():
            pass
    messages = [text for text in caplog.messages if "does not support locks" in text]
    assert len(messages) == (kind != "nfs4"), caplog.messages
    if messages:
        assert "write the same output" in messages[0] and os.strerror(KINDS[kind]) in messages[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a SQLite store that the training runs share."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_tracks_and_resumes_without_locks(
    tiny: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One kind also runs through the command line, the other kinds only in this process."""
    uri = environment(store)["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    def train(steps: int) -> None:
        config = load_config("tiny", minimal(tiny, optim__steps=steps, train__eval_every=100))
        stages.train(config, "tiny", tmp_path / "run")

    def command(steps: int) -> None:
        settings = options(minimal(tiny, optim__steps=steps, train__eval_every=100))
        words = ["train", "tiny", *settings, "--output", tmp_path / "run"]
        done = python(store, "-m", "tests.helpers.lockless", kind, *words, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("does not support locks") == 1, done.stderr

    for name, function in patches(kind).items():
        monkeypatch.setattr(fcntl, name, function)
    (command if kind == "nfs without lockd" else train)(2)
    train(3)
    content = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    run = MlflowClient(uri).get_run(content["run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["resumed_at_step"] == "2"
    points = MlflowClient(uri).get_metric_history(content["run_id"], "loss")
    assert [point.step for point in points] == [1, 2, 3]
