"""A comparison is one line: the quantity, its largest error, the tolerance. What is left uncompared is an error."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Report:
    """The lines of one case and whether all of them hold."""

    title: str
    lines: list[str] = field(default_factory=list)
    failures: int = 0
    seen: set[str] = field(default_factory=set)

    def close(
        self, name: str, ours: np.ndarray | Tensor | float, theirs: np.ndarray | float, absolute: float,
        relative: float = 0.0,
    ) -> None:
        """|ours - theirs| <= absolute + relative * |theirs| everywhere; NaN, or another shape, is out."""
        self.seen.add(name)
        ours, theirs = _array(ours), _array(theirs)
        if ours.shape != theirs.shape:
            self.out(name, f"shape {ours.shape}, expected {theirs.shape}")
            return
        error = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        allowed = absolute + relative * np.abs(theirs.astype(np.float64))
        worst = np.unravel_index(np.argmax(np.nan_to_num(error - allowed, nan=np.inf)), error.shape) if error.size else None
        holds = worst is None or bool(error[worst] <= allowed[worst])
        figure = f"error {error[worst]:.3g}  tolerance {allowed[worst]:.3g}" if worst is not None else "empty"
        self.line(name, figure, holds)

    def equal(self, name: str, ours: np.ndarray | Tensor, theirs: np.ndarray) -> None:
        """The same numbers in the same order."""
        self.close(name, ours, theirs, 0.0)

    def at_least(self, name: str, value: float, bound: float) -> None:
        """A score, such as an IoU, that must reach a bound."""
        self.seen.add(name)
        self.line(name, f"value {value:.6g}  at least {bound:g}", bool(value >= bound))

    def skip(self, name: str, reason: str) -> None:
        """Names what is not compared, and why."""
        self.seen.add(name)
        self.lines.append(f"  skip  {name}: {reason}")

    def out(self, name: str, text: str) -> None:
        """A failure that has no error to show."""
        self.seen.add(name)
        self.line(name, text, False)

    def line(self, name: str, text: str, holds: bool) -> None:
        """Adds a verdict."""
        self.failures += not holds
        self.lines.append(f"  {'ok  ' if holds else 'OUT '}  {name}: {text}")

    def all_seen(self, names: list[str]) -> None:
        """Every stored quantity must have been compared or skipped by name."""
        for name in names:
            if name not in self.seen:
                self.out(name, "not compared: this check does not know the quantity")


def _array(value: np.ndarray | Tensor | float) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
