"""The best evaluation of a run: its detector in best.pt, and early stopping by train.patience."""

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
    """The highest value of a metric over a run's evaluations; in a tie, the earliest counts.

    All ranks have the same metrics and make the same decisions; only rank 0 writes files.

    Attributes:
        metric: name of the metric.
        value: the highest value; None before the first evaluation.
        step: the step of the evaluation with this value.
        stale: number of evaluations after this step.
    """

    def __init__(self, settings: TrainConfig, output: Path, states: Path) -> None:
        """output: folder of best.pt; states: folder of training states and a copy of best.pt."""
        self.keeps, self.patience = bool(settings.keep_best), settings.patience
        self.metric = settings.keep_best or "box_ap"
        self.path, self._stored = output / NAME, states / NAME
        self.value: float | None = None
        self.step = self.stale = 0

    def update(self, metrics: dict[str, float], step: int) -> bool:
        """Record the metrics of an evaluation; return whether they are the best so far.

        Always returns False if neither train.keep_best nor train.patience is set.
        """
        if not self._is_needed():
            return False
        value = metrics[self.metric]
        if self.value is not None and value <= self.value:
            self.stale += 1
            return False
        self.value, self.step, self.stale = value, step, 0
        return True

    def is_final(self) -> bool:
        """Return whether train.patience ends the run now."""
        return 0 < self.patience <= self.stale

    def metrics(self) -> dict[str, float]:
        """Return {best_METRIC: value, best_step: step}; {} before the first evaluation."""
        if self.value is None:
            return {}
        return {f"best_{self.metric}": self.value, "best_step": self.step}

    def keep(self, content: dict) -> None:
        """Write a trained detector to best.pt atomically; raises OSError if that fails."""
        save(self._stored, content)
        self._publish()

    def report(self, done: int, steps: int) -> None:
        """Log early stopping if train.patience ended a run of `steps` steps after `done` steps."""
        if self.is_final() and done < steps:
            last = f"{self.stale} evaluations" if self.stale > 1 else "evaluation"
            log.info(
                f"train.patience={self.patience}: {self.metric} has not exceeded "
                f"{self.value or 0.0:.4g} (step {self.step}) in the last {last}; "
                f"training ends at step {done} of {steps}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `restore` accepts."""
        return {"value": self.value, "step": self.step, "stale": self.stale}

    def restore(self, state: dict[str, Any], start: int) -> None:
        """Restore the state saved after `start` steps; must be called on all ranks.

        If best.pt is missing, damaged or outdated, `value` becomes None, with a warning: the next
        evaluation counts as the best.
        """
        if not self._is_needed():  # e.g. train.patience was set to 0 after this state was saved
            return
        self.value, self.step, self.stale = state["value"], state["step"], state["stale"]
        stored = self.keeps and self.value is not None
        if stored and distributed.rank0_result(lambda: self._lost(start)):
            self.value, self.stale = None, 0

    def _is_needed(self) -> bool:
        return self.keeps or self.patience > 0

    def _lost(self, start: int) -> bool:
        """Return whether best.pt is unavailable; otherwise copy it to the output folder."""
        try:
            found = load_model_file(self._stored)["step"]
            # the evaluations from step `start` on will be repeated, so their best.pt is accepted
            if found != self.step and found < start:
                raise ValueError(f"{self._stored} is from step {found}, not from step {self.step}")
        except (FileNotFoundError, ValueError) as error:
            effect = "the next evaluation counts as the best"
            log.warning("the best detector (step %d) was lost (%s): %s", self.step, error, effect)
            return True
        self._publish()
        return False

    def _publish(self) -> None:
        with atomic_write(self.path, sync=True) as temporary:
            try:
                os.link(self._stored, temporary)
            except OSError:  # another file system, or no hard links
                shutil.copyfile(self._stored, temporary)
