"""Training a detector.

train.seed and the number of a step determine its batch and its random numbers. Therefore a resumed
run needs no saved random state and computes the same values as an uninterrupted run. The values are
bitwise identical on a CPU; on a GPU, some kernels add in a nondeterministic order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitdet import distributed
from vitdet.checkpoint import FORMAT, Checkpoints, load_weights, save
from vitdet.config import Config, check_tracking, from_dict, save_config, to_dict
from vitdet.config.digest import difference
from vitdet.data import fingerprint
from vitdet.data.dataset import read_split
from vitdet.data.loader import configure_process, release_memory, train_loader
from vitdet.data.protocol import settings_of
from vitdet.evaluation.evaluator import Cancelled, evaluate_detector
from vitdet.evaluation.pictures import write_pictures
from vitdet.models import Detector
from vitdet.tracking.tracker import Tracker
from vitdet.training.best import Best
from vitdet.training.initial import fresh_detector
from vitdet.training.inspection import check_classes, inspect_data
from vitdet.training.meter import Meter
from vitdet.training.optim import rate_note
from vitdet.training.parallel import share_statistics
from vitdet.training.profile import STEPS, ProfiledBatches
from vitdet.training.resume import is_complete, state_to_resume, states_folder
from vitdet.training.saver import Saver
from vitdet.training.step import TrainingStep
from vitdet.training.stop import Stop, Stopped, stop_signals, warn_of_short_grace
from vitdet.training.watchdog import LONG, Stage, Watchdog, watching
from vitdet.types import Batch
from vitdet.weights import resolve

log = logging.getLogger(__name__)

# (data fingerprint, ID of the tracked run to continue or None, completed steps) -> tracker
StartTracking = Callable[[str, str | None, int], Tracker]


def train(
    config: Config,
    output: str | Path,
    *,
    checkpoints: str | Path | None = None,
    weights: str | Path | None = None,
    start_tracking: StartTracking = lambda *_: Tracker(),
    profile: bool = False,
) -> Path:
    """Train a detector, or resume an interrupted run; return the path of output/model.pt.

    A resumed run may change operational settings (see `vitdet.config.sections.operational`). It may
    change optim.steps if the learning rate of the completed steps stays the same, and increase
    train.patience or set it to 0. A finished run with a training state can be extended in this way.
    If `output` contains the finished run of this config and data, nothing is done. Calls
    `vitdet.data.loader.configure_process`, which changes settings of the process.

    Args:
        config: the settings of the run.
        output: folder of the results.
        checkpoints: folder for the states of several runs, each in a subfolder named by a digest of
            settings, data and initial weights; default: the states are in output/checkpoints.
        weights: local file with initial weights; default: the file that train.init refers to.
        start_tracking: see `StartTracking`.
        profile: write a trace of a few steps to output/profile; disables train.compile.

    Raises:
        ValueError: `output` contains a different run, the data is invalid, or training diverges.
        Stopped: on SIGTERM, SIGINT or SIGHUP, after the state is saved.
    """
    check_tracking(config.tracking)
    configure_process()
    output = Path(output)
    if profile and config.train.compile != "never":
        log.info(
            "profiling without compilation: compiled kernels cannot be assigned to detector parts"
        )
        config = replace(config, train=replace(config.train, compile="never"))
    with (
        distributed.process_group() as device,
        stop_signals() as stop,
        watching(stop) as watchdog,
        ExitStack() as rank0_only,
    ):
        warn_of_short_grace()
        is_rank0 = distributed.rank() == 0
        if distributed.rank0_result(
            lambda: is_complete(config, output, lambda *run: start_tracking(*run).close())
        ):
            return output / "model.pt"
        source = weights if weights is not None else resolve(config.train.init)
        split = distributed.reraise_on_all_ranks(
            lambda: read_split(config.data, config.data.train_split, check_files=is_rank0)
        )
        val_classes, prints = distributed.rank0_result(lambda: inspect_data(config, split))
        folder = distributed.rank0_result(
            lambda: states_folder(config, output, checkpoints, prints, source)
        )
        states = Checkpoints(folder, config.train.keep)
        state = state_to_resume(config, output, prints, states)
        start, steps = state["step"] if state else 0, config.optim.steps
        if profile and steps - start < STEPS:
            raise ValueError(
                f"a profile needs at least {STEPS} steps; steps left in this run: "
                f"{steps - start}; start another training run with a larger optim.steps"
            )
        settings, ranks = config.train, (distributed.rank(), distributed.world_size())
        batches = (settings.batch_size, settings.seed, start, steps)
        loader = distributed.reraise_on_all_ranks(
            lambda: train_loader(config.data, *batches, *ranks, split, settings.accumulate)
        )
        check_classes(config, split.class_names, val_classes)
        # also synchronizes the ranks: no rank writes before all ranks have finished their checks
        stop.check(f"stopped at step {start} of {steps}, before the detector was built")

        detector = fresh_detector(config, split, None if state else source, device)

        def start_tracker() -> Tracker:
            rank0_only.enter_context(states.locked())
            states.set_aside(start)
            return _announce(config, output, prints, folder, state, start_tracking)

        tracker = distributed.reraise_on_all_ranks(start_tracker if is_rank0 else Tracker)
        saver = rank0_only.enter_context(Saver(states))
        data = {"class_names": list(split.class_names), "fingerprints": prints}
        loop = Loop(config, detector, loader, tracker, saver, data, device, stop, watchdog, output)
        try:
            if profile and is_rank0:
                loop.loader = ProfiledBatches(loader, loop.training_step, output / "profile")
            loop.begin(state)
            state = None  # frees the memory of the state
            done = loop.run(start)
            watchdog.at(done, Stage.FINISHING, LONG)
            if is_rank0:
                loop.finish(done)
        except BaseException as error:
            watchdog.at(steps, Stage.FINISHING, LONG)
            tracker.close("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            raise
        tracker.close()
        distributed.barrier()
        return output / "model.pt"


class Loop:
    """The training loop."""

    def __init__(
        self,
        config: Config,
        detector: Detector,
        loader: Iterable[Batch],
        tracker: Tracker,
        saver: Saver,
        data: dict[str, Any],
        device: torch.device,
        stop: Stop,
        watchdog: Watchdog,
        output: Path,
    ) -> None:
        """data: class_names and fingerprints, as in a trained detector's file."""
        self.config, self.detector = config, detector
        self.training_step = TrainingStep(detector, config, device)
        self.average = self.training_step.average
        self.tracker, self.saver, self.data, self.device = tracker, saver, data, device
        self.stop, self.watchdog = stop, watchdog
        self.loader, self.output = loader, output
        self.meter = Meter(config.train.batch_size)
        self.metrics: dict[str, float] = {}  # metrics of the last evaluation
        self.evaluated = 0  # step of the last evaluation
        self.best = Best(config.train, output, saver.states.folder)

    def begin(self, state: dict | None) -> None:
        """Restore training from `state`, or save the initial state if `state` is None."""
        if state is None:
            self.save(0)  # fails early on a full disk or read-only folder; stores the run ID
            self.saver.wait()
            return
        load_weights(self.detector, state["model"], self.saver.states.folder)
        self.training_step.load_state_dict(state)
        self.meter.restore(state["meter"])
        self.metrics = state["metrics"]
        # missing from states before commit 29b381b, when evaluations preceded saving
        self.evaluated = state.get("evaluated", state["step"])
        if settings_of(from_dict(state["config"])) != settings_of(self.config):
            self.metrics, self.evaluated = {}, 0  # evaluation settings have changed
        if "best" in state:  # missing from training states before version 4
            self.best.restore(state["best"], state["step"])
        if self.best.keeps and self.best.value is None:
            self.evaluated = 0  # best.pt is lost: repeat this step's evaluation, if due

    def run(self, start: int) -> int:
        """Run from step `start` to the end or early stopping; return the number of steps completed.

        Raises Stopped on a signal, and ValueError if training has diverged.
        """
        steps, settings = self.config.optim.steps, self.config.train
        self.training_step.distribute()
        self.batches = iter(self.loader)
        self.stop.check(self.stopped(start))
        if start and self.is_due(start) and self.evaluated < start:
            # the evaluation was interrupted or had different settings, or best.pt is lost
            self.evaluate(start)
        self.detector.train()
        for step in range(start, steps):
            if self.best.is_final():
                return step
            done = step + 1
            signal_of_all = self.stop.ask()
            lr = self.train_step(step, LONG if step == start else 0.0)  # may compile kernels
            self.watchdog.at(done, Stage.SAVING, LONG)
            self.saver.check()
            if done == steps or done % settings.log_every == 0:
                self.tracker.log({**self.meter.read(self.device), "lr": lr}, done)
                self.training_step.check()
            signum = signal_of_all()
            if self.is_due(done) or signum or done % settings.save_every == 0:
                self.save(done)
            if signum:
                self.saver.wait()
                raise Stopped(self.stopped(done), signum)
            if self.is_due(done):
                self.evaluate(done)
        return steps

    def stopped(self, step: int) -> str:
        """Return the message for a run that stops after `step` steps."""
        return (
            f"stopped at step {step} of {self.config.optim.steps}; run the same command to resume"
        )

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation follows this step."""
        return step == self.config.optim.steps or step % self.config.train.eval_every == 0

    def train_step(self, step: int, limit: float = 0.0) -> float:
        """Run one step; return its learning rate. limit: the watchdog's time limit in seconds."""

        def at(stage: Stage) -> None:
            self.watchdog.at(step + 1, stage, limit)

        def load() -> Batch:
            at(Stage.LOADING)
            with self.meter.waiting():
                return next(self.batches)

        done = self.training_step.run(step, load, at)
        self.meter.add(done.losses, done.grad_norm, done.skipped)
        return done.lr

    def evaluate(self, step: int) -> None:
        """Evaluate the (averaged) weights on the validation split, and write pictures.

        Writes the metrics next to the state saved after `step` steps. Raises Stopped on a signal.
        """
        self.watchdog.at(step, Stage.EVALUATING, LONG)  # may read large annotation files
        self.training_step.release()
        # compiled code is specialized to the sizes and precision of training
        with self.meter.paused(), torch.compiler.set_stance("force_eager"):
            with self.average.applied():
                share_statistics(self.detector)
                self.metrics = self.measure(step)
                if distributed.rank() == 0:
                    self.draw(step)
                improved = self.best.update(self.metrics, step)
                if improved and self.best.keeps and distributed.rank() == 0:
                    self.watchdog.at(step, Stage.SAVING, LONG)
                    self.best.keep(self.finished(step))
            self.tracker.log({**self.metrics, **self.best.metrics()}, step)
            self.evaluated = step
            if distributed.rank() == 0:
                self.saver.wait()
                self.saver.states.save_evaluation(step, self.evaluation())
        release_memory()
        if step < self.config.optim.steps and not self.best.is_final():
            self.stop.check(self.stopped(step))

    def measure(self, step: int) -> dict[str, float]:
        """Return the metrics of the current weights. Raises Stopped on a signal."""
        limits = iter([LONG])  # the first batch may compile kernels

        def advance(batch: bool) -> bool:
            if batch:
                self.watchdog.at(step, Stage.EVALUATING, next(limits, 0.0))
            else:
                self.watchdog.at(step, Stage.COMPARING, LONG)
            return self.stop.received > 0

        data, settings = self.config.data, self.config.evaluate
        try:
            return evaluate_detector(self.detector, data, settings, self.device, advance)[0]
        except Cancelled:
            self.watchdog.at(step, Stage.FINISHING, LONG)
            self.saver.wait()
            self.stop.check(self.stopped(step))
            raise

    def draw(self, step: int) -> None:
        """Write pictures of the current weights' detections."""
        folder = self.output / f"pictures/step_{step:08d}"
        precision = self.config.evaluate.precision
        for path in write_pictures(self.detector, self.config.data, folder, precision=precision):
            self.tracker.artifact(path, f"pictures/{folder.name}")

    def save(self, step: int) -> None:
        """Start writing the state reached after `step` steps, on rank 0.

        Raises ValueError if training has diverged.
        """
        meter = self.meter.state()
        self.training_step.check()
        if distributed.rank() == 0:
            content = {
                "model": self.detector.state_dict(),
                **self.training_step.state_dict(),
                "run_id": self.tracker.run_id,
                "fingerprints": self.data["fingerprints"],
                "meter": meter,
            }
            self.saver.save(step, content | self.evaluation())

    def evaluation(self) -> dict:
        """Return the entries of a training state that are written again after an evaluation."""
        return {
            "config": to_dict(self.config),
            "metrics": self.metrics,
            "evaluated": self.evaluated,
            "best": self.best.state_dict(),
        }

    def finish(self, step: int) -> None:
        """Write the trained detector to model.pt, with averaged weights if optim.ema is set."""
        self.saver.wait()
        self.best.report(step, self.config.optim.steps)
        with self.average.applied():
            save(self.output / "model.pt", self.finished(step))

    def finished(self, step: int) -> dict:
        """Return the content of a trained detector's file, with the current weights."""
        return {
            "format": FORMAT,
            "config": to_dict(self.config),
            "model": {name: tensor.cpu() for name, tensor in self.detector.state_dict().items()},
            "run_id": self.tracker.run_id,
            "step": step,
            "metrics": self.metrics,
            **self.data,
        }


def _announce(
    config: Config,
    output: Path,
    prints: dict[str, str],
    folder: Path,
    state: dict | None,
    start_tracking: StartTracking,
) -> Tracker:
    """Log how the run starts, write config.yaml and start tracking; called on rank 0."""
    run_id, step = (state["run_id"], state["step"]) if state else (None, 0)
    if state:
        log.info("resuming from step %d of %d (%s)", step, config.optim.steps, folder)
        if changed := difference(config, from_dict(state["config"])):
            log.info("changed settings: %s", "; ".join(changed))
    if note := rate_note(config.optim, config.train.batch_size):
        log.info(note)
    save_config(config, output / "config.yaml")
    tracker = start_tracking(fingerprint.combined(prints), run_id, step)
    tracker.artifact(output / "config.yaml")
    return tracker
