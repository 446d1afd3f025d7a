"""Shared fixtures: a tiny data set, and a training on it that takes a second."""

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

# Before torch is imported, here and in all processes of the tests: small models are no faster on several threads, on a
# busy machine far slower, and equal bits need an equal number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Generated inputs: the same ones in each run of the suite; --hypothesis-profile=long tries others for
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
    """Overrides of the recipe `tiny`; a change is optim__lr=1e-3 for optim.lr."""
    settings = {
        **MINIMAL,
        "data.root": root,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in settings.items()]


def options(overrides: list[str]) -> list[str]:
    """The same for a command line."""
    return [word for override in overrides for word in ("--set", override)]


def environment(folder: Path) -> dict[str, str]:
    """For a process of ours: this package, as many threads as here, MLflow's file in `folder`."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }


class Recorder:
    """A tracker that keeps the points {step: {name: value}} and then calls `then` with the step's values."""

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
    """`python -m vitdet WORDS` in `folder`, in a process group of its own; under torchrun with 1 process and more."""
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
    """SIGINT works as at a terminal: a suite started by a script in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 4 validation images; not to be changed."""
    from vitdet.demo.tiny import make_tiny

    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_tiny(folder, 12, 4, processes=1)
    return folder


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "own"))


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of `minimal` in one go; points.json has its points. Not to be changed."""
    from vitdet.config import load_config
    from vitdet.training import train

    output = tmp_path_factory.mktemp("trained") / "run"
    recorder = Recorder()
    train(load_config("tiny", minimal(tiny)), output, start_tracking=lambda *_: recorder)
    (output / "points.json").write_text(json.dumps(recorder.points))
    return output


@pytest.fixture(scope="session", autouse=True)
def trainings_draw_one_picture() -> Iterator[None]:
    """Not the default of 8 per evaluation, which take a third of the time of a small training run (only in this
    process)."""
    from vitdet.training import trainer

    write_one = functools.partial(trainer.write_pictures, count=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", write_one)
        yield


@pytest.fixture(scope="session", autouse=True)
def stacks_without_source() -> Iterator[None]:
    """kfp looks at the names of its callers for each setting of each task.

    The lines of source that inspect.stack finds as well cost 3 s per pipeline with as many modules as tests import.
    """
    real = inspect.stack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", lambda context=0: real(context))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_the_repository() -> Iterator[None]:
    """MLflow writes into the current folder unless it is told otherwise."""
    names = ("mlflow.db", "mlruns", "mlartifacts", "journal")
    before = [name for name in names if (ROOT / name).exists()]
    yield
    assert [name for name in names if (ROOT / name).exists()] == before


@pytest.fixture
def vitdet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """vitdet(*words) runs a command in this process, in a folder of its own: (exit code, stdout, stderr)."""
    from vitdet.cli import main

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed models are registered without their trial in a fresh process, which takes ten seconds."""
    monkeypatch.setattr("vitdet.tracking.registry.try_model", lambda *_: None)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A photo of nothing."""
    path = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 40).convert("RGB").save(path)
    return path
