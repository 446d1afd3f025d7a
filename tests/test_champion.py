"""The gate: who becomes champion, and who does not."""

import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vitdet.tracking.champion import ALIAS, judge, promote
from vitdet.tracking.mlflow import tracking_uri


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("store")
        client_of(folder).search_experiments()
    return folder


def client_of(folder: Path) -> MlflowClient:
    uri = tracking_uri("", folder)
    return MlflowClient(uri, uri)


def version(folder: Path, name: str, ap: float, digest: str = "data") -> str:
    client = client_of(folder)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {"box_ap": f"{ap:.4g}", "dataset_digest": digest}
    return str(client.create_model_version(name, (folder / "model").as_uri(), tags=tags).version)


@pytest.fixture
def model(
    request: pytest.FixtureRequest, store: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """A registered model of its own, whose champion has 40 AP on `data`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    name = request.node.name
    client_of(store).create_registered_model(name)
    client_of(store).set_registered_model_alias(name, ALIAS, version(store, name, 40.0))
    return {"uri": "", "folder": store, "model_name": name}


def champion(model: dict) -> str:
    return str(client_of(model["folder"]).get_registered_model(model["model_name"]).aliases[ALIAS])


def test_the_first_model_wins(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    verdict = judge(0.0, "data", uri="", folder=store, model_name="nobody yet")
    assert verdict.passed
    assert "first champion" in verdict.reason


@pytest.mark.parametrize(
    ("ap", "passed"), [(40.01, True), (40.0, False), (40.001, False), (39.9, False), (100, True)]
)
def test_a_better_one_passes_and_a_tie_does_not(model: dict, ap: float, passed: bool) -> None:
    verdict = judge(ap, "data", **model)
    assert verdict.passed is passed
    assert "champion, version 1" in verdict.reason


def test_a_champion_on_other_data_is_said_and_does_not_count(model: dict) -> None:
    verdict = judge(10.0, "other", **model)
    assert verdict.passed
    assert "does not count" in verdict.reason
    assert "data, not other" in verdict.reason


@pytest.mark.parametrize("ap", [None, -1.0, float("nan")])
def test_without_a_figure_nothing_passes(model: dict, ap: float | None) -> None:
    assert not judge(ap, "data", **model).passed


def test_of_two_that_passed_the_better_is_champion_whoever_comes_last(model: dict) -> None:
    better, good = (version(model["folder"], model["model_name"], ap) for ap in (45.0, 42.0))
    assert judge(45.0, "data", **model).passed
    assert judge(42.0, "data", **model).passed
    assert promote(better, 45.0, "data", **model).passed
    assert not promote(good, 42.0, "data", **model).passed
    assert champion(model) == better


def test_of_many_at_once_the_best_is_champion(model: dict) -> None:
    candidates = [
        (version(model["folder"], model["model_name"], ap), ap) for ap in (41.0, 44.0, 42.0, 43.0)
    ]
    threads = [
        threading.Thread(target=promote, args=(number, ap, "data"), kwargs=model)
        for number, ap in candidates
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert champion(model) == candidates[1][0]
