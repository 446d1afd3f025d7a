"""BatchNorm in training: statistics after a restart, in the EMA, and on all ranks."""

from __future__ import annotations

import copy
import json
import logging
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from tests.conftest import Recorder, minimal
from tests.helpers.runs import cut, figures, interrupt, same_bits
from vitdet.checkpoint import load_model_file
from vitdet.config import Config, load_config
from vitdet.models import vitae
from vitdet.models.vit import Size
from vitdet.training import parallel, train, trainer
from vitdet.training.optim import WeightAverage

NORM = "backbone.blocks.1.pcm.1"
CHANGES = {"model__backbone__name": "vitae_b", "optim__steps": 6, "train__batch_size": 2}


def small(root: Path, **changes: object) -> Config:
    """Reduce ViTAE-B to two narrow blocks; return a config that uses it."""
    vitae.SIZES["vitae_b"] = Size(32, 2, 2, (1,), 4.0)
    return load_config("tiny", minimal(root, **CHANGES, **changes))


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitae, "SIZES", dict(vitae.SIZES))


def test_statistics_survive_a_stop(tiny: Path, tmp_path: Path) -> None:
    config = small(tiny)
    recorders = [Recorder(), interrupt(cut, 4), Recorder()]
    train(config, tmp_path / "whole", start_tracking=lambda *_: recorders[0])
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", start_tracking=lambda *_: recorders[1])
    train(config, tmp_path / "cut", start_tracking=lambda *_: recorders[2])
    same_bits(tmp_path / "cut", tmp_path / "whole")
    whole = figures(recorders[0].points)
    assert {step: whole[step] for step in (4, 5, 6)} == figures(recorders[2].points)

    shipped = load_model_file(tmp_path / "whole" / "model.pt")["model"]
    state = torch.load(tmp_path / "whole" / "checkpoints" / "step_00000006.pt", weights_only=True)
    # model.pt contains the average
    for name in (f"{NORM}.running_mean", f"{NORM}.running_var", f"{NORM}.weight"):
        assert torch.equal(shipped[name], state["average"][name])
        assert not torch.equal(shipped[name], state["model"][name])
    assert state["model"][f"{NORM}.num_batches_tracked"] == 6


def test_the_weight_average_includes_the_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = WeightAverage(model, 0.5)
    started = model[1].running_mean.clone()
    model[1].running_mean += 8
    average.update(1000)
    average.swap()
    torch.testing.assert_close(model[1].running_mean, started + 4)
    average.swap()
    torch.testing.assert_close(model[1].running_mean, started + 8)


def one_of_two(rank: int, ports: list[int], root: Path, folder: Path) -> None:
    """Train without and with a stop after step 4; record the first run's log and statistics."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    parallel.log.addHandler(handler)
    norms: list[list[float]] = []
    evaluate = trainer.evaluate_detector

    def listening(detector: nn.Module, *given: object) -> object:
        norms.append(detector.get_submodule(NORM).running_mean.tolist())
        return evaluate(detector, *given)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def together(output: str) -> None:  # on a new port, as the previous may still be open
        os.environ["MASTER_PORT"] = str(ports.pop())
        train(small(root), folder / output)

    trainer.evaluate_detector = listening
    together("whole")
    (folder / f"rank{rank}.json").write_text(json.dumps([said, norms]))
    trainer.evaluate_detector = interrupted  # interrupts both ranks after step 4
    with pytest.raises(KeyboardInterrupt):
        together("cut")
    trainer.evaluate_detector = evaluate
    together("cut")


@pytest.mark.slow
def test_two_processes_without_gpus_evaluate_equal_models(tiny: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for listener in free:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in free]
    multiprocessing.spawn(one_of_two, (ports, tiny, tmp_path), nprocs=2)
    same_bits(tmp_path / "cut", tmp_path / "whole")
    (said, norms), (silent, others) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)
    )
    (line,) = said
    assert "BatchNorm statistics are per process: results with 2 processes" in line
    # the ranks train on different images but evaluate equal models
    assert silent == [] and len(norms) == 2 and norms == others


def test_separate_statistics_of_micro_batches_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, device = nn.Sequential(nn.BatchNorm2d(4)), torch.device("cpu")
    assert parallel.parallelize(model, device, 1) is model and not caplog.messages
    assert parallel.parallelize(nn.Linear(2, 2), device, 2) and not caplog.messages
    assert parallel.parallelize(model, device, 2) is model
    assert len(caplog.messages) == 1 and "train.accumulate=2 is not equivalent" in caplog.text


def test_norms_are_synchronized_in_place_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before = copy.deepcopy(model.state_dict())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    monkeypatch.setattr(parallel.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda module, **_: module)
    assert parallel.parallelize(model, torch.device("cuda", 0)) is model
    assert type(model[1][0]) is nn.SyncBatchNorm and model.state_dict().keys() == before.keys()
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        assert tensor is tensors[name]  # the optimizer and the average refer to these tensors
