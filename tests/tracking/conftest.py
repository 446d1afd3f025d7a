"""Fixtures of the tracking tests: no server from the environment, short pauses, one store per module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.mlflow_answers import Server, serving
from tests.helpers.registered import RegisteredModel
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.address import VARIABLES


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "SHIP_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "BACK_OFF_SECONDS", 0.4)
    monkeypatch.setattr("vitdet.tracking.shipper.BACK_OFF_SECONDS", 0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the default store, a SQLite file whose creation takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    tracking.open_client(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def model(request: pytest.FixtureRequest, folder: Path) -> RegisteredModel:
    """Return a registered model without versions."""
    return RegisteredModel(folder, request.node.name)


@pytest.fixture
def answers() -> Iterator[Server]:
    """Return a server that responds like MLflow by default."""
    with serving() as server:
        yield server
