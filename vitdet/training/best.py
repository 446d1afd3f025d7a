"""The best evaluation of a training so far: its detector in best.pt, and early stopping by train.patience."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from vitdet import distributed
from vitdet.checkpoint import load_model_file, save
from vitdet.config import TrainConfig
from vitdet.files import atomic_write

NAME = "best.pt"
log = logging.getLogger(__name__)


class Best:
    """The highest value of a metric over the evaluations of a training; of equal ones, the first.

    All ranks have the same metrics and so come to the same decisions; only the first one touches files.

    metric: its name. value: the highest one, None before the first evaluation. step: that of its evaluation.
    stale: the number of evaluations since.
    """

    def __init__(self, settings: TrainConfig, output: Path, states: Path) -> None:
        """output: the folder of best.pt. states: that of the training states, which may outlive it."""
        self.keeps, self.patience = bool(settings.keep_best), settings.patience
        self.metric = settings.keep_best or "box_ap"
        self.path, self._stored = output / NAME, states / NAME
        self.value: float | None = None
        self.step = self.stale = 0

    def update(self, metrics: dict[str, float], step: int) -> bool:
        """Record the metrics of an evaluation and return whether they are the best so far; False if no setting needs it."""
        if not self._is_needed():
            return False
        value = metrics[self.metric]
        if self.value is not None and value <= self.value:
            self.stale += 1
            return False
        self.value, self.step, self.stale = value, step, 0
        return True

    def is_final(self) -> bool:
        """Whether train.patience ends the training."""
        return 0 < self.patience <= self.stale

    def figures(self) -> dict[str, float]:
        """{best_box_ap: its value, best_step: its step} with the name of the metric; {} without one."""
        if self.value is None:
            return {}
        return {f"best_{self.metric}": self.value, "best_step": self.step}

    def keep(self, content: dict) -> None:
        """Write a finished detector to best.pt, all or nothing. Raises OSError as `vitdet.checkpoint.save` does."""
        save(self._stored, content)
        self._publish()

    def report(self, done: int, steps: int) -> None:
        """Log why a training of `steps` steps ended after `done`, if train.patience ended it."""
        if self.is_final() and done < steps:
            log.info(
                "train.patience=%d: %s has not risen above %.4g, of step %d, in the last %d evaluations: the training ends "
                "at step %d of %d",
                self.patience,
                self.metric,
                self.value or 0.0,
                self.step,
                self.stale,
                done,
                steps,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state that `restore` accepts."""
        return {"value": self.value, "step": self.step, "stale": self.stale}

    def restore(self, state: dict[str, Any], start: int) -> None:
        """Restore what `state_dict` returned after `start` steps; to be called by all ranks.

        If best.pt is missing or damaged, `value` becomes None, with a warning: the next evaluation counts as the best.
        """
        if not self._is_needed():  # train.patience=0 since this state was saved
            return
        self.value, self.step, self.stale = state["value"], state["step"], state["stale"]
        if (
            self.keeps
            and self.value is not None
            and distributed.rank0_result(lambda: self._lost(start))
        ):
            self.value, self.stale = None, 0

    def _is_needed(self) -> bool:
        return self.keeps or self.patience > 0

    def _lost(self, start: int) -> bool:
        """Whether best.pt is unavailable; copies it to the output folder otherwise."""
        try:
            found = load_model_file(self._stored)["step"]
            # a later one was kept after the state was saved: its evaluation is due again
            if found != self.step and found < start:
                raise ValueError(f"{self._stored}: is of step {found}")
        except (FileNotFoundError, ValueError) as error:
            log.warning(
                "the best detector, of step %d, is lost (%s): the next evaluation counts as the best",
                self.step,
                error,
            )
            return True
        self._publish()
        return False

    def _publish(self) -> None:
        with atomic_write(self.path, sync=True) as temporary:
            try:
                os.link(self._stored, temporary)
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(self._stored, temporary)
