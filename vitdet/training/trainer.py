"""Training: the story, and the loop.

What happens at a step depends on (config, data, step) alone: the batch by its place in the stream, every random draw
by a seed made of seed, step and rank. So a restart needs no random state and goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from vitdet import distributed
from vitdet.config import Config, difference, digest, from_dict, save_config, to_dict
from vitdet.data import dataset_digest, read_split, train_loader
from vitdet.evaluation import evaluate_detector, write_pictures
from vitdet.models import build_detector
from vitdet.training.checkpoint import FORMAT, Checkpoints, save
from vitdet.training.optim import WeightAverage, build_optimizer, set_lr
from vitdet.training.parallel import parallelize
from vitdet.weights import load_pretrained, resolve

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where figures go; `vitdet.tracking` has those that keep them."""

    run_id: str | None

    def log(self, values: dict[str, float], step: int) -> None:
        """Takes figures of a step."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Takes a file."""

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run."""


class Silent:
    """Keeps nothing."""

    run_id: str | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        """Does nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Does nothing."""

    def close(self, status: str = "FINISHED") -> None:
        """Does nothing."""


class Stopped(Exception):
    """SIGTERM came; the state is saved, and the same command goes on from it."""


# (identity of the data, run id of the interrupted run or None, step it goes on from) -> tracker
StartTracking = Callable[[str, str | None, int], Tracker]


def train(
    config: Config, output: str | Path, *, checkpoints: str | Path | None = None, weights: str | Path | None = None,
    start_tracking: StartTracking = lambda *_: Silent(),
) -> Path:
    """Trains a detector and gives the path of output/model.pt; goes on where an interrupted training stopped.

    Training states go to output/checkpoints, or to a folder of their own under `checkpoints`, named by config, data
    and initial weights. `weights` is a local file to use for train.init. Raises ValueError when `output` holds a
    finished run or one of another config, Stopped after SIGTERM.
    """
    output = Path(output)
    with distributed.process_group() as device, sigterm() as stop:
        source = weights if weights is not None else resolve(config.train.init)
        identity = dataset_digest(config.data)
        states = Checkpoints(_states_folder(config, output, checkpoints, identity, source), config.train.keep)
        _check_output(config, output)
        state = states.latest()
        _check_state(config, identity, state, states.folder)
        distributed.barrier()  # nobody writes before all have looked

        torch.manual_seed(config.train.seed)
        detector = build_detector(config.model, config.evaluate).to(device)
        if source is not None and state is None:
            load_pretrained(detector, source)
        optimizer = build_optimizer(detector, config.optim)
        average = WeightAverage(detector, config.optim.ema)
        start = 0
        if state is not None:
            detector.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average.load_state_dict(state["average"])
            start = state["step"]
            log.info("going on from step %d of %d (%s)", start, config.optim.steps, states.folder)
        tracker: Tracker = Silent()
        if distributed.rank() == 0:
            save_config(config, output / "config.yaml")
            tracker = start_tracking(identity, state["run_id"] if state else None, start)
            tracker.artifact(output / "config.yaml")
        loop = Loop(config, detector, optimizer, average, tracker, states, identity, device, stop, output / "pictures")
        try:
            metrics = loop.run(start)
        except BaseException as error:
            tracker.close("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            raise
        path = output / "model.pt"
        if distributed.rank() == 0:
            average.swap()
            save(path, {
                "format": FORMAT, "config": to_dict(config), "model": _on_cpu(detector.state_dict()),
                "class_names": list(read_split(config.data, config.data.train_split).class_names),
                "run_id": tracker.run_id, "step": config.optim.steps, "dataset_digest": identity, "metrics": metrics,
            })
            tracker.close()
        distributed.barrier()
        return path


class Loop:
    """The steps, with what they need at hand."""

    def __init__(
        self, config: Config, detector: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage,
        tracker: Tracker, states: Checkpoints, identity: str, device: torch.device, stop: Callable[[], bool],
        pictures: Path,
    ) -> None:
        self.config, self.detector, self.optimizer, self.average = config, detector, optimizer, average
        self.tracker, self.states, self.identity, self.device, self.stop = tracker, states, identity, device, stop
        self.pictures = pictures
        self.metrics: dict[str, float] = {}

    def run(self, start: int) -> dict[str, float]:
        """Steps start..steps-1; gives the last evaluation's figures. Raises Stopped, and ValueError for a loss that
        is not finite.
        """
        config, settings = self.config, self.config.train
        model = parallelize(self.detector, self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16(settings.precision, self.device))
        loader = train_loader(config.data, settings.batch_size, settings.seed, start, config.optim.steps,
                              distributed.rank(), distributed.world_size())
        batches, meter = iter(loader), Meter(settings.batch_size)
        self.detector.train()
        for step in range(start, config.optim.steps):
            with meter.waiting():
                batch = next(batches).to(self.device, non_blocking=True)
            torch.manual_seed(hash((settings.seed, step, distributed.rank())) & 0x7FFFFFFF)
            lr = set_lr(self.optimizer, step, config.optim)
            with autocast:
                losses = model(batch.images, batch.targets, batch.sizes)
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
            norm = nn.utils.clip_grad_norm_(self.detector.parameters(), config.optim.clip or math.inf)
            self.optimizer.step()
            self.average.update(step)
            meter.add(losses, norm)

            done = step + 1
            last = done == config.optim.steps
            if last or done % settings.log_every == 0:
                self.tracker.log({**meter.read(self.device), "lr": lr}, done)
            if last or done % settings.eval_every == 0:
                self.evaluate(done)
                meter.restart()
            stopped = distributed.world_size() == 1 or done % 10 == 0  # asking the others is a synchronisation
            stopped = stopped and distributed.any_of(self.stop(), self.device)
            if last or stopped or done % settings.save_every == 0:
                self.save(done)
            if stopped and not last:
                raise Stopped(f"stopped at step {done} of {config.optim.steps}; the same command goes on from there")
        return self.metrics

    def evaluate(self, step: int) -> None:
        """AP on the validation split, of the averaged weights if there are any, and pictures of what they find."""
        self.average.swap()
        self.metrics, _ = evaluate_detector(self.detector, self.config.data, self.config.evaluate, self.device)
        if distributed.rank() == 0:
            for path in write_pictures(self.detector, self.config.data, self.pictures / f"step_{step:08d}"):
                self.tracker.artifact(path, f"pictures/{path.parent.name}")
        self.average.swap()
        self.tracker.log(self.metrics, step)

    def save(self, step: int) -> None:
        """The whole state after `step` steps, by the first process."""
        if distributed.rank() == 0:
            self.states.save(step, {
                "config": to_dict(self.config), "model": self.detector.state_dict(),
                "optimizer": self.optimizer.state_dict(), "average": self.average.state_dict(),
                "run_id": self.tracker.run_id, "dataset_digest": self.identity,
            })
        distributed.barrier()


class Meter:
    """Means of the losses between two readings; they stay on the device until they are read."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forgets all, and the time until now."""
        self.sums: dict[str, Tensor] = {}
        self.count, self.waited, self.since = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """The figures of one step."""
        total = sum(loss.detach() for loss in losses.values())
        for name, value in {**losses, "loss": total, "grad_norm": grad_norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
        self.count += 1

    def read(self, device: torch.device) -> dict[str, float]:
        """Means since the last reading, images/s, seconds a step waited for data, memory in GB.

        The one synchronisation of the loop. Raises ValueError when a loss is not finite.
        """
        means = distributed.mean(torch.stack(list(self.sums.values())) / self.count).tolist()
        values = dict(zip(self.sums, means, strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(f"{', '.join(broken)} not finite: the training has diverged; try a smaller optim.lr, a "
                             "longer optim.warmup_steps, or optim.clip=1; the last checkpoint is from before")
        elapsed = time.perf_counter() - self.since
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        values |= {"images_per_second": self.count * self.batch_size / elapsed,
                   "data_wait_seconds": self.waited / self.count, "memory_gb": memory}
        self.restart()
        return values


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM only raises a flag, which the function given asks for."""
    received = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread: signals are somebody else's matter
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as told, or with 'auto' where the processor has instructions for it."""
    if precision == "auto":
        return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def _states_folder(
    config: Config, output: Path, checkpoints: str | Path | None, identity: str, source: str | Path | None
) -> Path:
    if checkpoints is None:
        return output / "checkpoints"
    initial = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source is not None else ""
    return Path(checkpoints) / hashlib.sha256(f"{digest(config)} {identity} {initial}".encode()).hexdigest()[:12]


def _check_output(config: Config, output: Path) -> None:
    from vitdet.training.checkpoint import load_model_file

    finished = output / "model.pt"
    if finished.exists():
        differing = difference(config, from_dict(load_model_file(finished)["config"]))
        what = f"with another config ({'; '.join(differing)})" if differing else "of this very config"
        raise ValueError(f"{output}: holds a finished run {what}; choose another --output or remove it")


def _check_state(config: Config, identity: str, state: dict | None, folder: Path) -> None:
    if state is None:
        return
    differing = difference(config, from_dict(state["config"]))
    if differing:
        raise ValueError(f"{folder}: holds a run with another config ({'; '.join(differing)}); choose another "
                         "--output, or go on with the same settings")
    if state["dataset_digest"] != identity:
        raise ValueError(f"{folder}: the data set has changed since this run began ({state['dataset_digest']}, now "
                         f"{identity}); choose another --output")


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
