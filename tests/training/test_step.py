"""One optimizer step: micro-batches equal ranks, and fp16 skips steps that overflow."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tests.conftest import Recorder, minimal
from tests.helpers.runs import (
    cut_at,
    figures,
    go,
    read_state,
    refused,
    same_bits,
    same_weights,
    spawn_pair,
)
from tests.helpers.triton_device import needs_gpu
from vitdet import distributed
from vitdet.config import Config, load_config
from vitdet.data.dataset import read_split
from vitdet.data.loader import train_loader
from vitdet.models import Detector, build_detector
from vitdet.tracking.tracker import Progress
from vitdet.training import trainer
from vitdet.training.graph import GraphedGradients
from vitdet.training.meter import Meter
from vitdet.training.step import Figures, TrainingStep
from vitdet.types import Batch

CPU = torch.device("cpu")
STEP = 3  # not the first, so that the learning rate differs from its initial value
# settings with all random draws of a step: drop path, sampled anchors and boxes, federated loss classes
DRAWING = {
    "train__batch_size": 4,
    "optim__clip": 0,
    "model__backbone__drop_path": 0.3,
    "model__roi_heads__loss": "federated",
    "model__roi_heads__federated_classes": 3,
}


class Run:
    """A detector, its training step, and its micro-batches from STEP on."""

    def __init__(self, root: Path, rank: int = 0, ranks: int = 1, **changes: object) -> None:
        self.config: Config = load_config("tiny", minimal(root, **changes))
        torch.manual_seed(0)
        detector = build_detector(self.config.model, self.config.evaluate).train()
        self.step = TrainingStep(detector, self.config, CPU)
        data, train = self.config.data, self.config.train
        split, steps = read_split(data, data.train_split), (STEP, STEP + 9)
        given = (train.batch_size, train.seed, *steps, rank, ranks, split, train.accumulate)
        self.batches: Iterator[Batch] = iter(train_loader(data, *given))

    def __call__(self, step: int = STEP) -> Figures:
        return self.step.run(step, lambda: next(self.batches), lambda _: None)

    def gradients(self) -> dict[str, Tensor]:
        parameters = dict(self.step.detector.named_parameters())
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def one_of_two(rank: int, root: Path, folder: Path) -> None:
    """Run a step with one and with two micro-batches; save results and numbers of collectives."""
    torch.set_num_threads(1)
    with distributed.process_group():
        for accumulate in (1, 2):
            setting = "blocks" if accumulate == 2 else "none"
            changes = {"train__activation_checkpointing": setting, "train__accumulate": accumulate}
            run, exchanges = Run(root, rank, 2, **DRAWING, **changes), []
            run.step.distribute()

            def count(_, bucket, exchanges=exchanges):
                exchanges.append(bucket)
                return allreduce_hook(None, bucket)

            run.step.model.register_comm_hook(None, count)
            done = run()
            content = {
                "gradients": run.gradients(),
                "norm": done.grad_norm,
                "losses": {name: distributed.mean(loss) for name, loss in done.losses.items()},
                "exchanges": len(exchanges),
                "buckets": sum(bucket.is_last() for bucket in exchanges),
            }
            torch.save(content, folder / f"{accumulate}_{rank}.pt")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_micro_batches_draw_like_the_corresponding_ranks(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """The reference runs the ranks in sequence and averages their gradients and losses."""
    alone = Run(tiny, **DRAWING, train__accumulate=4)
    done, ranks = alone(), 4 // accumulate
    runs, parts = [], []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        runs.append(Run(tiny, rank, ranks, **DRAWING, train__accumulate=accumulate))
        parts.append(runs[-1]())
    for name, gradient in alone.gradients().items():
        mean = torch.stack([run.gradients()[name] for run in runs]).mean(dim=0)
        torch.testing.assert_close(gradient, mean, rtol=1e-6, atol=1e-6, msg=name)
    for name, loss in done.losses.items():
        torch.testing.assert_close(loss, torch.stack([part.losses[name] for part in parts]).mean())
    assert len({float(part.grad_norm) for part in parts}) == ranks


@pytest.mark.slow
def test_micro_batches_equal_more_processes(tiny: Path, tmp_path: Path) -> None:
    """Compare two processes (1 or 2 micro-batches each) to one process (2 or 4)."""
    spawn_pair(one_of_two, tiny, tmp_path)
    for accumulate in (1, 2):
        run = Run(tiny, **DRAWING, train__accumulate=2 * accumulate)
        done, gradients = run(), run.gradients()
        first, second = (torch.load(tmp_path / f"{accumulate}_{rank}.pt") for rank in (0, 1))
        assert first["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(first["gradients"][name], second["gradients"][name])
            ours = first["gradients"][name]
            torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-6, msg=name)
        assert float(done.grad_norm) == pytest.approx(float(first["norm"]), rel=1e-6)
        for name, loss in done.losses.items():
            assert float(loss) == pytest.approx(float(first["losses"][name]), rel=1e-6), name
        assert first["exchanges"] > 0 and first["buckets"] == 1  # one gradient all-reduce per step


def test_the_loader_gives_the_micro_batches_in_order(tiny: Path) -> None:
    data = load_config("tiny", minimal(tiny)).data
    split = read_split(data, data.train_split)

    def ids(rank: int, world_size: int, accumulate: int) -> list[tuple[int, ...]]:
        loader = train_loader(data, 8, 0, 1, 3, rank, world_size, split, accumulate)
        found = [batch.image_ids for batch in loader]
        assert len(found) == len(loader)
        return found

    four = [ids(rank, 4, 1) for rank in range(4)]
    for rank in (0, 1):
        parts = four[2 * rank : 2 * rank + 2]
        assert ids(rank, 2, 2) == [part[step] for step in (0, 1) for part in parts]
    assert ids(0, 1, 4) == [part[step] for step in (0, 1) for part in four]


def test_a_run_with_micro_batches_resumes_bitwise_equal(tiny: Path, tmp_path: Path) -> None:
    changes = {
        "train__batch_size": 4,
        "train__accumulate": 2,
        "train__activation_checkpointing": "blocks",
        "train__save_every": 1,
        "optim__steps": 3,
    }
    whole = go(tiny, tmp_path / "whole", **changes)
    cut_at(2, tiny, tmp_path / "cut", **changes)
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    # activation checkpointing is bitwise neutral
    rest = go(tiny, tmp_path / "cut", **changes | {"train__activation_checkpointing": "none"})
    same_weights(tmp_path / "cut", tmp_path / "whole")
    assert figures(rest.points) == {step: figures(whole.points)[step] for step in (2, 3)}
    # like the number of processes, the number of micro-batches may change
    assert min(go(tiny, tmp_path / "other", **changes | {"train__accumulate": 4}).points) == 2


def overflow(step: TrainingStep) -> torch.utils.hooks.RemovableHandle:
    """Make one gradient of each later step infinite."""
    return next(step.detector.parameters()).register_hook(lambda gradient: gradient * torch.inf)


def test_a_step_whose_gradients_overflow_is_skipped(tiny: Path) -> None:
    run = Run(tiny, train__precision="fp16", optim__ema=0.5)
    step, meter = run.step, Meter(run.config.train.batch_size)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def weights() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in step.detector.named_parameters()}

    done = run(STEP)
    meter.add(*done[:2], done.skipped)
    finite = float(done.grad_norm)
    moved = weights()
    average = {name: value.clone() for name, value in step.average.weights.items()}
    handle = overflow(step)
    skipped = run(STEP + 1)
    meter.add(*skipped[:2], skipped.skipped)
    handle.remove()
    assert skipped.skipped and not skipped.grad_norm.isfinite() and not done.skipped
    assert all(torch.equal(value, moved[name]) for name, value in weights().items())
    assert step.scaler.get_scale() == 4.0
    assert {float(slots["step"]) for slots in step.optimizer.state.values()} == {1.0}
    changed = [name for name, new in step.average.weights.items() if (new != average[name]).any()]
    assert changed  # the average still moves toward the weights
    step.check()
    values = meter.read(CPU)
    assert values["skipped_steps"] == 1 and values["grad_norm"] == pytest.approx(finite)
    # the next step uses its scheduled learning rate
    after = run(STEP + 2)
    assert not after.skipped and after.lr == Run(tiny, train__precision="fp32")(STEP + 2).lr
    assert any((tensor != moved[name]).any() for name, tensor in weights().items())


class Spoiled(TrainingStep):
    """A training step whose first losses and BatchNorm statistics are infinite."""

    spoiled, scale = 1, 8.0

    def __init__(self, detector: Detector, *given: object) -> None:
        detector.norm = torch.nn.BatchNorm1d(1)
        super().__init__(detector, *given)
        self.scaler = torch.amp.GradScaler("cpu", self.scale, enabled=self.precision == "fp16")
        left = self.spoiled

        def spoil(_: object, __: object, losses: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal left
            left -= 1
            factor = torch.inf if left >= 0 else 1.0
            detector.norm.running_mean += factor
            return {name: loss * factor for name, loss in losses.items()}

        detector.register_forward_hook(spoil)


def test_a_step_whose_losses_overflow_in_fp16_is_skipped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "TrainingStep", Spoiled)
    monkeypatch.setattr(trainer, "evaluate_detector", lambda *_: ({"box_ap": 0.0}, []))
    monkeypatch.setattr(trainer, "write_pictures", lambda *_, **__: [])
    recorder, lines = Recorder(), io.StringIO()
    changes = {"optim__steps": 2, "optim__ema": 0.5, "train__eval_every": 2}
    go(tiny, tmp_path / "a", Progress(recorder, 2, 0, lines), train__precision="fp16", **changes)
    first, second = recorder.points[1], recorder.points[2]
    assert first["skipped_steps"] == 1 and "loss" not in first and "grad_norm" not in first
    assert second["skipped_steps"] == 0 and 0 < second["loss"] < math.inf
    assert "all steps skipped" in lines.getvalue()
    state = read_state(tmp_path / "a", 2)
    assert state["scaler"]["scale"] == 4.0
    for weights in (state["model"], state["average"]):
        assert all(tensor.isfinite().all() for tensor in weights.values())
    assert state["model"]["norm.running_mean"] == 1.0
    with refused(r"training has diverged \(not finite: "):
        go(tiny, tmp_path / "b", train__precision="fp32", **changes)
    monkeypatch.setattr(Spoiled, "scale", 2.0**-14)
    recorder = Recorder()
    with refused("^losses or gradients overflow in fp16 at every loss scale.*$"):
        go(tiny, tmp_path / "c", recorder, train__precision="fp16", **changes)
    assert recorder.status == "FAILED"
    assert list(recorder.points) == [1] and recorder.points[1]["skipped_steps"] == 1


def test_a_meter_of_only_skipped_steps_has_no_means() -> None:
    meter = Meter(1)
    meter.add({"loss_a": torch.tensor(2.0)}, torch.tensor(torch.nan), torch.tensor(True))
    meter.add({"loss_a": torch.tensor(torch.nan)}, torch.tensor(torch.nan), torch.tensor(True))
    values = meter.read(CPU)
    assert values["skipped_steps"] == 2 and not {"loss", "loss_a", "grad_norm"} & values.keys()
    meter.add({"loss_a": torch.tensor(torch.nan)}, torch.tensor(1.0), torch.tensor(False))
    with refused(r"training has diverged \(not finite: loss_a, loss\)"):
        meter.read(CPU)
    meter.restart()
    meter.add({"loss_a": torch.tensor(2.0)}, torch.tensor(torch.nan))
    with refused(r"\(not finite: grad_norm\)"):
        meter.read(CPU)


def test_gradients_are_unscaled_before_clipping(tiny: Path) -> None:
    """With clipping, a step in fp16 has nearly the gradient norm of a step in fp32."""
    norms, weights = [], []
    for precision in ("fp32", "fp16"):
        run = Run(tiny, train__precision=precision, optim__clip=0.1)
        run.step.scaler = torch.amp.GradScaler("cpu", 64.0, enabled=precision == "fp16")
        norms.append(float(run().grad_norm))
        clipped = torch.nn.utils.get_total_norm(list(run.gradients().values()))
        assert float(clipped) == pytest.approx(0.1, rel=1e-4)
        weights.append(torch.cat([p.flatten() for p in run.step.detector.parameters()]))
    assert norms[1] == pytest.approx(norms[0], rel=0.02) and norms[0] > 0.2


def test_the_loss_scale_is_part_of_the_state(tiny: Path) -> None:
    first, second = (Run(tiny, train__precision="fp16").step for _ in range(2))
    first.scaler.load_state_dict(first.scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 7})
    second.load_state_dict(first.state_dict())
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 32.0
    third = Run(tiny, train__precision="fp32").step  # like `auto` on a GPU with bf16
    third.load_state_dict(first.state_dict())
    assert third.state_dict()["scaler"] == {}
    second.load_state_dict(third.state_dict())
    assert second.scaler.get_scale() == 32.0


@pytest.mark.parametrize("graphed", [True, False])
def test_all_ranks_start_with_the_weights_of_rank_0(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, graphed: bool
) -> None:
    """Initial weights can differ between CPU models, and are not synchronized by later steps."""
    run, given = Run(tiny, optim__ema=0.5), []
    monkeypatch.setattr(distributed, "broadcast", lambda tensors: given.extend(tensors))
    if graphed:
        monkeypatch.setattr(run.step, "graphed", object())
    run.step.distribute()
    detector = run.step.detector
    wanted = [*detector.parameters(), *detector.buffers(), *run.step.average.weights.values()]
    assert [tensor.data_ptr() for tensor in given] == [tensor.data_ptr() for tensor in wanted]
    assert not any(tensor.requires_grad for tensor in given)


def test_recorded_steps_release_their_memory_before_an_evaluation(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs' memory pools could otherwise occupy all memory."""
    order, evaluate = [], trainer.evaluate_detector
    monkeypatch.setattr(TrainingStep, "release", lambda _: order.append("release"))

    def listening(*given: object) -> object:
        order.append("evaluate")
        return evaluate(*given)

    monkeypatch.setattr(trainer, "evaluate_detector", listening)
    go(tiny, tmp_path, optim__steps=2, train__eval_every=1)
    assert order == ["release", "evaluate"] * 2


def test_releasing_clears_graphs_and_temporary_refusals(tiny: Path) -> None:
    run = Run(tiny)
    run.step.release()  # no effect without graphs
    run.step.graphed = graphed = GraphedGradients(run.step.detector, run.step.gradients)
    graphed.graph.graphs["shapes"], graphed.graph.pool = object(), object()
    graphed.refused |= {(16, 4096): False, (16, 8192): True}  # permanently; until the next release
    gradients = graphed.gradients()
    run.step.release()
    assert not graphed.graph.graphs and graphed.graph.pool is None
    assert graphed.refused == {(16, 4096): False}
    assert all(a is b for a, b in zip(graphed.gradients(), gradients, strict=True))


@pytest.mark.slow
def test_the_fp16_loss_scale_survives_a_stop(tiny: Path, tmp_path: Path) -> None:
    changes = {"train__precision": "fp16", "optim__steps": 4, "train__save_every": 2}
    go(tiny, tmp_path / "whole", **changes)
    cut_at(3, tiny, tmp_path / "cut", "images_per_second", **changes)
    assert read_state(tmp_path / "cut", 2)["scaler"]["scale"] > 0
    go(tiny, tmp_path / "cut", **changes)
    same_bits(tmp_path / "cut", tmp_path / "whole")
    cut, whole = (read_state(tmp_path / name, 4) for name in ("cut", "whole"))
    assert cut["scaler"] == whole["scaler"]


@needs_gpu
@pytest.mark.cuda
def test_fp16_and_micro_batches_work_together_on_a_gpu(tiny: Path, tmp_path: Path) -> None:
    changes = {"train__precision": "fp16", "train__batch_size": 4, "train__accumulate": 2}
    recorder = go(tiny, tmp_path, **changes)
    assert all(values["skipped_steps"] in (0, 1) for values in recorder.points.values())
    state = read_state(tmp_path, 8)
    skipped = sum(values["skipped_steps"] for values in recorder.points.values())
    assert skipped < 8 and state["scaler"]["scale"] == 2.0 ** (16 - skipped)
    assert {int(slots["step"]) for slots in state["optimizer"]["state"].values()} == {8 - skipped}
