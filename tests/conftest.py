"""Shared fixtures: a tiny data set, and a training run on it that takes a second."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

# Set before torch is imported, for this process and its children: small models are no faster on several threads, much
# slower on a busy machine, and bitwise equality needs an equal number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Generated inputs are the same in each run of the suite; --hypothesis-profile=long tries others for
# an hour. Neither a slow example nor slow generation fails a test.
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("suite", max_examples=100, derandomize=True, **SLOW)
settings.register_profile("long", max_examples=100_000, **SLOW)
settings.load_profile("suite")
ROOT = Path(__file__).parents[1]
STEPS = 8
MINIMAL = {
    "model.backbone.rel_pos_size": 128,
    "model.pyramid.channels": 16,
    "model.roi_heads.fc_dim": 32,
    "model.roi_heads.samples": 8,
    "model.roi_heads.num_convs": 1,
    "model.mask.num_convs": 1,
    "model.mask.samples": 4,
    "model.rpn.samples": 16,
    "model.rpn.pre_nms_train": 20,
    "model.rpn.post_nms_train": 12,
    "model.rpn.pre_nms_test": 20,
    "model.rpn.post_nms_test": 8,
    "data.image_size": 128,
    "optim.steps": STEPS,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 2,
    "optim.clip": 1.0,
    "optim.ema": 0.9,
    "train.init": "",
    "train.batch_size": 2,
    "train.precision": "fp32",
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.save_every": 3,
    "evaluate.batch_size": 2,
    "evaluate.score_threshold": 0.0,
    "evaluate.max_detections": 4,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run modules with slow tests first, so that no worker is left with minutes of work at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def minimal(root: Path, **changes: object) -> list[str]:
    """Return overrides of the recipe `tiny`; optim__lr=1e-3 stands for optim.lr=1e-3."""
    settings = {
        **MINIMAL,
        "data.root": root,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in settings.items()]


def options(overrides: list[str]) -> list[str]:
    """Return the overrides as command-line options."""
    return [word for override in overrides for word in ("--set", override)]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a child process: this checkout, equal threads, MLflow in `folder`."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }


class Recorder:
    """A tracker that records points {step: {name: value}} and calls `then` with each step's values."""

    run_id = "recorded"

    def __init__(self, then: Callable[[dict[str, float], int], None] = lambda *_: None) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.status, self.then = "", then

    def log(self, values: dict[str, float], step: int) -> None:
        self.points.setdefault(step, {}).update(values)
        self.then(values, step)

    def artifact(self, path: Path, folder: str = "") -> None:
        assert path.is_file()

    def close(self, status: str = "FINISHED") -> None:
        self.status = status


def start(words: list[str], folder: Path, processes: int = 0) -> subprocess.Popen:
    """Start `python -m vitdet WORDS` in `folder`, in a new process group; under torchrun if processes >= 1."""
    launcher = (
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        if processes
        else []
    )
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "vitdet", *words],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Restore the default SIGINT handler, which a suite started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only data set of 12 training and 4 validation images."""
    from vitdet.demo.tiny import make_tiny

    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_tiny(folder, 12, 4, processes=1)
    return folder


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path) -> Path:
    """A copy of `tiny` that a test may modify."""
    return Path(shutil.copytree(tiny, tmp_path / "own"))


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The read-only folder of a finished, uninterrupted training run of `minimal`, with points.json."""
    from vitdet.config import load_config
    from vitdet.training import train

    output = tmp_path_factory.mktemp("trained") / "run"
    recorder = Recorder()
    train(load_config("tiny", minimal(tiny)), output, start_tracking=lambda *_: recorder)
    (output / "points.json").write_text(json.dumps(recorder.points))
    return output


@pytest.fixture(scope="session", autouse=True)
def training_runs_draw_one_picture() -> Iterator[None]:
    """Draw 1 picture per evaluation in this process: the default of 8 takes a third of a small run."""
    from vitdet.training import trainer

    write_one = functools.partial(trainer.write_pictures, count=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", write_one)
        yield


@pytest.fixture(scope="session", autouse=True)
def stacks_without_source() -> Iterator[None]:
    """Make inspect.stack skip source lines, which kfp does not need and which cost 3 s per pipeline."""
    real = inspect.stack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", lambda context=0: real(context))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_the_repository() -> Iterator[None]:
    """Check that no test leaves files in the repository, as MLflow does by default."""
    names = ("mlflow.db", "mlruns", "mlartifacts", "journal")
    before = [name for name in names if (ROOT / name).exists()]
    yield
    assert [name for name in names if (ROOT / name).exists()] == before


@pytest.fixture
def vitdet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Return vitdet(*words), which runs a command in a new folder: (exit code, stdout, stderr)."""
    from vitdet.cli import main

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # restored even if the command sets it
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register packaged models without the trial in a fresh process, which takes ten seconds."""
    monkeypatch.setattr("vitdet.tracking.registry.try_model", lambda *_: None)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A photo without objects."""
    path = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 40).convert("RGB").save(path)
    return path
