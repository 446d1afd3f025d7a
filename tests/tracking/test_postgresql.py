"""Tracking and registry on an MLflow server with PostgreSQL, the database of manifests/mlflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import minimal, options
from tests.helpers.mlflow_server import Server, postgres, postgres_binaries
from vitdet.config import GateConfig, load_config
from vitdet.data.protocol import Protocol
from vitdet.tracking import champion, history
from vitdet.tracking.gate import Evaluation
from vitdet.tracking.registry import register_checkpoint

Run = Callable[..., tuple[int, str, str]]
absent = postgres_binaries() is None or find_spec("psycopg2") is None
needs_postgres = pytest.mark.skipif(absent, reason="needs PostgreSQL and psycopg2")
pytestmark = [pytest.mark.slow, needs_postgres]
PASSWORD = "s3cret"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres(PASSWORD) as uri:
        yield uri


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server(database, tmp_path_factory.mktemp("artifacts"), workers=2)
    server.start()
    server.wait()
    yield server.uri
    server.kill()


@pytest.mark.usefixtures("untried")
def test_a_trained_model_is_registered_promoted_and_rolled_back(
    server: str, tiny: Path, vitdet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    settings = minimal(tiny, optim__steps=2, train__eval_every=2)
    checkpoint, metrics, plots = (tmp_path / name for name in ("runs/a/model.pt", "m.json", "p"))
    assert vitdet("train", "tiny", *options(settings), "--output", checkpoint.parent)[0] == 0
    assert vitdet("evaluate", checkpoint, "--output", metrics, "--plots", plots)[0] == 0
    words = ["register", checkpoint, "--metrics", metrics, "--plots", plots, "--alias", "champion"]
    for _ in range(2):  # the second time, nothing is added
        code, out, err = vitdet(*words)
        assert code == 0 and out.startswith("vitdet, version 1 (champion)"), err
    client = MlflowClient(server, server)
    (version,) = client.search_model_versions("name = 'vitdet'")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(version.run_id, "box_ap")] == [2]
    assert client.get_logged_model(version.source.rpartition("/")[2]).metrics

    other = tmp_path / "runs" / "b"
    settings += ["train.seed=1"]
    assert vitdet("train", "tiny", *options(settings), "--output", other)[0] == 0
    assert vitdet("register", other)[0] == 0
    code, out, err = vitdet("promote", "vitdet", "--version", 2, "--force", "field test")
    assert code == 0 and "version 2 (champion)" in out, err
    code, out, err = vitdet("rollback", "vitdet")
    assert code == 0 and "version 1 (champion): replaces version 2" in out, err
    assert str(client.get_registered_model("vitdet").aliases["champion"]) == "1"


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("place", ["server", "database"])
def test_concurrent_registrations_make_the_best_version_champion(
    request: pytest.FixtureRequest,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    uri = request.getfixturevalue(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)  # without a server, MLflow writes artifacts to the current folder
    config = load_config("tiny", [f"tracking.model_name=at-once-{place}"])
    protocol, numbers = Protocol.of(config, "0123456789abcdef"), {}

    def enter(ap: float) -> None:
        folder = tmp_path / str(ap)  # simulates machines without a shared folder
        checkpoint = trained / ("model.pt" if ap == 40 else "best.pt")
        given = {"config": config, "metrics": {"box_ap": ap}, "protocol": protocol}
        found = register_checkpoint(checkpoint, folder=folder, alias="candidate", **given)
        where = {"uri": "", "folder": folder, "model_name": found.name}
        evaluation = Evaluation({"box_ap": ap})
        verdict = champion.promote(found.version, evaluation, protocol, GateConfig(), **where)
        numbers[ap] = (found.version, verdict.passed)

    second = trained / "best.pt"
    second.write_bytes((trained / "model.pt").read_bytes() + b"\0")  # changes the digest
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(enter, (40.0, 41.0)))
    finally:
        second.unlink()
    assert {number for number, _ in numbers.values()} == {"1", "2"}
    assert numbers[41.0][1]
    client = MlflowClient(uri, uri)
    aliases = client.get_registered_model(config.tracking.model_name).aliases
    assert str(aliases["champion"]) == numbers[41.0][0]
    passed = {number for number, passed in numbers.values() if passed}
    recorded = history.events(client, config.tracking.model_name)
    assert {event.version for event in recorded} == passed
    assert PASSWORD not in caplog.text
