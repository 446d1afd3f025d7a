"""The gate: which candidate becomes champion, and when the champion is evaluated again."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from vitdet.config import GateConfig, load_config
from vitdet.data.protocol import Protocol
from vitdet.tracking import champion as champions
from vitdet.tracking import packaged_model
from vitdet.tracking.champion import ALIAS, Evaluated, Verdict, update_tags
from vitdet.tracking.evaluations import MATCHES, add_matches, matches_folder
from vitdet.tracking.gate import Evaluation
from vitdet.tracking.mlflow import tracking_uri

DATA = Protocol.of(load_config("tiny"), "0123456789abcdef")
OTHER = Protocol.of(load_config("tiny"), "fedcba9876543210")
GATE = GateConfig()
STRICT = Protocol.of(load_config("tiny", ["evaluate.score_threshold=0.5"]), "0123456789abcdef")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("store")
        client_of(folder).search_experiments()
    return folder


def box(ap: float | None) -> Evaluation:
    return Evaluation({"box_ap": ap})


def judge(ap: float | None, protocol: Protocol, **place: object) -> Verdict:
    return champions.judge(box(ap), protocol, GATE, **place)


def promote(number: str, ap: float, protocol: Protocol, **place: object) -> Verdict:
    return champions.promote(number, box(ap), protocol, GATE, **place)


def is_known(protocol: Protocol, **place: object) -> bool:
    return champions.is_known(protocol, GATE, **place)


def evaluate_champion(protocol: Protocol, evaluate: object, **place: object) -> Evaluated | None:
    return champions.evaluate_champion(protocol, GATE, evaluate, **place)


def client_of(folder: Path) -> MlflowClient:
    uri = tracking_uri("", folder)
    return MlflowClient(uri, uri)


def version(folder: Path, name: str, ap: float, tags: dict[str, str] | None = None) -> str:
    client = client_of(folder)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {"box_ap": f"{ap:.4g}"} | (DATA.tags() if tags is None else tags)
    return str(client.create_model_version(name, (folder / "model").as_uri(), tags=tags).version)


@pytest.fixture
def model(
    request: pytest.FixtureRequest, store: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """A registered model whose champion has 40 AP under DATA."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(packaged_model, "download_checkpoint", lambda *_: Path("champion.pt"))
    name = request.node.name
    client_of(store).create_registered_model(name)
    client_of(store).set_registered_model_alias(name, ALIAS, version(store, name, 40.0))
    return {"uri": "", "folder": store, "model_name": name}


def champion(model: dict) -> str:
    return str(client_of(model["folder"]).get_registered_model(model["model_name"]).aliases[ALIAS])


def unexpected(checkpoint: Path, plots: Path) -> dict[str, float]:
    raise AssertionError("the champion must not be evaluated")


def test_the_first_model_passes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = {"uri": "", "folder": store, "model_name": "nobody yet"}
    verdict = judge(0.0, DATA, **place, evaluate=unexpected)
    assert verdict.passed
    assert "first champion" in verdict.reason
    assert is_known(DATA, **place) and evaluate_champion(DATA, unexpected, **place) is None


@pytest.mark.parametrize(
    ("ap", "passed"), [(40.01, True), (40.0, False), (40.001, False), (39.9, False), (100, True)]
)
def test_a_higher_ap_passes_and_a_tie_does_not(model: dict, ap: float, passed: bool) -> None:
    verdict = judge(ap, DATA, **model, evaluate=unexpected)
    assert verdict.passed is passed
    assert "champion, version 1" in verdict.reason


def test_other_training_data_changes_nothing(model: dict) -> None:
    client = client_of(model["folder"])
    client.set_model_version_tag(model["model_name"], "1", "train_fingerprint", "other")
    assert is_known(DATA, **model)
    assert not judge(3.0, DATA, **model).passed


@pytest.mark.parametrize("protocol", [OTHER, STRICT], ids=["data", "settings"])
@pytest.mark.parametrize(
    ("measured", "ap", "passed"), [(51.6, 3.0, False), (51.6, 51.7, True), (0.0, 0.0, False)]
)
def test_the_champion_is_evaluated_again_on_other_data_or_settings(
    model: dict, protocol: Protocol, measured: float, ap: float, passed: bool
) -> None:
    asked = []

    def evaluate(checkpoint: Path, plots: Path) -> dict[str, float]:
        asked.append(checkpoint)
        return {"box_ap": measured}

    assert not is_known(protocol, **model)
    assert judge(ap, protocol, **model, evaluate=evaluate).passed is passed
    assert judge(ap, protocol, **model, evaluate=evaluate).passed is passed
    assert asked == [Path("champion.pt")]  # the registry has its AP now
    assert is_known(protocol, **model)
    assert not judge(40.0, DATA, **model).passed  # and still that of its registration


@pytest.mark.parametrize("tags", [{}, {"dataset_digest": "0123456789abcdef"}])
def test_a_champion_of_version_0_1_is_evaluated_again(model: dict, tags: dict[str, str]) -> None:
    old = version(model["folder"], model["model_name"], 51.6, tags)
    client_of(model["folder"]).set_registered_model_alias(model["model_name"], ALIAS, old)
    assert not is_known(DATA, **model)
    assert not judge(52.0, DATA, **model).passed
    found = evaluate_champion(DATA, lambda checkpoint, plots: {"box_ap": 51.5}, **model)
    assert found == Evaluated(old, {"box_ap": 51.5})
    verdict = judge(52.0, DATA, **model)
    assert verdict.passed and "above the 51.5 of the champion, version 2" in verdict.reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("it has other classes (bolt, nut)"), "it has other classes (bolt, nut)"),
        (FileNotFoundError("model.pt: no such checkpoint\nmore"), "model.pt: no such checkpoint"),
        (LookupError("gone"), "gone"),
        (OSError("http://u:secret@h/a: no answer"), "http://***@h/a: no answer"),
    ],
    ids=["classes", "file", "lookup", "password"],
)
def test_a_champion_that_cannot_be_evaluated_is_not_replaced(
    model: dict, error: Exception, reason: str
) -> None:
    def evaluate(checkpoint: Path, plots: Path) -> dict[str, float]:
        raise error

    verdict = judge(99.0, OTHER, **model, evaluate=evaluate)
    assert not verdict.passed and len(verdict.reason.splitlines()) == 1
    assert f"cannot be evaluated: {reason})" in verdict.reason
    found = evaluate_champion(OTHER, evaluate, **model)
    assert found is not None and not found.metrics
    assert judge(99.0, OTHER, **model, evaluated=found) == verdict
    assert not is_known(OTHER, **model)


class ClientError(Exception):
    """As botocore's, which object storages raise: of no other class than Exception."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "OutOfMemoryError: CUDA out of memo",
        ),
        (KeyError("boxes"), "KeyError: 'boxes'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("http://u:s3cret@h:1/a"), "RuntimeError: http://***@h:1/a"),
    ],
    ids=["memory", "key", "no message", "password"],
)
def test_an_unexpected_error_of_the_evaluation_refuses_and_its_traceback_is_logged(
    model: dict, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    def evaluate(checkpoint: Path, plots: Path) -> dict[str, float]:
        raise error

    with caplog.at_level(logging.WARNING, "vitdet"):
        verdict = judge(99.0, OTHER, **model, evaluate=evaluate)
    assert not verdict.passed and len(verdict.reason.splitlines()) == 1
    assert f"cannot be evaluated: {reason}" in verdict.reason
    (message,) = [one for one in caplog.messages if "cannot be evaluated" in one]
    assert "Traceback (most recent call last)" in message and type(error).__name__ in message
    assert "s3cret" not in caplog.text


def test_an_error_of_the_object_storage_refuses(
    model: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object) -> Path:
        raise ClientError("An error occurred (403) when calling GetObject: Forbidden")

    monkeypatch.setattr(packaged_model, "download_checkpoint", download)
    found = evaluate_champion(OTHER, unexpected, **model)
    assert found is not None and "ClientError: An error occurred (403)" in found.failure


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_evaluation_is_no_verdict(model: dict, stop: type[BaseException]) -> None:
    def evaluate(checkpoint: Path, plots: Path) -> dict[str, float]:
        raise stop

    with pytest.raises(stop):
        judge(99.0, OTHER, **model, evaluate=evaluate)


def test_artifacts_that_are_gone_are_named(model: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    verdict = judge(99.0, OTHER, **model, evaluate=unexpected)
    assert not verdict.passed and "cannot be evaluated: " in verdict.reason


def test_the_evaluation_of_another_champion_does_not_count(model: dict) -> None:
    verdict = judge(99.0, OTHER, **model, evaluated=Evaluated("7", {"box_ap": 12.0}))
    assert not verdict.passed and "run this again" in verdict.reason


@pytest.mark.parametrize("ap", [None, -1.0, float("nan")])
def test_without_an_ap_nothing_passes(model: dict, ap: float | None) -> None:
    assert not judge(ap, DATA, **model).passed


def test_an_unknown_ap_is_not_known_by_having_no_tags(model: dict) -> None:
    old = version(model["folder"], model["model_name"], 51.6, {})
    client_of(model["folder"]).set_registered_model_alias(model["model_name"], ALIAS, old)
    assert not is_known(Protocol("", DATA.settings), **model)


def test_of_two_that_passed_the_better_is_champion_whoever_comes_last(model: dict) -> None:
    better, good = (version(model["folder"], model["model_name"], ap) for ap in (45.0, 42.0))
    assert judge(45.0, DATA, **model).passed
    assert judge(42.0, DATA, **model).passed
    assert promote(better, 45.0, DATA, **model).passed
    assert not promote(good, 42.0, DATA, **model).passed
    assert champion(model) == better
    assert promote(better, 45.0, DATA, **model).passed  # a repeated step


def test_a_candidate_is_not_promoted_over_a_champion_of_unknown_ap(model: dict) -> None:
    candidate = version(model["folder"], model["model_name"], 99.0, OTHER.tags())
    assert not promote(candidate, 99.0, OTHER, **model).passed
    assert promote(
        candidate, 99.0, OTHER, **model, evaluated=Evaluated("1", {"box_ap": 12.0})
    ).passed
    assert champion(model) == candidate


def test_the_champion_itself_passes_again(model: dict) -> None:
    assert judge(40.0, DATA, **model, version="1").passed
    assert not judge(40.0, DATA, **model, version="2").passed


def update(model: dict, number: str, metrics: dict[str, float], protocol: Protocol) -> None:
    client = client_of(model["folder"])
    found = client.get_model_version(model["model_name"], number)
    update_tags(client, model["folder"], found, metrics, protocol)


def tags_of(model: dict, number: str) -> dict[str, str]:
    return client_of(model["folder"]).get_model_version(model["model_name"], number).tags


def test_the_ap_of_a_promotion_counts_before_that_of_the_registration(model: dict) -> None:
    candidate = version(model["folder"], model["model_name"], 5.0)
    assert promote(candidate, 77.0, DATA, **model).passed
    verdict = judge(60.0, DATA, **model)
    assert not verdict.passed and "no better than the 77 of the champion" in verdict.reason


def test_a_champion_that_is_promoted_again_keeps_its_ap(model: dict) -> None:
    candidate = version(model["folder"], model["model_name"], 45.0)
    assert promote(candidate, 45.0, DATA, **model).passed
    update(model, candidate, {"box_ap": 3.0}, DATA)
    assert promote(candidate, 3.0, DATA, **model).passed
    assert not judge(44.0, DATA, **model).passed and judge(46.0, DATA, **model).passed
    assert (
        tags_of(model, candidate)["box_ap"] == tags_of(model, candidate)[DATA.tag("box_ap")] == "45"
    )
    assert not is_known(OTHER, **model)
    assert promote(candidate, 3.0, OTHER, **model).passed  # what was measured on others is new
    assert not judge(2.9, OTHER, **model).passed and not judge(44.0, DATA, **model).passed


def test_the_tags_of_a_version_follow_its_newest_metrics_and_keep_those_of_other_data(
    model: dict,
) -> None:
    candidate = version(model["folder"], model["model_name"], 5.0)
    update(model, candidate, {"box_ap": 41.0, "mask_ap": 30.0}, DATA)
    expected = {"box_ap": "41", "mask_ap": "30", **DATA.tags()}
    assert tags_of(model, candidate) == expected
    update(model, candidate, {"box_ap": 1.0}, Protocol("", DATA.settings))
    assert tags_of(model, candidate) == expected  # on which data that was measured is not known
    update(model, candidate, {"box_ap": 12.0}, OTHER)
    update(model, candidate, {"box_ap": 43.0}, DATA)
    found = tags_of(model, candidate)
    assert found == {
        **DATA.tags(), "box_ap": "43", DATA.tag("mask_ap"): "30", DATA.tag("box_ap"): "43", OTHER.tag("box_ap"): "12"
    }  # fmt: skip


def test_of_many_at_once_the_best_is_champion(model: dict) -> None:
    candidates = [
        (version(model["folder"], model["model_name"], ap), ap) for ap in (41.0, 44.0, 42.0, 43.0)
    ]
    threads = [
        threading.Thread(target=promote, args=(number, ap, DATA), kwargs=model)
        for number, ap in candidates
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert champion(model) == candidates[1][0]


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("evaluate.nms_iou=0.6", False),
        ("evaluate.max_detections=10", False),
        ("data.dataset=lvis", False),
        ("evaluate.precision=bf16", False),
        ("evaluate.precision=fp32", True),
        ("evaluate.batch_size=4", True),
        ("data.image_size=512", True),
        ("data.workers=0", True),
        ("optim.lr=1", True),
    ],
)
def test_the_settings_of_a_protocol_are_those_that_change_ap(override: str, same: bool) -> None:
    changed = Protocol.of(load_config("tiny", [override]), DATA.fingerprint)
    assert (changed == DATA) is (changed.digest == DATA.digest) is same


def test_matches_are_added_to_a_version_that_has_their_metrics_only(
    model: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri("", model["folder"]))
    client, folder = client_of(model["folder"]), matches_folder(DATA)
    (tmp_path / MATCHES).write_bytes(b"matches")
    experiment = client.create_experiment("matches", (tmp_path / "artifacts").as_uri())
    logged = client.create_logged_model(experiment, "detector").model_id
    tags = {"box_ap": "40", **DATA.tags()}
    found = client.create_model_version(model["model_name"], f"models:/{logged}", tags=tags)
    add_matches(client, found, DATA, {"box_ap": 41.0}, tmp_path)
    assert "the matches in " in caplog.text and "are of another evaluation" in caplog.text
    assert not client.list_logged_model_artifacts(logged, folder)
    add_matches(client, found, DATA, {"box_ap": 40.0}, tmp_path)
    (stored,) = client.list_logged_model_artifacts(logged, folder)
    assert stored.path == f"{folder}/{MATCHES}"
    add_matches(client, found, DATA, {"box_ap": 40.0}, tmp_path)
    assert "it has matches of this evaluation" in caplog.text
