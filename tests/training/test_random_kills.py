"""SIGKILL at random times: equal weights, each value once in MLflow, no open runs.

KILL_SEEDS=30 repeats the test with 30 seeds instead of one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import environment, minimal, options, start
from tests.helpers.runs import same_weights
from vitdet.checkpoint import load_model_file

STEPS = 6
# enough states, evaluations and log lines for kills at each of them
SETTINGS = {
    "optim__steps": STEPS,
    "train__eval_every": 3,
    "train__save_every": 2,
    "data__workers": 0,
}


def words(data: Path, output: str) -> list[str]:
    return ["train", "tiny", *options(minimal(data, **SETTINGS)), "--output", output]


def children(pid: int) -> list[int]:
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [process for child in map(int, listed) for process in (child, *children(child))]


def kill(process: subprocess.Popen) -> None:
    """Kill torchrun and its workers, which have their own process groups."""
    for pid in (process.pid, *children(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def finish(folder: Path, data: Path, output: str, processes: int) -> float:
    """Run the command until it ends; return its duration in seconds."""
    began = time.monotonic()
    process = start(words(data, output), folder, processes)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILL_SEEDS", "1"))))
@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_killed_at_random_times_equals_an_uninterrupted_run(
    tiny: Path, tmp_path: Path, processes: int, seed: int
) -> None:
    took = finish(tmp_path, tiny, "whole", processes)
    rng = random.Random(processes + 10 * seed)
    for _ in range(2 if processes else 3):  # each start ends or is killed
        process = start(words(tiny, "killed"), tmp_path, processes)
        try:
            process.communicate(timeout=rng.uniform(0.3 * took, took))
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            kill(process)
    finish(tmp_path, tiny, "killed", processes)
    content = load_model_file(tmp_path / "killed" / "model.pt")
    same_weights(tmp_path / "killed", tmp_path / "whole")
    client = MlflowClient(environment(tmp_path)["MLFLOW_TRACKING_URI"])
    (experiment,) = [each for each in client.search_experiments() if each.name == "vitdet"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 2
    values = {"loss": list(range(1, STEPS + 1)), "box_ap": [3, 6]}
    for name in runs[content["run_id"]].data.metrics:
        history = client.get_metric_history(content["run_id"], name)
        steps = sorted(point.step for point in history)
        assert steps == values.get(name, sorted(set(steps))), (name, steps)
    assert not list((tmp_path / "killed").rglob("*.tmp"))
