"""Small training runs that are interrupted and compared."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from tests.conftest import Recorder, minimal
from tests.helpers.mlflow_server import free_port
from vitdet.checkpoint import load_model_file
from vitdet.config import load_config
from vitdet.training import Stopped, train

# Without random draws and with a large enough batch, one and two processes differ only by rounding.
TOGETHER = {
    "train__batch_size": 4,
    "model__rpn__samples": 4000,
    "model__rpn__positive_fraction": 1,
    "model__roi_heads__samples": 100,
    "model__roi_heads__positive_fraction": 1,
    "model__mask__samples": 100,
}
MEASURED = {"images_per_second", "data_wait_seconds", "memory_gb"}


def go(tiny: Path, output: Path, recorder: Recorder | None = None, **changes: object) -> Recorder:
    """Train; with changes["states"], states are written to a subfolder of that folder."""
    recorder, states = recorder or Recorder(), changes.pop("states", None)
    config = load_config("tiny", minimal(tiny, **changes))
    train(config, output, checkpoints=states, start_tracking=lambda *_: recorder)
    return recorder


def interrupt(what: Callable[[], None], at: int, key: str = "loss") -> Recorder:
    """Return a tracker that calls `what` when it receives this key at this step."""
    return Recorder(lambda values, step: what() if step == at and key in values else None)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def cut() -> None:
    raise KeyboardInterrupt  # like SIGKILL: nothing is saved


def cut_at(step: int, tiny: Path, output: Path, key: str = "loss", **changes: object) -> Recorder:
    recorder = interrupt(cut, step, key)
    with pytest.raises(KeyboardInterrupt):
        go(tiny, output, recorder, **changes)
    return recorder


def stop_at(step: int, tiny: Path, output: Path, key: str = "loss", **changes: object) -> Recorder:
    recorder = interrupt(terminate, step, key)
    with pytest.raises(Stopped, match=f"stopped at step {step} of "):
        go(tiny, output, recorder, **changes)
    return recorder


def refused(text: str, kind: type[Exception] = ValueError) -> pytest.RaisesExc:
    """Expect an error with a matching one-line message."""
    return pytest.raises(kind, match=text, check=lambda error: "\n" not in str(error))


def figures(points: dict) -> dict[int, dict[str, float]]:
    """Return the values that depend only on the training, not on the machine."""
    return {
        int(step): {key: value for key, value in values.items() if key not in MEASURED}
        for step, values in points.items()
    }


def state_names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("*.pt"))


def read_state(output: Path, step: int | None = None) -> dict:
    """Return the state after this step, or the newest one."""
    name = state_names(output)[-1] if step is None else f"step_{step:08d}.pt"
    return torch.load(output / "checkpoints" / name, weights_only=True)


def assert_equal(ours: dict, theirs: dict) -> None:
    """Assert that the tensors are bitwise equal by name."""
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def same_weights(path: Path, other: Path, name: str = "model.pt") -> None:
    ours, theirs = (load_model_file(folder / name)["model"] for folder in (path, other))
    assert_equal(ours, theirs)


def same_bits(path: Path, trained: Path) -> None:
    """Assert that two finished runs have bitwise equal weights, AP and states."""
    ours, theirs = (load_model_file(folder / "model.pt") for folder in (path, trained))
    assert_equal(ours.pop("model"), theirs.pop("model"))
    for key in ("config", "class_names", "metrics", "step", "fingerprints"):
        assert ours[key] == theirs[key], key
    ours, theirs = read_state(path), read_state(trained)
    for part in ("model", "average"):
        assert_equal(ours[part], theirs[part])
    for number, slot in ours["optimizer"]["state"].items():
        assert_equal(slot, theirs["optimizer"]["state"][number])


def spawn_pair(function: Callable[..., None], *given: object) -> None:
    """Run function(rank, *given) in two processes, with the environment of torchrun."""
    threads = torch.get_num_threads()
    multiprocessing.spawn(_as_rank, (free_port(), threads, function, given), nprocs=2)


def _as_rank(rank: int, port: int, threads: int, function: Callable, given: tuple) -> None:
    torch.set_num_threads(threads)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    function(rank, *given)
