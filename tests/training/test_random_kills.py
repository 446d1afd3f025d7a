"""SIGKILL at random times: equal weights, each value once in MLflow, no open runs.

`python -m tests.training.test_random_kills --kills 30` does it for longer than the suite: 30 runs, each killed once, with one
process and 30 with two.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.conftest import environment, minimal, options, start

STEPS = 6
# enough states, evaluations and log lines for a kill to hit each of them
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
    return [one for child in map(int, listed) for one in (child, *children(child))]


def kill(process: subprocess.Popen) -> None:
    """Kill torchrun and its workers, which are no members of its process group."""
    for pid in (process.pid, *children(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def finish(folder: Path, data: Path, output: str, processes: int) -> float:
    """Run the command until it ends by itself; return the seconds that it took."""
    began = time.monotonic()
    process = start(words(data, output), folder, processes)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return time.monotonic() - began


def train_killed(
    folder: Path, data: Path, output: str, processes: int, moments: list[float]
) -> int:
    """Train with a kill after so many seconds of each start; return how many kills came before the end."""
    done = 0
    for moment in moments:
        process = start(words(data, output), folder, processes)
        try:
            process.communicate(timeout=moment)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            kill(process)
            done += 1
    finish(folder, data, output, processes)
    return done


def check(folder: Path, outputs: list[str], reference: str) -> dict[str, int]:
    """Check the weights and MLflow; return the counts."""
    expected = torch.load(folder / reference / "model.pt", weights_only=True)["model"]
    client = MlflowClient(environment(folder)["MLFLOW_TRACKING_URI"])
    (experiment,) = [one for one in client.search_experiments() if one.name == "vitdet"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert Counter(run.info.status for run in runs.values()) == {"FINISHED": len(outputs) + 1}
    values = 0
    for output in outputs:
        content = torch.load(folder / output / "model.pt", weights_only=True)
        model = content["model"]
        assert model.keys() == expected.keys()
        assert all(torch.equal(model[name], expected[name]) for name in expected), output
        for name in runs[content["run_id"]].data.metrics:
            steps = [one.step for one in client.get_metric_history(content["run_id"], name)]
            assert len(steps) == len(set(steps)), (output, name, steps)
            if name == "loss":
                assert sorted(steps) == list(range(1, STEPS + 1)), (output, steps)
            if name == "box_ap":
                assert sorted(steps) == [3, 6], (output, steps)
            values += len(steps)
        left = [path for path in (folder / output).rglob("*.tmp")]
        assert not left, left
    return {"equal weights": len(outputs), "runs": len(runs), "values, each once": values}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_training_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    tiny: Path, tmp_path: Path, processes: int
) -> None:
    took = finish(tmp_path, tiny, "whole", processes)
    rng = random.Random(processes)
    moments = [rng.uniform(0.3 * took, took) for _ in range(2 if processes else 3)]
    train_killed(tmp_path, tiny, "killed", processes, moments)
    check(tmp_path, ["killed"], "whole")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from vitdet.demo.tiny import make_tiny

    with tempfile.TemporaryDirectory() as work:
        make_tiny(Path(work) / "data", 12, 4, processes=1)
        for processes in args.processes:
            rng, folder = random.Random(args.seed), Path(work) / f"{processes} processes"
            folder.mkdir()
            took = finish(folder, Path(work) / "data", "whole", processes)
            outputs, kills = [], 0
            while kills < args.kills:
                outputs.append(f"run{len(outputs)}")
                moment = [rng.uniform(0, 1.2 * took)]
                kills += train_killed(folder, Path(work) / "data", outputs[-1], processes, moment)
                print(f"{processes} processes: {kills} kills", flush=True)
            print(processes, "processes:", kills, "kills,", check(folder, outputs, "whole"))
