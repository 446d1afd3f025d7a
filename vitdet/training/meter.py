"""Training metrics between two log entries: mean losses, speed and memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from vitdet import distributed


class Meter:
    """Sums the metrics on the device; `read` returns the means since the previous `read`."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Reset all sums and the clock."""
        self.sums: dict[str, Tensor | float] = {}
        self.count = 0  # steps in the sums
        self.timed, self.waited, self.since = 0, 0.0, time.perf_counter()  # not in `state`

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within the context as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within the context from the speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(
        self, losses: dict[str, Tensor], grad_norm: Tensor, skipped: Tensor | None = None
    ) -> None:
        """Add one step's metrics; if the bool tensor `skipped` is true, only count the step."""
        total = reduce(torch.add, (loss.detach() for loss in losses.values()))
        metrics = {**losses, "loss": total, "grad_norm": grad_norm}
        if skipped is not None:
            metrics = {name: value.where(~skipped, 0.0) for name, value in metrics.items()}
            metrics["skipped_steps"] = skipped
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
        self.count += 1
        self.timed += 1

    def state(self) -> dict:
        """Return {sums, count}, with the sums averaged over all processes, for `restore`.

        Synchronizes all processes. Raises ValueError if a metric is not finite.
        """
        if not self.timed:  # no steps since `restart`: the sums are empty or restored
            return {"sums": dict(self.sums), "count": self.count}
        values = torch.stack([torch.as_tensor(value) for value in self.sums.values()])
        sums = dict(zip(self.sums, distributed.mean(values).tolist(), strict=True))
        if broken := [name for name, value in sums.items() if not math.isfinite(value)]:
            raise ValueError(
                f"training has diverged (not finite: {', '.join(broken)}); try a smaller "
                "optim.lr, a longer optim.warmup_steps, or optim.clip=1; the last checkpoint was "
                "saved before the divergence"
            )
        return {"sums": sums, "count": self.count}

    def restore(self, state: dict) -> None:
        """Restore what `state` returned."""
        self.sums, self.count = dict(state["sums"]), state["count"]

    def read(self, device: torch.device) -> dict[str, float]:
        """Return the mean metrics, the images/s, the data wait (s/step) and the memory (GB).

        skipped_steps is the number of skipped steps; if all steps were skipped, there are no means.
        Restarts the meter. Synchronizes all processes, and raises the errors of `state`.
        """
        sums = self.state()["sums"]
        skipped = sums.pop("skipped_steps", None)
        counted = self.count - (skipped or 0)
        values = {name: value / counted for name, value in sums.items()} if counted else {}
        if skipped is not None:
            values["skipped_steps"] = skipped
        elapsed = time.perf_counter() - self.since
        values |= {
            "images_per_second": self.timed * self.batch_size / elapsed,
            "data_wait_seconds": self.waited / self.timed,
            "memory_gb": memory(device) / 1e9,
        }
        self.restart()
        return values


def memory(device: torch.device) -> float:
    """Return peak memory in bytes: allocated by torch on a GPU, or resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
