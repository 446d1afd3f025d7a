"""`vitdet register --metrics`: provenance of the metrics, and required data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from tests.conftest import minimal
from vitdet import stages
from vitdet.checkpoint import load_model_file, save
from vitdet.config import GateConfig, load_config, save_config
from vitdet.data.fingerprint import fingerprint
from vitdet.data.protocol import Protocol
from vitdet.evaluation.evaluator import evaluate_alike
from vitdet.files import sha256
from vitdet.tracking.champion import is_known
from vitdet.tracking.measured import beside
from vitdet.tracking.mlflow import tracking_uri

Run = Callable[..., tuple[int, str, str]]
CHAMPION = ("--alias", "champion")


@pytest.fixture
def model(own_tiny: Path, trained: Path, tmp_path: Path, untried: None) -> Path:
    """Return the checkpoint of a training run on `own_tiny`, which a test may change."""
    stored = load_model_file(trained / "model.pt")
    stored["config"]["data"]["root"] = str(own_tiny)
    path = tmp_path / "runs" / "one" / "model.pt"
    path.parent.mkdir(parents=True)
    save(path, {**stored, "run_id": None})
    return path


def another(model: Path) -> Path:
    """Write another checkpoint for the same registry; return its path."""
    path = model.parents[1] / "two" / "model.pt"
    path.parent.mkdir(exist_ok=True)
    save(path, {**load_model_file(model), "step": 1})
    return path


def client_of(model: Path) -> MlflowClient:
    uri = tracking_uri("", model.parents[1])
    return MlflowClient(uri, uri)


def raise_ap(metrics: Path, ap: float) -> None:
    """Replace the measured AP and update its recorded digest."""
    content, known = json.loads(metrics.read_text()), json.loads(beside(metrics).read_text())
    metrics.write_text(json.dumps({**content, "box_ap": ap}))
    known["metrics_sha256"] = sha256(metrics)
    beside(metrics).write_text(json.dumps(known))


def test_metrics_on_other_data_apply_only_to_that_data(
    model: Path, own_tiny: Path, vitdet: Run, tmp_path: Path
) -> None:
    metrics, plots = tmp_path / "m" / "metrics.json", tmp_path / "plots"
    words = ["--set", "data.val_split=train", "--set", "evaluate.max_detections=3"]
    assert vitdet("evaluate", model, *words, "--output", metrics, "--plots", plots)[0] == 0
    assert set(json.loads(metrics.read_text())) >= set(load_model_file(model)["metrics"])
    words = ["--metrics", metrics, "--plots", plots]
    code, out, err = vitdet("register", model, *CHAMPION, *words)
    assert code == 0 and "the first champion" in out, err
    client = client_of(model)
    # confidence requires matches, which are stored only for this protocol
    strict = GateConfig(confidence=0.9)
    tags = client.get_model_version("vitdet", "1").tags
    protocol = Protocol(tags["val_fingerprint"], tags["evaluate_settings"])
    place = {"uri": "", "folder": model.parents[1], "model_name": "vitdet"}
    assert is_known(protocol, strict, **place)
    assert not is_known(Protocol("other", protocol.settings), strict, **place)
    assert set(client.get_registered_model("vitdet").aliases) == {"candidate", "champion"}
    tags = client.get_model_version("vitdet", "1").tags
    data = load_config("tiny", minimal(own_tiny)).data
    assert tags["val_fingerprint"] == fingerprint(data, "train") != fingerprint(data, "val")
    assert "evaluate.max_detections=3" in tags["evaluate_settings"]

    # evaluated on the validation split, on which the champion has no metrics
    other = another(model)
    assert vitdet("evaluate", other, "--output", metrics)[0] == 0
    raise_ap(metrics, 99.0)
    code, _, err = vitdet("register", other, *CHAMPION, *words)
    assert code == 1 and "matches and metrics are from different evaluations (box_ap: " in err
    code, out, err = vitdet("register", other, *CHAMPION, "--metrics", metrics)
    assert code == 0 and "box AP 99, above the " in out, err
    tags = client.get_model_version("vitdet", "1").tags
    assert len([key for key in tags if key.startswith("box_ap_")]) == 2


def test_the_gate_rejects_metrics_of_unknown_origin(
    model: Path, own_tiny: Path, vitdet: Run, tmp_path: Path
) -> None:
    metrics, config, plots = (tmp_path / name for name in ("metrics.json", "config.yaml", "plots"))
    words = ["register", model, *CHAMPION, "--metrics", metrics]
    assert vitdet("evaluate", model, "--output", metrics, "--plots", plots)[0] == 0
    code, _, err = vitdet("register", another(model), "--metrics", metrics, "--plots", plots)
    assert (
        code == 1
        and f"{plots}: contains results of a different checkpoint than {another(model)}; run" in err
    )
    assert not client_of(model).search_registered_models()
    save_config(load_config("tiny", minimal(own_tiny, evaluate__max_detections=3)), config)
    code, _, err = vitdet(*words, "--config", config)
    assert code == 1 and "with different data or evaluate settings than those in --config" in err
    code, _, err = vitdet("register", another(model), *CHAMPION, "--metrics", metrics)
    assert code == 1 and "the metrics in --metrics belong to a different checkpoint" in err
    metrics.write_text(metrics.read_text().replace('"box_ap": ', '"box_ap": 1'))
    code, _, err = vitdet(*words)  # the metrics were edited
    assert code == 1 and err.count("\n") == 1
    assert (
        "the data that its metrics were measured on is unknown; run `vitdet evaluate CHECKPOINT"
        in err
    )
    save_config(load_config("tiny", minimal(own_tiny)), config)
    code, out, err = vitdet(*words, "--config", config)
    assert code == 0 and "the first champion" in out, err


def test_scoring_a_results_file_removes_the_origin_of_earlier_metrics(
    model: Path, own_tiny: Path, vitdet: Run, tmp_path: Path
) -> None:
    metrics, plots = tmp_path / "metrics.json", tmp_path / "plots"
    assert vitdet("evaluate", model, "--output", metrics, "--plots", plots)[0] == 0
    assert beside(metrics).is_file()
    annotations = own_tiny / "annotations" / "instances_val.json"
    words = ["--results", plots / "results.json", "--annotations", annotations]
    assert vitdet("evaluate", *words, "--output", metrics)[0] == 0
    assert not beside(metrics).exists()


@pytest.mark.parametrize("options", [(), ("--metrics",), ("--metrics", "--config")], ids=len)
def test_aliases_other_than_champion_need_no_data(
    model: Path, own_tiny: Path, vitdet: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    files = {"--metrics": tmp_path / "metrics.json", "--config": tmp_path / "config.yaml"}
    files["--metrics"].write_text('{"box_ap": 1.0}')
    save_config(load_config("tiny", minimal(own_tiny)), files["--config"])
    (own_tiny / "annotations" / "instances_val.json").write_text('{"images": [')
    words = [word for option in options for word in (option, files[option])]
    code, _, err = vitdet("register", model, *words)
    assert code == 0, err
    tags = client_of(model).get_model_version_by_alias("vitdet", "candidate").tags
    # only metrics from the checkpoint have known data
    assert ("val_fingerprint" in tags) is (not options)


def test_a_champion_of_another_patch_size_is_evaluated_in_its_own_image_size(
    model: Path, own_tiny: Path
) -> None:
    config = load_config("tiny", minimal(own_tiny))
    backbone = {"model__backbone__patch_size": 32, "model__backbone__rel_pos_size": 256}
    coarse = minimal(own_tiny, **backbone, data__image_size=256, optim__steps=1)
    candidate = load_config("tiny", [*coarse, "evaluate.max_detections=3"])
    names = load_model_file(model)["class_names"]
    of_data = fingerprint(config.data, config.data.val_split)
    found = evaluate_alike(model, config=candidate, class_names=names, val_fingerprint=of_data)
    words = ["evaluate.max_detections=3"]
    expected, _ = stages.evaluate(model, words, folder=model.parents[1])
    assert found["box_ap"] == expected["box_ap"]


def test_too_little_memory_for_the_champion_rejects_the_candidate(
    model: Path, vitdet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, other = tmp_path / "metrics.json", another(model)
    assert vitdet("register", model, *CHAMPION)[0] == 0
    words = ["--set", "evaluate.max_detections=3", "--output", metrics]
    assert vitdet("evaluate", other, *words)[0] == 0

    evaluate = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr("vitdet.evaluation.evaluator.evaluate", evaluate)
    output = tmp_path / "version.json"
    code, _, err = vitdet("register", other, *CHAMPION, "--metrics", metrics, "--output", output)
    last = err.splitlines()[-1]
    assert code == 1 and "cannot be evaluated: OutOfMemoryError: CUDA out of memory" in last
    registered = {"name": "vitdet", "version": "2", "alias": "candidate"}
    assert json.loads(output.read_text()) == registered
    assert vitdet("register", model, "--alias", "field")[0] == 0
    aliases = client_of(model).get_registered_model("vitdet").aliases
    assert {name: str(number) for name, number in aliases.items()} == {
        "candidate": "1", "champion": "1", "field": "1"
    }  # fmt: skip
    shutil.rmtree(other.parent)


def test_a_server_without_logged_models_is_reported_in_one_line(
    model: Path, vitdet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow 2 responds with a web page."""
    page = (
        "/api/2.0/mlflow/logged-models failed with error code 404. Response body: '<!doctype html>"
    )
    missing = MlflowException(f"{page}\n<html>'", ErrorCode.Value("ENDPOINT_NOT_FOUND"))
    monkeypatch.setattr(MlflowClient, "create_logged_model", Mock(side_effect=missing))
    code, _, said = vitdet("register", model)
    assert code == 1 and said.endswith(f"{page}; the server must be MLflow 3 or later\n")
    assert len([line for line in said.splitlines() if line.startswith("vitdet: ")]) == 1
