"""Training: the story, and the loop.

What happens at a step depends on (config, data, step) alone: the batch by its place in the stream, every random draw
by a seed made of seed, step and the number of the micro-batch, that of the rank if each has one. So a restart needs no
random state and goes on with the same numbers: on a CPU bit for bit, on a GPU as far as its kernels, some of which add in
any order, repeat themselves.
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
from vitdet.training.resume import (
    changed_settings,
    is_complete,
    state_to_resume,
    states_folder,
)
from vitdet.training.saver import Saver
from vitdet.training.step import TrainingStep
from vitdet.training.stop import Stop, Stopped, stop_signals, warn_of_short_grace
from vitdet.training.watchdog import LONG, Stage, Watchdog, watching
from vitdet.types import Batch
from vitdet.weights import resolve

log = logging.getLogger(__name__)


# (fingerprint of the data, run id of the interrupted run or None, step it goes on from) -> tracker
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
    """Trains a detector and returns the path of output/model.pt; resumes an interrupted training.

    Training states go to output/checkpoints, or to a folder of their own below `checkpoints`, named by the settings
    that affect the weights, the data and the initial weights. `weights` is a local file to use for train.init.

    A resumed training may change operational settings (see `vitdet.config.operational`), also where the data is, and
    optim.steps if the learning rate of the steps already done stays the same, and train.patience to a larger value or 0;
    a finished run with its last state may so be extended. Raises ValueError when `output` holds any other finished run or one of another config, Stopped after
    SIGTERM, SIGINT or SIGHUP. A finished run of this config and data is the result: all processes are started again when
    a node is lost at the very end.

    profile: write a trace of a few steps of the first process to output/profile, and log where their time goes; without
    train.compile, whose kernels belong to several parts at once.

    Changes the process as described in `vitdet.data.loader.configure_process`.
    """
    check_tracking(config.tracking)
    configure_process()
    output = Path(output)
    if profile and config.train.compile != "never":
        log.info(
            "train.compile=never: in what is compiled, the parts of the detector are not told apart"
        )
        config = replace(config, train=replace(config.train, compile="never"))
    with (
        distributed.process_group() as device,
        stop_signals() as stop,
        watching(stop) as watchdog,
        ExitStack() as alone,
    ):
        warn_of_short_grace()
        if distributed.rank0_result(
            lambda: is_complete(config, output, lambda *run: start_tracking(*run).close())
        ):
            return output / "model.pt"
        source = weights if weights is not None else resolve(config.train.init)
        split = distributed.reraise_on_all_ranks(
            lambda: read_split(config.data, config.data.train_split, look=distributed.rank() == 0)
        )
        val_classes, prints = distributed.rank0_result(lambda: inspect_data(config, split))
        folder = distributed.rank0_result(
            lambda: states_folder(config, output, checkpoints, prints, source)
        )
        states = Checkpoints(folder, config.train.keep)
        state = state_to_resume(config, output, prints, states)
        start = state["step"] if state else 0
        if profile and config.optim.steps - start < STEPS:
            raise ValueError(
                f"a profile takes {STEPS} steps, but only {config.optim.steps - start} are left: start "
                "another training, with a larger optim.steps"
            )
        loader = distributed.reraise_on_all_ranks(
            lambda: train_loader(
                config.data,
                config.train.batch_size,
                config.train.seed,
                start,
                config.optim.steps,
                distributed.rank(),
                distributed.world_size(),
                split,
                config.train.accumulate,
            )
        )
        check_classes(config, split.class_names, val_classes)
        # of all ranks: nobody writes before all have looked
        stop.check(f"stopped at step {start} of {config.optim.steps}, before anything was built")

        detector = fresh_detector(config, split, None if state else source, device)

        def start_alone() -> Tracker:
            alone.enter_context(states.locked())
            states.set_aside(start)
            return _announce(config, output, prints, states, state, start_tracking)

        tracker = distributed.reraise_on_all_ranks(
            lambda: start_alone() if distributed.rank() == 0 else Tracker()
        )
        saver = alone.enter_context(Saver(states))
        data = {"class_names": list(split.class_names), "fingerprints": prints}
        loop = Loop(config, detector, loader, tracker, saver, data, device, stop, watchdog, output)
        try:
            if profile and distributed.rank() == 0:
                loop.loader = ProfiledBatches(loader, loop.training_step, output / "profile")
            loop.begin(state)
            state = None  # it weighs as much as detector and optimizer, which have it now
            done = loop.run(start)
            watchdog.at(done, Stage.FINISHING, LONG)
            if distributed.rank() == 0:
                loop.finish(done)
        except BaseException as error:
            watchdog.at(config.optim.steps, Stage.FINISHING, LONG)
            tracker.close("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            raise
        tracker.close()
        distributed.barrier()
        return output / "model.pt"


class Loop:
    """The steps, with what they need at hand."""

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
        """data: class_names and fingerprints, as a finished detector's file holds them."""
        self.config, self.detector = config, detector
        self.training_step = TrainingStep(detector, config, device)
        self.average = self.training_step.average
        self.tracker, self.saver, self.data, self.device = tracker, saver, data, device
        self.stop, self.watchdog = stop, watchdog
        self.loader, self.output = loader, output
        self.meter = Meter(config.train.batch_size)
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.evaluated = 0  # the step of that
        self.best = Best(config.train, output, saver.states.folder)

    def begin(self, state: dict | None) -> None:
        """Goes on from a state; without one, saves the first."""
        if state is None:
            self.save(0)  # a full disk or a read-only folder is an error now; keeps the run's id
            self.saver.wait()
            return
        load_weights(self.detector, state["model"], self.saver.states.folder)
        self.training_step.load_state_dict(state)
        self.meter.restore(state["meter"])
        self.metrics = state["metrics"]
        # states written before commit 29b381b do not have it: they were saved after evaluations
        self.evaluated = state.get("evaluated", state["step"])
        if settings_of(from_dict(state["config"])) != settings_of(self.config):
            self.metrics, self.evaluated = {}, 0  # they were measured with other settings
        if "best" in state:  # not in states before version 4
            self.best.restore(state["best"], state["step"])
        if self.best.keeps and self.best.value is None:
            self.evaluated = 0  # best.pt is lost, and no evaluation may follow this step

    def run(self, start: int) -> int:
        """Steps start..steps-1, fewer where train.patience ends them; how many are done then.

        Raises Stopped, and ValueError for a loss that is not finite.
        """
        config, settings, meter = self.config, self.config.train, self.meter
        self.training_step.distribute()
        self.batches = iter(self.loader)
        self.stop.check(self.stopped(start))
        if start and self.is_due(start) and self.evaluated < start:
            self.evaluate(start)  # it was cut off, had other settings, or its best.pt is lost
        self.detector.train()
        for step in range(start, config.optim.steps):
            if self.best.is_final():
                return step
            done, limit = (
                step + 1,
                LONG if step == start else 0.0,
            )  # the first one may compile kernels
            self.watchdog.at(done, Stage.LOADING, limit)
            signal_of_all = self.stop.ask()
            lr = self.learn(step, limit)
            self.watchdog.at(done, Stage.SAVING, LONG)
            self.saver.check()
            due = self.is_due(done)
            if done == config.optim.steps or done % settings.log_every == 0:
                self.tracker.log({**meter.read(self.device), "lr": lr}, done)
                self.training_step.check()
            signum = signal_of_all()
            if due or signum or done % settings.save_every == 0:
                self.save(done)
            if signum:
                self.saver.wait()
                raise Stopped(self.stopped(done), signum)
            if due:
                self.evaluate(done)
        return config.optim.steps

    def stopped(self, step: int) -> str:
        """The message of a training that stops after `step` steps."""
        steps = self.config.optim.steps
        return f"stopped at step {step} of {steps}; the same command goes on from there"

    def is_due(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        return step == self.config.optim.steps or step % self.config.train.eval_every == 0

    def learn(self, step: int, limit: float = 0.0) -> float:
        """One step of the optimizer; its learning rate. limit: the watchdog's."""

        def at(stage: Stage) -> None:
            self.watchdog.at(step + 1, stage, limit)

        def load() -> Batch:
            at(Stage.LOADING)
            with self.meter.waiting():
                return next(self.batches)

        figures = self.training_step.run(step, load, at)
        self.meter.add(figures.losses, figures.grad_norm, figures.skipped)
        return figures.lr

    def evaluate(self, step: int) -> None:
        """AP on the validation split, of the averaged weights if there are any, and pictures of what they find.

        The state after `step` steps is saved already; the AP is written beside it. Raises Stopped.
        """

        self.training_step.release()
        config, limits = self.config, iter([LONG])  # the first batch may compile kernels

        def advance(batch: bool) -> bool:
            if batch:
                self.watchdog.at(step, Stage.EVALUATING, next(limits, 0.0))
            else:
                self.watchdog.at(step, Stage.COMPARING, LONG)
            return self.stop.received > 0

        # what training compiled is for its own sizes and precision
        with self.meter.paused(), torch.compiler.set_stance("force_eager"):
            self.watchdog.at(step, Stage.EVALUATING, LONG)  # reads the annotations
            with self.average.applied():
                share_statistics(self.detector)
                try:
                    self.metrics, _ = evaluate_detector(
                        self.detector, config.data, config.evaluate, self.device, advance
                    )
                except Cancelled:
                    self.watchdog.at(step, Stage.FINISHING, LONG)
                    self.saver.wait()
                    self.stop.check(self.stopped(step))
                if distributed.rank() == 0:
                    folder = self.output / "pictures" / f"step_{step:08d}"
                    precision = config.evaluate.precision
                    for path in write_pictures(
                        self.detector, config.data, folder, precision=precision
                    ):
                        self.tracker.artifact(path, f"pictures/{folder.name}")
                improved = self.best.update(self.metrics, step)
                if improved and self.best.keeps and distributed.rank() == 0:
                    self.watchdog.at(step, Stage.SAVING, LONG)
                    self.best.keep(self.finished(step))
            self.tracker.log({**self.metrics, **self.best.figures()}, step)
            self.evaluated = step
            if distributed.rank() == 0:
                self.saver.wait()
                added = {
                    "config": to_dict(config),
                    "metrics": self.metrics,
                    "evaluated": step,
                    "best": self.best.state_dict(),
                }
                self.saver.states.save_evaluation(step, added)
        release_memory()
        if (
            step < config.optim.steps and not self.best.is_final()
        ):  # otherwise the training has ended
            self.stop.check(self.stopped(step))

    def save(self, step: int) -> None:
        """Starts to write the state after `step` steps, in the first process.

        Raises ValueError when a loss is not finite.
        """
        # of all processes, and a state that has diverged is none to go on from
        meter = self.meter.state()
        self.training_step.check()
        if distributed.rank() == 0:
            self.saver.save(
                step,
                {
                    "config": to_dict(self.config),
                    "model": self.detector.state_dict(),
                    **self.training_step.state_dict(),
                    "run_id": self.tracker.run_id,
                    "fingerprints": self.data["fingerprints"],
                    "meter": meter,
                    "metrics": self.metrics,
                    "evaluated": self.evaluated,
                    "best": self.best.state_dict(),
                },
            )

    def finish(self, step: int) -> None:
        """Writes the finished detector, of the averaged weights if there are any."""
        self.saver.wait()
        self.best.report(step, self.config.optim.steps)
        with self.average.applied():
            save(self.output / "model.pt", self.finished(step))

    def finished(self, step: int) -> dict:
        """What the file of a finished detector holds, with the weights that are applied now."""
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
    states: Checkpoints,
    state: dict | None,
    start_tracking: StartTracking,
) -> Tracker:
    """Writes down what is about to happen; by the first process."""
    if state is not None:
        log.info(
            "going on from step %d of %d (%s)", state["step"], config.optim.steps, states.folder
        )
        if changed := changed_settings(config, state):
            log.info("changed settings: %s", "; ".join(changed))
    if note := rate_note(config.optim, config.train.batch_size):
        log.info(note)
    save_config(config, output / "config.yaml")
    tracker = start_tracking(
        fingerprint.combined(prints),
        state["run_id"] if state else None,
        state["step"] if state else 0,
    )
    tracker.artifact(output / "config.yaml")
    return tracker
