"""The gate: which candidate becomes champion, and when the champion is evaluated again."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY, Mock

import pytest
import torch

from tests.helpers.registered import DATA, RegisteredModel
from vitdet.config import load_config
from vitdet.data.protocol import Protocol
from vitdet.tracking import packaged_model
from vitdet.tracking.champion import Evaluated
from vitdet.tracking.evaluations import MATCHES, add_matches, matches_folder

Log = pytest.LogCaptureFixture
OTHER = Protocol.of(load_config("tiny"), "fedcba9876543210")
STRICT = Protocol.of(load_config("tiny", ["evaluate.score_threshold=0.5"]), DATA.fingerprint)


@pytest.fixture
def gated(model: RegisteredModel, monkeypatch: pytest.MonkeyPatch) -> RegisteredModel:
    """Return a model whose champion, version 1, has 40 AP on DATA."""
    monkeypatch.setattr(packaged_model, "download_checkpoint", lambda *_: Path("champion.pt"))
    model.set(model.add(40.0))
    return model


UNEXPECTED = Mock(side_effect=AssertionError("the champion must not be evaluated"))


def test_the_first_model_passes(model: RegisteredModel) -> None:
    verdict = model.judge(0.0, DATA, evaluate=UNEXPECTED)
    assert verdict.passed and "first champion" in verdict.reason
    assert model.is_known(DATA) and model.evaluate(DATA, UNEXPECTED) is None


@pytest.mark.parametrize(
    ("ap", "passed"),
    [
        *[(40.01, True), (40.0, False), (40.001, False), (39.9, False), (100, True)],
        *[(None, False), (-1.0, False), (float("nan"), False)],
    ],
)
def test_only_a_higher_ap_passes(gated: RegisteredModel, ap: float | None, passed: bool) -> None:
    gated.client.set_model_version_tag(gated.name, "1", "train_fingerprint", "other")
    assert gated.judge(ap, DATA, evaluate=UNEXPECTED).passed is passed
    assert gated.is_known(DATA)  # different training data has no effect


@pytest.mark.parametrize("protocol", [OTHER, STRICT], ids=["data", "settings"])
@pytest.mark.parametrize(
    ("measured", "ap", "passed"), [(51.6, 3.0, False), (51.6, 51.7, True), (0.0, 0.0, False)]
)
def test_the_champion_is_evaluated_again_on_other_data_or_settings(
    gated: RegisteredModel, protocol: Protocol, measured: float, ap: float, passed: bool
) -> None:
    evaluate = Mock(return_value={"box_ap": measured})
    assert not gated.is_known(protocol)
    assert gated.judge(ap, protocol, evaluate=evaluate).passed is passed
    assert gated.judge(ap, protocol, evaluate=evaluate).passed is passed
    # the first evaluation stored the AP in the registry
    evaluate.assert_called_once_with(Path("champion.pt"), ANY)
    assert gated.is_known(protocol)
    assert not gated.judge(40.0, DATA).passed  # the AP of its registration is still known


@pytest.mark.parametrize("tags", [{}, {"dataset_digest": "0123456789abcdef"}])
def test_a_champion_of_version_0_1_is_evaluated_again(
    gated: RegisteredModel, tags: dict[str, str]
) -> None:
    old = gated.add(51.6, tags)
    gated.set(old)
    assert not gated.is_known(DATA) and not gated.is_known(Protocol("", DATA.settings))
    assert not gated.judge(52.0, DATA).passed
    found = gated.evaluate(DATA, lambda checkpoint, plots: {"box_ap": 51.5})
    assert found == Evaluated(old, {"box_ap": 51.5})
    verdict = gated.judge(52.0, DATA)
    assert verdict.passed and "above the 51.5 of the champion, version 2" in verdict.reason


@pytest.mark.parametrize(
    ("error", "reason", "is_expected"),
    [
        (ValueError("it has other classes (bolt, nut)"), "it has other classes (bolt, nut)", True),
        (FileNotFoundError("model.pt: no such checkpoint\nmore"), "model.pt: no such check", True),
        (LookupError("gone"), "gone", True),
        (OSError("http://u:s3cret@h/a: no answer"), "http://***@h/a: no answer", True),
        (torch.OutOfMemoryError("CUDA out of memory.\nA"), "OutOfMemoryError: CUDA out of", False),
        (KeyError("boxes"), "KeyError: 'boxes'", False),
        (AssertionError(), "AssertionError", False),
        (RuntimeError("http://u:s3cret@h:1/a"), "RuntimeError: http://***@h:1/a", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_champion_that_cannot_be_evaluated_is_not_replaced(
    gated: RegisteredModel, caplog: Log, error: Exception, reason: str, is_expected: bool
) -> None:
    """The traceback of an unexpected error is logged."""
    with caplog.at_level(logging.WARNING, "vitdet"):
        verdict = gated.judge(99.0, OTHER, evaluate=Mock(side_effect=error))
    assert not verdict.passed and len(verdict.reason.splitlines()) == 1
    assert f"cannot be evaluated: {reason}" in verdict.reason
    logged = [message for message in caplog.messages if "cannot be evaluated" in message]
    assert ["Traceback (most recent" in message for message in logged] == [True] * (not is_expected)
    assert "s3cret" not in caplog.text
    found = gated.evaluate(OTHER, Mock(side_effect=error))
    assert found is not None and not found.metrics
    assert gated.judge(99.0, OTHER, evaluated=found) == verdict
    assert not gated.is_known(OTHER)


class ClientError(Exception):
    """Simulates botocore's error of an object storage, a direct subclass of Exception."""


def test_an_error_of_the_object_storage_rejects_the_candidate(
    gated: RegisteredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ClientError("An error occurred (403) when calling GetObject: Forbidden")
    monkeypatch.setattr(packaged_model, "download_checkpoint", Mock(side_effect=error))
    found = gated.evaluate(OTHER, UNEXPECTED)
    assert found is not None and "ClientError: An error occurred (403)" in found.failure
    monkeypatch.undo()  # the artifacts do not exist
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    verdict = gated.judge(99.0, OTHER, evaluate=UNEXPECTED)
    assert not verdict.passed and "cannot be evaluated: " in verdict.reason


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_evaluation_gives_no_verdict(
    gated: RegisteredModel, stop: type[BaseException]
) -> None:
    with pytest.raises(stop):
        gated.judge(99.0, OTHER, evaluate=Mock(side_effect=stop))


def test_the_evaluation_of_another_champion_is_ignored(gated: RegisteredModel) -> None:
    verdict = gated.judge(99.0, OTHER, evaluated=Evaluated("7", {"box_ap": 12.0}))
    assert not verdict.passed and "run the command or pipeline again" in verdict.reason


def test_the_better_of_two_candidates_becomes_champion_in_any_order(
    gated: RegisteredModel,
) -> None:
    better, good = gated.add(45.0), gated.add(42.0)
    assert gated.judge(45.0, DATA).passed and gated.judge(42.0, DATA).passed
    assert gated.promote(better, 45.0).passed
    assert not gated.promote(good, 42.0).passed
    assert gated.champion == better
    assert gated.promote(better, 45.0).passed  # a retried step


def test_a_candidate_is_not_promoted_over_a_champion_of_unknown_ap(gated: RegisteredModel) -> None:
    candidate = gated.add(99.0, OTHER.tags())
    assert not gated.promote(candidate, 99.0, OTHER).passed
    known = Evaluated("1", {"box_ap": 12.0})
    assert gated.promote(candidate, 99.0, OTHER, evaluated=known).passed
    assert gated.champion == candidate


def test_the_champion_itself_passes_again(gated: RegisteredModel) -> None:
    assert gated.judge(40.0, DATA, version="1").passed
    assert not gated.judge(40.0, DATA, version="2").passed


def test_the_ap_of_a_promotion_overrides_the_ap_of_the_registration(
    gated: RegisteredModel,
) -> None:
    assert gated.promote(gated.add(5.0), 77.0).passed
    verdict = gated.judge(60.0, DATA)
    assert not verdict.passed and "no better than the 77 of the champion" in verdict.reason


def test_a_champion_that_is_promoted_again_keeps_its_ap(gated: RegisteredModel) -> None:
    candidate = gated.add(45.0)
    assert gated.promote(candidate, 45.0).passed
    gated.update(candidate, {"box_ap": 3.0}, DATA)
    assert gated.promote(candidate, 3.0).passed
    assert not gated.judge(44.0, DATA).passed and gated.judge(46.0, DATA).passed
    tags = gated.tags(candidate)
    assert tags["box_ap"] == tags[DATA.tag("box_ap")] == "45" and not gated.is_known(OTHER)
    assert gated.promote(candidate, 3.0, OTHER).passed  # metrics on other data are new
    assert not gated.judge(2.9, OTHER).passed and not gated.judge(44.0, DATA).passed


def test_tags_of_a_version_have_its_newest_metrics_and_its_metrics_on_other_data(
    gated: RegisteredModel,
) -> None:
    candidate = gated.add(5.0)
    gated.update(candidate, {"box_ap": 41.0, "mask_ap": 30.0}, DATA)
    expected = {"box_ap": "41", "mask_ap": "30", **DATA.tags()}
    assert gated.tags(candidate) == expected
    gated.update(candidate, {"box_ap": 1.0}, Protocol("", DATA.settings))
    assert gated.tags(candidate) == expected  # the data of these metrics is unknown
    gated.update(candidate, {"box_ap": 12.0}, OTHER)
    gated.update(candidate, {"box_ap": 43.0}, DATA)
    assert gated.tags(candidate) == {
        **DATA.tags(), "box_ap": "43", DATA.tag("mask_ap"): "30", DATA.tag("box_ap"): "43", OTHER.tag("box_ap"): "12"
    }  # fmt: skip


def test_the_best_of_many_concurrent_candidates_becomes_champion(gated: RegisteredModel) -> None:
    candidates = [(gated.add(ap), ap) for ap in (41.0, 44.0, 42.0, 43.0)]
    with ThreadPoolExecutor(len(candidates)) as pool:
        list(pool.map(lambda candidate: gated.promote(*candidate), candidates))
    assert gated.champion == candidates[1][0]


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
def test_a_protocol_has_the_settings_that_change_ap(override: str, same: bool) -> None:
    changed = Protocol.of(load_config("tiny", [override]), DATA.fingerprint)
    assert (changed == DATA) is (changed.digest == DATA.digest) is same


def test_matches_are_added_only_to_a_version_with_their_metrics(
    gated: RegisteredModel, store: str, tmp_path: Path, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client, folder = gated.client, matches_folder(DATA)
    (tmp_path / MATCHES).write_bytes(b"matches")
    experiment = client.create_experiment("matches", (tmp_path / "artifacts").as_uri())
    logged = client.create_logged_model(experiment, "detector").model_id
    tags = {"box_ap": "40", **DATA.tags()}
    found = client.create_model_version(gated.name, f"models:/{logged}", tags=tags)
    add_matches(client, found, DATA, {"box_ap": 41.0}, tmp_path)
    assert "the matches in " in caplog.text and "are not known to be from the same" in caplog.text
    assert not client.list_logged_model_artifacts(logged, folder)
    add_matches(client, found, DATA, {"box_ap": 40.0}, tmp_path)
    (stored,) = client.list_logged_model_artifacts(logged, folder)
    assert stored.path == f"{folder}/{MATCHES}"
    add_matches(client, found, DATA, {"box_ap": 40.0}, tmp_path)
    assert "the version already has matches of this evaluation" in caplog.text
