"""Training: the story, and the loop.

What happens at a step depends on (config, data, step) alone: the batch by its place in the stream, every random draw
by a seed made of seed, step and rank. So a restart needs no random state and goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vitdet import distributed
from vitdet.config import Config, difference, digest, from_dict, save_config, to_dict
from vitdet.data import dataset_digest, read_split, train_loader
from vitdet.data.coco import CocoSplit
from vitdet.evaluation import evaluate_detector, write_pictures
from vitdet.models import Detector, build_detector
from vitdet.progress import Tracker
from vitdet.training.checkpoint import FORMAT, Checkpoints, load_model_file, load_weights, save
from vitdet.training.meter import Meter
from vitdet.training.optim import WeightAverage, build_optimizer, set_lr
from vitdet.training.parallel import parallelize, share_statistics
from vitdet.types import Batch
from vitdet.weights import load_pretrained, resolve

log = logging.getLogger(__name__)


class Stopped(Exception):
    """SIGTERM came; the state is saved, and the same command goes on from it."""


# (identity of the data, run id of the interrupted run or None, step it goes on from) -> tracker
StartTracking = Callable[[str, str | None, int], Tracker]


def train(
    config: Config, output: str | Path, *, checkpoints: str | Path | None = None, weights: str | Path | None = None,
    start_tracking: StartTracking = lambda *_: Tracker(),
) -> Path:
    """Trains a detector and gives the path of output/model.pt; goes on where an interrupted training stopped.

    Training states go to output/checkpoints, or to a folder of their own under `checkpoints`, named by config, data
    and initial weights. `weights` is a local file to use for train.init. Raises ValueError when `output` holds a
    finished run or one of another config, Stopped after SIGTERM.
    """
    output = Path(output)
    with distributed.process_group() as device, sigterm() as stop, ExitStack() as alone:
        source = weights if weights is not None else resolve(config.train.init)
        identity = dataset_digest(config.data)
        states = Checkpoints(_states_folder(config, output, checkpoints, identity, source), config.train.keep)
        state = _state_to_go_on_from(config, output, identity, states)
        start = state["step"] if state else 0
        loader = train_loader(config.data, config.train.batch_size, config.train.seed, start, config.optim.steps,
                              distributed.rank(), distributed.world_size())
        split = loader.dataset.split
        _check_classes(config, split.class_names)
        distributed.barrier()  # nobody writes before all have looked

        detector = _fresh_detector(config, split, None if state else source, device)
        tracker = Tracker()
        if distributed.rank() == 0:
            alone.enter_context(states.locked())
            tracker = _announce(config, output, identity, states, state, start_tracking)
        loop = Loop(config, detector, loader, tracker, states, identity, device, stop, output)
        try:
            loop.begin(state)
            loop.run(start)
            if distributed.rank() == 0:
                loop.finish(split.class_names)
        except BaseException as error:
            tracker.close("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            raise
        tracker.close()
        distributed.barrier()
        return output / "model.pt"


class Loop:
    """The steps, with what they need at hand."""

    def __init__(
        self, config: Config, detector: nn.Module, loader: Iterable[Batch], tracker: Tracker, states: Checkpoints,
        identity: str, device: torch.device, stop: Callable[[], bool], output: Path,
    ) -> None:
        self.config, self.detector = config, detector
        self.optimizer = build_optimizer(detector, config.optim)
        self.average = WeightAverage(detector, config.optim.ema)
        self.tracker, self.states, self.identity, self.device, self.stop = tracker, states, identity, device, stop
        self.loader, self.output = loader, output
        self.meter = Meter(config.train.batch_size)
        self.metrics: dict[str, float] = {}  # of the last evaluation

    def begin(self, state: dict | None) -> None:
        """Goes on from a state; without one, saves the first."""
        if state is None:
            self.save(0)  # a disk that is full or a folder that is closed shows now, and the run's id is kept
            return
        load_weights(self.detector, state["model"], self.states.folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.meter.restore(state["meter"])
        self.metrics = state["metrics"]

    def run(self, start: int) -> None:
        """Steps start..steps-1. Raises Stopped, and ValueError for a loss that is not finite."""
        config, settings = self.config, self.config.train
        model = parallelize(self.detector, self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16(settings.precision, self.device))
        batches, meter = iter(self.loader), self.meter
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
                with meter.paused():
                    self.evaluate(done)
            stopped = distributed.world_size() == 1 or done % 10 == 0  # asking the others is a synchronisation
            stopped = stopped and distributed.any_of(self.stop(), self.device)
            if last or stopped or done % settings.save_every == 0:
                self.save(done)
            if stopped and not last:
                raise Stopped(f"stopped at step {done} of {config.optim.steps}; the same command goes on from there")

    def evaluate(self, step: int) -> None:
        """AP on the validation split, of the averaged weights if there are any, and pictures of what they find."""
        self.average.swap()
        share_statistics(self.detector)
        self.metrics, _ = evaluate_detector(self.detector, self.config.data, self.config.evaluate, self.device)
        if distributed.rank() == 0:
            for path in write_pictures(self.detector, self.config.data, self.output / "pictures" / f"step_{step:08d}"):
                self.tracker.artifact(path, f"pictures/{path.parent.name}")
        self.average.swap()
        self.tracker.log(self.metrics, step)

    def save(self, step: int) -> None:
        """The whole state after `step` steps, by the first process. Raises ValueError when a loss is not finite."""
        meter = self.meter.state()  # of all processes, and a state that has diverged is none to go on from
        if distributed.rank() == 0:
            self.states.save(step, {
                "config": to_dict(self.config), "model": self.detector.state_dict(),
                "optimizer": self.optimizer.state_dict(), "average": self.average.state_dict(),
                "run_id": self.tracker.run_id, "dataset_digest": self.identity, "meter": meter,
                "metrics": self.metrics,
            })
        distributed.barrier()

    def finish(self, class_names: Sequence[str]) -> None:
        """Writes the finished detector, of the averaged weights if there are any."""
        self.average.swap()
        save(self.output / "model.pt", {
            "format": FORMAT, "config": to_dict(self.config), "model": _on_cpu(self.detector.state_dict()),
            "class_names": list(class_names), "run_id": self.tracker.run_id, "step": self.config.optim.steps,
            "dataset_digest": self.identity, "metrics": self.metrics,
        })


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM only raises a flag, which the function given asks for.

    The death of torchrun counts as SIGTERM: it cannot pass a SIGKILL on, and its processes would train on unseen.
    """
    received, parent = [], os.getppid()
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread: signals are somebody else's matter
        yield lambda: False
        return
    try:
        yield lambda: bool(received) or (distributed.world_size() > 1 and os.getppid() != parent)
    finally:
        signal.signal(signal.SIGTERM, previous)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as told, or with 'auto' where the processor has instructions for it."""
    if precision == "auto":
        return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def _fresh_detector(config: Config, split: CocoSplit, source: str | Path | None, device: torch.device) -> Detector:
    """The detector before its first step; the odds of the federated loss are those of the training images."""
    torch.manual_seed(config.train.seed)
    odds = torch.tensor(split.image_counts, dtype=torch.float32).sqrt()  # detectron2: image_count ** 0.5
    detector = build_detector(config.model, config.evaluate, odds.clone()).to(device)
    if source is not None:
        loaded = load_pretrained(detector, source, config.train.init_format, split.class_names)
        for note in loaded.notes if distributed.rank() == 0 else ():
            log.info("%s: %s", source, note)
    if config.model.roi_heads.loss == "federated":
        detector.roi_heads.classification.class_weights.copy_(odds)  # a file's are of the images that it learnt from
    return detector


def _announce(config: Config, output: Path, identity: str, states: Checkpoints, state: dict | None,
              start_tracking: StartTracking) -> Tracker:
    """Writes down what is about to happen; by the first process."""
    if state is not None:
        log.info("going on from step %d of %d (%s)", state["step"], config.optim.steps, states.folder)
    save_config(config, output / "config.yaml")
    tracker = start_tracking(identity, state["run_id"] if state else None, state["step"] if state else 0)
    tracker.artifact(output / "config.yaml")
    return tracker


def _states_folder(
    config: Config, output: Path, checkpoints: str | Path | None, identity: str, source: str | Path | None
) -> Path:
    if checkpoints is None:
        return output / "checkpoints"
    initial = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source is not None else ""
    return Path(checkpoints) / hashlib.sha256(f"{digest(config)} {identity} {initial}".encode()).hexdigest()[:12]


def _state_to_go_on_from(config: Config, output: Path, identity: str, states: Checkpoints) -> dict | None:
    """The newest state, if there is one; ValueError where neither it nor `output` suits this config and data."""
    _check_output(config, output)
    state = states.latest()
    if state is not None:
        _check_state(config, identity, state, states.folder)
    return state


def _check_output(config: Config, output: Path) -> None:
    finished = output / "model.pt"
    if finished.exists():
        differing = difference(config, from_dict(load_model_file(finished)["config"]))
        what = f"with another config ({'; '.join(differing)})" if differing else "of this very config"
        raise ValueError(f"{output}: holds a finished run {what}; choose another --output or remove it")


def _check_state(config: Config, identity: str, state: dict, folder: Path) -> None:
    differing = difference(config, from_dict(state["config"]))
    if differing:
        raise ValueError(f"{folder}: holds a run with another config ({'; '.join(differing)}); choose another "
                         "--output, or go on with the same settings")
    if state["dataset_digest"] != identity:
        raise ValueError(f"{folder}: the data set has changed since this run began ({state['dataset_digest']}, now "
                         f"{identity}); choose another --output")


def _check_classes(config: Config, trained: Sequence[str]) -> None:
    data, expected = config.data, config.model.roi_heads.num_classes
    if len(trained) != expected:
        raise ValueError(f"{data.root}: {data.train_split} has {len(trained)} classes, but model.roi_heads.num_classes "
                         f"is {expected}; set it to {len(trained)}")
    validated = read_split(data, data.val_split).class_names
    if tuple(validated) != tuple(trained):
        raise ValueError(f"{data.root}: {data.train_split} and {data.val_split} have different classes "
                         f"({', '.join(sorted(set(trained) ^ set(validated))) or 'in another order'})")


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
