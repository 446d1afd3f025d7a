"""A packaged model is run in a new process before it is registered."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.models import Model

import vitdet
from tests.tracking.test_register import make_checkpoint
from vitdet.checkpoint import load_model_file, save_safetensors
from vitdet.predictor import Predictor
from vitdet.tracking import packaged_model
from vitdet.tracking.packaged_model import pack
from vitdet.tracking.wheel import build_wheel


def test_the_last_line_of_a_failure_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(tmp_path)
    monkeypatch.setattr(packaged_model, "PROGRAM", "print(1)\nraise MemoryError('no memory left')")
    with pytest.raises(ValueError, match="MemoryError: no memory left\\); it is not registered"):
        packaged_model.try_model(tmp_path, wheel)
    monkeypatch.setattr(packaged_model, "PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(packaged_model, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(ValueError, match="did not answer within"):
        packaged_model.try_model(tmp_path, wheel)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is one whose package is imported from elsewhere than its wheel."""
    wheel, model = build_wheel(tmp_path), tmp_path / "packed" / "model"
    model.parent.mkdir()
    pack(model, Model(), load_model_file(make_checkpoint(tmp_path / "model.pt", 0)), wheel)
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w"):
        pass
    monkeypatch.setenv("PYTHONPATH", str(Path(vitdet.__file__).parents[1]))
    with pytest.raises(ValueError, match="the package is not imported from the wheel of the model"):
        packaged_model.try_model(model, empty)
    weights = model / "artifacts" / "detector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete detector .*it is not registered"):
        packaged_model.try_model(model, wheel)


def test_safetensors_hold_the_whole_detector(tmp_path: Path) -> None:
    stored = load_model_file(make_checkpoint(tmp_path / "model.pt", 0))
    path = tmp_path / "detector.safetensors"
    save_safetensors(path, stored)
    again = load_model_file(path)
    assert all(torch.equal(again["model"][key], one) for key, one in stored["model"].items())
    assert {**again, "model": None} == {**stored, "model": None}
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    ours, theirs = (Predictor.load(one)(image, 0.0) for one in (path, tmp_path / "model.pt"))
    assert torch.equal(ours.boxes, theirs.boxes) and ours.names == theirs.names
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a complete detector"):
        load_model_file(path)
    with pytest.raises(ValueError, match="contains weights without their config"):
        load_model_file(
            Path(packaged_model.__file__).parents[1] / "weights" / "mae_vit_tiny.safetensors"
        )
