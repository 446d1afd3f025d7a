"""Real processes, killed and restarted, with and without torchrun, tracked by MLflow."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import distributed as dist

from tests.conftest import STEPS, Recorder, environment, minimal, options, start
from tests.helpers.runs import TOGETHER, cut_at, figures, go, same_bits, spawn_pair
from vitdet import distributed
from vitdet.checkpoint import load_model_file
from vitdet.training import trainer
from vitdet.types import Batch

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def seen(root: Path, output: Path) -> tuple[list[tuple[int, ...]], Recorder]:
    """Train; return the image IDs of every batch of this process, and the recorder."""
    image_ids = []

    class Listening(trainer.TrainingStep):
        def forward_backward(self, batch: Batch, at: Callable) -> dict[str, torch.Tensor]:
            image_ids.append(batch.image_ids)
            return super().forward_backward(batch, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainingStep", Listening)
        return image_ids, go(root, output, **TOGETHER)


def listen(rank: int, root: Path, output: Path) -> None:
    image_ids, recorder = seen(root, output)
    content = json.dumps([image_ids, recorder.points])
    output.with_name(f"rank{rank}.json").write_text(content)


def uninterrupted_pair(tiny: Path, folder: Path) -> None:
    """Train folder/run in two processes; rank0.json and rank1.json have their images and points."""
    spawn_pair(listen, tiny, folder / "run")


def apart(rank: int, root: Path, folder: Path) -> None:
    """Simulate machines without a shared folder: rank 1 does not find the states of rank 0."""
    if rank == 1:
        trainer.Checkpoints.all = lambda _: []
    go(root, folder, **TOGETHER)


@pytest.mark.slow
def test_processes_without_a_shared_folder_end_at_once(tiny: Path, tmp_path: Path) -> None:
    cut_at(4, tiny, tmp_path, **TOGETHER)
    with pytest.raises(
        Exception, match=r"found states from different steps \(3, 0\); all processes must share"
    ):
        spawn_pair(apart, tiny, tmp_path)
    assert min(go(tiny, tmp_path, **TOGETHER).points) == 4  # resumed from the state after step 3


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Read stderr up to the line with this text."""
    seen = ""
    while text not in seen:
        line = process.stderr.readline()
        assert line, f"it ended without {text!r}:\n{seen}"
        seen += line


def finish(process: subprocess.Popen) -> str:
    """Wait for exit code 0; return stderr."""
    output, errors = process.communicate()
    assert process.returncode == 0 and output == "run/model.pt\n", errors
    return errors


def tracked(folder: Path) -> tuple[MlflowClient, Run]:
    """Return the folder's MLflow client and its only run."""
    # imported here because the processes of `uninterrupted_pair` also import this module
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return client, run


def killed_alone(tiny: Path, folder: Path) -> None:
    """Train folder/run in one process; restart it after SIGTERM, and again after SIGKILL."""
    words = ["train", "tiny", *options(minimal(tiny)), "--output", "run"]
    first = random.randrange(1, STEPS - 3)
    process = start(words, folder)
    wait_for(process, f"step {first}/{STEPS}")
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    stopped = int(re.search(rf"stopped at step (\d+) of {STEPS}; run the same command", errors)[1])
    assert first <= stopped < STEPS
    process = start(words, folder)
    wait_for(process, f"step {random.randrange(stopped + 1, max(STEPS, stopped + 2))}/{STEPS}")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(words, folder))


def killed_pair(tiny: Path, folder: Path) -> None:
    """Train folder/run in two processes under torchrun; restart them after SIGKILL."""
    words = ["train", "tiny", *options(minimal(tiny, **TOGETHER)), "--output", "run"]
    process = start(words, folder, processes=2)
    at = random.randrange(1, STEPS)
    wait_for(process, f"step {at}/{STEPS}")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, workers)):  # workers have their own process groups
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    # the run resumed
    assert f"of {STEPS} (run/checkpoints)" in finish(start(words, folder, processes=2))
    trained, (client, run) = (folder / "run" / "model.pt").read_bytes(), tracked(folder)
    # simulates a kill before the status was set to FINISHED
    client.update_run(run.info.run_id, "RUNNING")
    # torchrun restarts a finished rank if another node is lost at the very end
    assert "run: already complete, nothing to do" in finish(start(words, folder, processes=2))
    assert (folder / "run" / "model.pt").read_bytes() == trained
    assert tracked(folder)[1].info.status == "FINISHED"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an MLflow database with tables, which take seconds to create."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def folders(
    tiny: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """Run the three trainings concurrently, as imports take most of their time."""

    def make(scene: Callable[[Path, Path], None]) -> Path:
        folder = made[scene]
        shutil.copy(store, folder)
        scene(tiny, folder)
        return folder

    scenes = (killed_pair, killed_alone, uninterrupted_pair)
    made = {scene: tmp_path_factory.mktemp(scene.__name__) for scene in scenes}
    with ThreadPoolExecutor(len(scenes)) as pool:
        yield {scene.__name__: pool.submit(make, scene) for scene in scenes}


@pytest.mark.slow
def test_killed_processes_resume_the_same_mlflow_run(
    folders: dict[str, Future[Path]], trained: Path
) -> None:
    folder = folders["killed_alone"].result()
    same_bits(folder / "run", trained)
    assert not list((folder / "run").rglob(".*.tmp"))
    client, run = tracked(folder)
    assert run.info.run_id == load_model_file(folder / "run" / "model.pt")["run_id"]
    assert run.info.status == "FINISHED"
    expected = figures(json.loads((trained / "points.json").read_text()))
    for name in ("loss", "loss_mask", "lr", "grad_norm", "box_ap"):
        history = client.get_metric_history(run.info.run_id, name)
        wanted = {step: values[name] for step, values in expected.items() if name in values}
        assert [(point.step, point.value) for point in history] == list(wanted.items()), name


@pytest.mark.slow
def test_two_processes_resume_after_sigkill_under_torchrun(
    folders: dict[str, Future[Path]],
) -> None:
    killed, whole = (folders[name].result() for name in ("killed_pair", "uninterrupted_pair"))
    same_bits(killed / "run", whole / "run")


@pytest.mark.slow
def test_one_and_two_processes_see_the_same_images_in_the_same_order(
    folders: dict[str, Future[Path]], tiny: Path, tmp_path: Path
) -> None:
    pair = folders["uninterrupted_pair"].result()
    image_ids, alone = seen(tiny, tmp_path / "run")
    ranks = [json.loads((pair / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    (ids0, points), (ids1, _) = ranks
    assert [list(ids) for ids in image_ids] == [a + b for a, b in zip(ids0, ids1, strict=True)]
    assert len(ids0) == STEPS and len({image for ids in ids0 + ids1 for image in ids}) > 6
    first, other = alone.points[1], points["1"]
    for name in ("loss", "loss_cls", "loss_rpn_cls", "loss_rpn_loc", "loss_mask"):
        assert other[name] == pytest.approx(first[name], rel=0.05), name
    assert points[str(STEPS)]["box_ap"] >= 0  # over the images of both processes


@pytest.mark.slow
def test_two_processes_evaluate_like_one_process(trained: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(trained / "model.pt"), "--output", "metrics.json"]
    process = start(words, tmp_path, processes=2)
    output, errors = process.communicate()
    assert process.returncode == 0 and output.count("mask ") == 1, errors  # one results table
    expected = load_model_file(trained / "model.pt")["metrics"]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: found[name] for name in expected} == pytest.approx(expected)


class Clock:
    """Replaces the module `time` for several threads: time passes only while all of them sleep.

    Therefore, every thread runs in each interval, however slow the machine is.
    """

    def __init__(self, threads: int) -> None:
        self.now, self.awake = 0.0, threads
        self.wakes: list[float] = []
        self.condition = threading.Condition()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.condition:
            until = self.now + seconds
            self.wakes.append(until)
            self.leave()
            self.condition.wait_for(lambda: self.now >= until)

    def leave(self) -> None:
        """Mark the calling thread as asleep or ended; if no thread is awake, wake the next."""
        with self.condition:
            self.awake -= 1
            if not self.awake and self.wakes:
                self.now = min(self.wakes)
                self.awake = self.wakes.count(self.now)
                self.wakes = [until for until in self.wakes if until > self.now]
                self.condition.notify_all()


class CountingStore(dist.HashStore):
    """Counts all calls of `check`, and the calls with an empty launch ID."""

    def __init__(self) -> None:
        super().__init__()
        self.checks = self.empty = 0

    def check(self, keys: list[str]) -> bool:
        self.checks += 1
        self.empty += any(key.startswith("/") for key in keys)
        return super().check(keys)


def synchronize(
    store: dist.Store,
    *numbers: int,
    count: int = 3,
    starts: Mapping[int, float] = MappingProxyType({}),
) -> dict[int, tuple[str, list[int]]]:
    """Return results of ranks `numbers` of `count`, run in threads; `starts` has delays in seconds."""
    clock = Clock(len(numbers))

    def run(number: int) -> tuple[str, list[int]]:
        try:
            if number in starts:
                clock.sleep(starts[number])
            return distributed._synchronize_launch(store, number, count)
        finally:
            clock.leave()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(numbers)) as pool:
        patch.setattr(distributed, "time", clock)
        return dict(zip(numbers, pool.map(run, numbers), strict=True))


def test_each_launch_on_a_store_has_its_own_id() -> None:
    """Keys of earlier launches in the store, complete or not, are ignored."""
    store, ids = dist.HashStore(), set()
    for _ in range(3):
        joined = synchronize(store, 2, 1, 0, starts={1: 7.0, 0: 30.0})
        ((launch_id, missing),) = {(launch, tuple(missing)) for launch, missing in joined.values()}
        ids.add(launch_id)
        assert missing == ()
        # ranks of a new launch do not join the old launch
        assert synchronize(store, 1, 2) == {1: (launch_id, [0]), 2: (launch_id, [0])}
        assert synchronize(store, 0)[0][1] == [1, 2]
    assert len(ids) == 3
    assert synchronize(dist.HashStore(), 0, count=1)[0][1] == []


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_did_not_join_are_named(late: int) -> None:
    """Every rank that joined names the missing ranks, even if an earlier launch left keys."""
    store = dist.HashStore()
    assert synchronize(store, 1, 2) == {1: ("", [0]), 2: ("", [0])}
    for _ in range(2):
        joined = synchronize(store, 0, 1, starts={late: 9.0})
        assert [missing for _, missing in joined.values()] == [[2], [2]]
        (launch_id, missing), (launch_id, others) = synchronize(store, 1, 2).values()
        assert missing == others == [0]
        assert synchronize(store, 0)[0][1] == [1, 2]  # leaves an incomplete launch
        assert synchronize(store, 1)[1][1] == [0, 2]


def test_a_rank_restarted_after_joining_waits_for_the_next_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    (launch_id,) = {launch for launch, _ in synchronize(store, 0, 1, 2).values()}
    assert synchronize(store, 1) == {1: (launch_id, [0])}
    joined = synchronize(store, 1, 2, 0, starts={2: 60.0, 0: 200.0})
    ((other, missing),) = {(launch, tuple(missing)) for launch, missing in joined.values()}
    assert other != launch_id and missing == ()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 1, 3)]))
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=0))
    with pytest.raises(TimeoutError, match="rank 0 of 3 did not join within 0 seconds") as error:
        distributed._join()
    assert str(error.value).endswith("; rank 0 joined an earlier launch and did not start again")


def test_requests_per_rank_do_not_grow_with_the_world_size() -> None:
    """The number of requests per rank and poll is constant, even before rank 0 publishes the launch."""
    polls = distributed.JOIN_TIMEOUT.total_seconds() / distributed.POLL
    stores = {count: CountingStore() for count in (2, 64)}
    for count, store in stores.items():
        assert synchronize(store, 0, count=count)[0][1] == list(range(1, count))
        assert store.checks - (count - 1) < polls + 3  # count - 1 requests list missing ranks
        store.checks = 0
        launch_id, missing = synchronize(store, 1, count=count)[1]
        assert missing == [0, *range(2, count)]
        assert store.checks - (count - 1) < 2 * polls + 5
    store = CountingStore()
    assert synchronize(store, 1) == {1: ("", [0])} and not store.empty


def test_a_single_process_is_rank_0_of_1() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.mean(value), value)
    assert distributed.gather_objects("a") == distributed.all_gather_objects("a") == ["a"]
    assert distributed.async_max(15)() == 15 and distributed.async_max(0)() == 0
    with distributed.process_group() as device:
        assert distributed.world_size() == 1 and device.type in ("cpu", "cuda")


REFUSED = """import sys
from vitdet.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(("batch", "fitting"), [(12, "8 or 16"), (2, "8")])
def test_an_indivisible_batch_is_refused_at_once(tmp_path: Path, batch: int, fitting: str) -> None:
    words = ["train", "tiny", "--set", f"train.batch_size={batch}", "--set", "data.root=none"]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *words, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**environment(tmp_path), "WORLD_SIZE": "8", "RANK": "3"},
    )
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr == (
        f"vitdet: train.batch_size must be a multiple of 8 (the number of processes), got {batch}; "
        f"set it to {fitting}, or start a different number of processes\n"
    )
