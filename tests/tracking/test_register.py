"""A registered model: provenance, contents, and trial before registration."""

from __future__ import annotations

import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.models import Model

import vitdet
from tests.tracking.test_tracking import start
from vitdet.checkpoint import FORMAT, load_model_file, save, save_safetensors
from vitdet.config import load_config, to_dict
from vitdet.data.protocol import Protocol
from vitdet.models import build_detector
from vitdet.predictor import Predictor
from vitdet.tracking import mlflow as tracking
from vitdet.tracking import packaged_model
from vitdet.tracking.client import Client
from vitdet.tracking.registry import register_checkpoint
from vitdet.tracking.wheel import build_wheel, requirements

NAMES = ["disc", "ring", "star", "cross", "leaf", "wave"]
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
METRICS = {"box_ap": 35.24, "mask_ap": 30.5}
CONFIG = load_config("tiny", ["tracking.model_name=detector"])
PROTOCOL = Protocol.of(CONFIG, "0123456789abcdef")


def make_checkpoint(path: Path, seed: int, run_id: str | None = None) -> Path:
    """Write a checkpoint with random weights."""
    torch.manual_seed(seed)
    config = load_config("tiny")
    detector = build_detector(config.model, config.evaluate)
    stored = {"format": FORMAT, "config": to_dict(config), "class_names": NAMES, "step": 1}
    stored |= {"model": detector.state_dict(), "run_id": run_id, "dataset_digest": "0123456789ab"}
    save(path, stored)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder with a finished run, a checkpoint and its registered version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("vitdet.tracking.registry.try_model", lambda *_: None)
        folder = tmp_path_factory.mktemp("work")
        tracker = start(folder, "", tags={"git_revision": "a" * 40})
        tracker.close()
        make_checkpoint(folder / "model.pt", 0, tracker.run_id)
        assert enter(folder, folder / "model.pt") == ("detector", "1")
    return folder


def run_of(folder: Path) -> str:
    return load_model_file(folder / "model.pt")["run_id"]


def client_of(folder: Path) -> Client:
    return tracking.open_client(tracking.tracking_uri("", folder))


def enter(folder: Path, checkpoint: Path, alias: str = "candidate") -> tuple[str, str]:
    found = register_checkpoint(
        checkpoint, folder=folder, alias=alias, config=CONFIG, metrics=METRICS, protocol=PROTOCOL
    )
    return found.name, found.version


def with_password(path: Path) -> Path:
    """Write a checkpoint whose config contains a password, which version 0.1 stored."""
    stored = load_model_file(make_checkpoint(path, 1))
    stored["config"]["tracking"]["uri"] = "http://alice:s3cret@127.0.0.1:9/?token=t0ken"
    save(path, stored)
    return path


@pytest.fixture(autouse=True)
def without_trial(untried: None) -> None:
    """Skip the trial of packaged models in a new process."""


def download(folder: Path, into: Path, artifact: str = "models:/detector@candidate") -> Path:
    return packaged_model.download(tracking.tracking_uri("", folder), artifact, into)


def test_a_version_has_its_provenance(work: Path) -> None:
    client = client_of(work)
    version = client.get_model_version_by_alias("detector", "candidate")
    assert version.run_id == run_of(work)
    expected = {"box_ap": "35.24", "mask_ap": "30.5", "git_revision": "a" * 40, **PROTOCOL.tags()}
    assert expected.items() <= version.tags.items()
    assert client.get_run(version.run_id).info.status == "FINISHED"


def test_a_version_has_the_config_at_registration(work: Path, tmp_path: Path) -> None:
    with_password(tmp_path / "model.pt")
    changes = ["gate.min_gain=0.5", "evaluate.max_detections=7", "data.val_split=test"]
    used = load_config("tiny", [*changes, "optim.lr=5", "tracking.model_name=configured"])
    given = {"config": used, "metrics": METRICS, "protocol": PROTOCOL}
    register_checkpoint(tmp_path / "model.pt", folder=work, alias="candidate", **given)
    path = download(work, tmp_path, "models:/configured@candidate/config.yaml")
    expected = load_config("tiny", [*changes, "tracking.uri=http://127.0.0.1:9/"])
    assert load_config(path) == expected


def test_registering_a_checkpoint_drops_its_stored_password(
    work: Path,
    tiny: Path,
    tmp_path: Path,
    vitdet: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = with_password(tmp_path / "old.pt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri("", work))
    code, out, err = vitdet("register", checkpoint)
    assert code == 0 and out == "vitdet, version 1 (candidate)\n", err
    (warning,) = [message for message in caplog.messages if "tracking.uri" in message]
    assert "http://***@127.0.0.1:9/?token=***" in warning and "MLFLOW_TRACKING_USERNAME" in warning
    model = download(work, tmp_path / "model", "models:/vitdet@candidate")
    config = load_model_file(model / "artifacts" / "detector.safetensors")["config"]
    assert config["tracking"]["uri"] == "http://127.0.0.1:9/"
    files = [path for path in model.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    # overrides are validated, but the stored password causes no error
    words = ["--set", f"data.root={tiny}", "--set", "data.image_size=64"]
    code, out, err = vitdet("evaluate", checkpoint, *words)
    assert code == 1 and "classes" in err and "password" not in err


def test_the_model_has_no_pickles_and_validates_its_input(work: Path, tmp_path: Path) -> None:
    model = download(work, tmp_path)
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".cloudpickle"))]
    assert "artifacts/detector.safetensors" in files and "detector.py" in files
    assert "torch==" in (model / "requirements.txt").read_text()
    loaded = mlflow.pyfunc.load_model(str(model))
    found = loaded.predict(IMAGE, params={"threshold": 1.0})
    assert list(found.columns)[:3] == ["name", "label", "score"]
    for image in (IMAGE[..., :2], IMAGE.astype(np.float32)):
        with pytest.raises(mlflow.MlflowException):
            loaded.predict(image)


def test_the_same_checkpoint_is_registered_once(work: Path) -> None:
    client = client_of(work)
    assert enter(work, work / "model.pt") == ("detector", "1")
    other = make_checkpoint(work / "other.pt", 1, run_of(work))
    assert enter(work, other, "next") == ("detector", "2")
    assert enter(work, other, "again") == ("detector", "2")
    assert enter(work, work / "model.pt") == ("detector", "1")
    aliases = client.get_registered_model("detector").aliases
    found = {name: str(number) for name, number in aliases.items()}
    assert found == {"candidate": "1", "next": "2", "again": "2"}
    untracked = make_checkpoint(work / "untracked.pt", 1)
    assert enter(work, untracked, "untracked") == enter(work, untracked) == ("detector", "3")
    assert enter(work, work / "model.pt") == ("detector", "1")


def test_a_damaged_checkpoint_is_not_registered(work: Path) -> None:
    damaged = work / "damaged.pt"
    damaged.write_bytes((work / "model.pt").read_bytes()[:1000])
    before = len(client_of(work).search_model_versions("name = 'detector'"))
    with pytest.raises(ValueError, match="not a complete vitdet checkpoint"):
        enter(work, damaged)
    assert len(client_of(work).search_model_versions("name = 'detector'")) == before


def test_the_wheel_is_complete_and_reproducible(tmp_path: Path) -> None:
    first, second = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as wheel:
        names = wheel.namelist()
        info = next(name for name in names if name.endswith("METADATA")).rpartition("/")[0]
        listed = [line.split(",")[0] for line in wheel.read(f"{info}/RECORD").decode().splitlines()]
    assert sorted(listed) == sorted(names)
    assert {"vitdet/predictor.py", "vitdet/recipes/tiny.yaml", "vitdet/models/vit.py"} <= set(names)
    assert not any("__pycache__" in name for name in names)


def test_all_files_of_the_package_are_installed() -> None:
    root = Path(vitdet.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = [*project["tool"]["setuptools"]["package-data"]["vitdet"], "**/*.py"]
    installed = {path for pattern in patterns for path in root.glob(pattern)}
    files = {path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files == installed


def test_requirements_have_the_installed_versions() -> None:
    pinned = dict(line.split("==") for line in requirements(("mlflow",)))
    assert pinned["torch"] == torch.__version__.partition("+")[0]
    assert pinned["mlflow"] == mlflow.__version__


def test_the_last_line_of_a_failed_trial_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(tmp_path)
    monkeypatch.setattr(packaged_model, "PROGRAM", "print(1)\nraise MemoryError('no memory left')")
    with pytest.raises(ValueError, match="MemoryError: no memory left\\); it is not registered"):
        packaged_model.try_model(tmp_path, wheel)
    monkeypatch.setattr(packaged_model, "PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(packaged_model, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(ValueError, match="did not respond within"):
        packaged_model.try_model(tmp_path, wheel)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is imported from outside the model's wheel is also rejected."""
    wheel, model = build_wheel(tmp_path), tmp_path / "packed" / "model"
    model.parent.mkdir()
    stored = load_model_file(make_checkpoint(tmp_path / "model.pt", 0))
    packaged_model.pack(model, Model(), stored, wheel)
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


def test_safetensors_contain_the_whole_detector(tmp_path: Path) -> None:
    stored = load_model_file(make_checkpoint(tmp_path / "model.pt", 0))
    path = tmp_path / "detector.safetensors"
    save_safetensors(path, stored)
    again = load_model_file(path)
    assert all(torch.equal(again["model"][key], tensor) for key, tensor in stored["model"].items())
    assert {**again, "model": None} == {**stored, "model": None}
    ours, theirs = (Predictor.load(model)(IMAGE, 0.0) for model in (path, tmp_path / "model.pt"))
    assert torch.equal(ours.boxes, theirs.boxes) and ours.names == theirs.names
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a complete detector"):
        load_model_file(path)
    weights = Path(vitdet.__file__).parent / "weights" / "mae_vit_tiny.safetensors"
    with pytest.raises(ValueError, match="contains weights without their config"):
        load_model_file(weights)
