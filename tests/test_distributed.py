"""Real processes: killed and started again, alone and under torchrun, tracked by MLflow."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from tests.conftest import STEPS, Recorder, minimal, options, start
from tests.test_trainer import figures, same_bits
from vitdet import distributed
from vitdet.config import load_config
from vitdet.training import train, trainer
from vitdet.training.checkpoint import load_model_file

# No random draw of proposals and a batch that is not too small, so that one and two processes differ by rounding only.
TOGETHER = {"train__batch_size": 4, "model__rpn__samples": 4000, "model__rpn__positive_fraction": 1,
            "model__roi_heads__samples": 100, "model__roi_heads__positive_fraction": 1, "model__mask__samples": 100}


class Listener(Recorder):
    """Also keeps the image ids of every batch of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.image_ids: list[tuple[int, ...]] = []

    def train(self, root: Path, output: Path, changes: dict) -> None:
        """Trains and listens at the loader."""
        loader = trainer.train_loader

        def listening(*given: object) -> object:
            made = loader(*given)
            collate = made.collate_fn

            def heard(samples: list) -> object:
                batch = collate(samples)
                self.image_ids.append(batch.image_ids)
                return batch

            made.collate_fn = heard
            return made

        trainer.train_loader = listening
        try:
            train(load_config("tiny", minimal(root, **changes)), output, start_tracking=lambda *_: self)
        finally:
            trainer.train_loader = loader


def one_of_two(rank: int, threads: int, port: int, root: Path, output: Path, changes: dict) -> None:
    """What torchrun does, with a listener."""
    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    listener = Listener()
    listener.train(root, output, changes)
    output.with_name(f"rank{rank}.json").write_text(json.dumps([listener.image_ids, listener.points]))


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training by two processes, beside what each of them saw."""
    output = tmp_path_factory.mktemp("pair") / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_of_two, (torch.get_num_threads(), port, tiny, output, TOGETHER), nprocs=2)
    return output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow file with its tables, which take seconds to make."""
    from mlflow import MlflowClient  # here: the processes of `pair` import this module too

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Path:
    """A folder with such a file."""
    shutil.copy(prepared, tmp_path)
    return tmp_path


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads its stderr up to this text; all that was read."""
    seen = ""
    while text not in seen:
        line = process.stderr.readline()
        assert line, f"it ended without {text!r}:\n{seen}"
        seen += line
    return seen


def test_killed_processes_go_on_under_one_run(tiny: Path, trained: Path, store: Path) -> None:
    from mlflow import MlflowClient

    words = ["train", "tiny", *options(minimal(tiny)), "--output", "run"]
    first, second = sorted(random.sample(range(1, STEPS), 2))
    process = start(words, store)
    wait_for(process, f"step {first}/{STEPS}")
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on from there" in errors.splitlines()[-1], errors
    process = start(words, store)
    wait_for(process, f"step {second}/{STEPS}") if f"stopped at step {second} " not in errors else None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(words, store)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and output == "run/model.pt\n", errors
    same_bits(store / "run", trained)
    assert not list((store / "run").rglob(".*.tmp"))

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.run_id == load_model_file(store / "run" / "model.pt")["run_id"]
    assert run.info.status == "FINISHED"
    expected = figures(json.loads((trained / "points.json").read_text()))
    for name in ("loss", "loss_mask", "lr", "grad_norm", "box_ap"):
        history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        assert history == [(step, values[name]) for step, values in expected.items() if name in values], name


def test_two_processes_under_torchrun_killed_and_started_again(tiny: Path, pair: Path, store: Path) -> None:
    words = ["train", "tiny", *options(minimal(tiny, **TOGETHER)), "--output", "run"]
    process = start(words, store, processes=2)
    at = random.randrange(1, STEPS)
    wait_for(process, f"step {at}/{STEPS}")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):  # the workers are no members of its group
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    process = start(words, store, processes=2)
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0 and output == "run/model.pt\n", errors
    assert at < 3 or f"of {STEPS} (run/checkpoints)" in errors, errors
    same_bits(store / "run", pair)


def test_one_and_two_processes_see_the_same_images_in_the_same_order(tiny: Path, pair: Path, tmp_path: Path) -> None:
    alone = Listener()
    alone.train(tiny, tmp_path / "run", TOGETHER)
    (ids0, points), (ids1, _) = (json.loads(pair.with_name(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert [list(ids) for ids in alone.image_ids] == [a + b for a, b in zip(ids0, ids1, strict=True)]
    assert len(ids0) == STEPS and len({image for ids in ids0 + ids1 for image in ids}) > 6
    first, other = alone.points[1], points["1"]
    for name in ("loss", "loss_cls", "loss_rpn_cls", "loss_rpn_loc", "loss_mask"):
        assert other[name] == pytest.approx(first[name], rel=0.05), name
    assert points[str(STEPS)]["box_ap"] >= 0  # of both processes' images


def test_one_process_is_the_first_of_one() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.mean(value), value) and distributed.all_gather_objects("a") == ["a"]
    assert distributed.any_of(True, torch.device("cpu")) and not distributed.any_of(False, torch.device("cpu"))
    with distributed.process_group() as device:
        assert distributed.world_size() == 1 and device.type in ("cpu", "cuda")
