"""The report of a case: one line per quantity with its largest error and tolerance; none may be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Report:
    """The lines of one case, and whether all quantities are within tolerance."""

    title: str
    lines: list[str] = field(default_factory=list)
    failures: int = 0
    seen: set[str] = field(default_factory=set)

    def close(
        self,
        name: str,
        ours: np.ndarray | Tensor | float,
        theirs: np.ndarray | float,
        absolute: float,
        relative: float = 0.0,
    ) -> None:
        """Check |ours - theirs| <= absolute + relative * |theirs| everywhere; NaN or a different shape fails."""
        self.seen.add(name)
        ours, theirs = _array(ours), _array(theirs)
        if ours.shape != theirs.shape:
            self.out(name, f"shape {ours.shape}, expected {theirs.shape}")
            return
        if not ours.size:
            self.line(name, "empty, as expected", True)
            return
        with np.errstate(invalid="ignore"):
            error = np.nan_to_num(np.abs(ours - theirs), nan=np.inf)
        allowed = np.nan_to_num(absolute + relative * np.abs(theirs), nan=0.0, posinf=0.0)
        worst = np.unravel_index(np.argmax(error - allowed), error.shape)
        error, allowed = float(error[worst]), float(allowed[worst])
        self.line(name, f"error {error:.3g}  tolerance {allowed:.3g}", error <= allowed)

    def equal(self, name: str, ours: np.ndarray | Tensor | float, theirs: np.ndarray) -> None:
        """Check for equal numbers in the same order."""
        self.close(name, ours, theirs, 0.0)

    def names(self, name: str, ours: Iterable[str], theirs: Iterable[str]) -> None:
        """Check for the same names, in any order."""
        self.seen.add(name)
        ours, theirs = set(ours), set(theirs)
        differing = sorted(ours ^ theirs)
        text = f"{len(ours & theirs)} in both, {len(differing)} in one only"
        self.line(name, f"{text}: {', '.join(differing[:3])}" if differing else text, not differing)

    def at_least(self, name: str, value: float, bound: float) -> None:
        """Check that a score, such as an IoU, reaches a bound."""
        self.seen.add(name)
        self.line(name, f"value {value:.6g}  at least {bound:g}", bool(value >= bound))

    def skip(self, name: str, reason: str) -> None:
        """Skip a quantity, with the reason."""
        self.seen.add(name)
        self.lines.append(f"  skip  {name}: {reason}")

    def inform(self, name: str, text: str) -> None:
        """Print a quantity that is not portable between processors; it cannot fail."""
        self.seen.add(name)
        self.lines.append(f"  info  {name}: {text}")

    def out(self, name: str, text: str) -> None:
        """Add a failure without a numerical error."""
        self.seen.add(name)
        self.line(name, text, False)

    def line(self, name: str, text: str, holds: bool) -> None:
        """Add a line with its verdict."""
        self.failures += not holds
        self.lines.append(f"  {'ok  ' if holds else 'OUT '}  {name}: {text}")

    def table(
        self,
        title: str,
        ours: Mapping[str, np.ndarray | Tensor],
        theirs: Mapping[str, np.ndarray],
        tolerance: Callable[[str], float],
    ) -> None:
        """Compare all stored arrays with ours of the same names; inputs must have been skipped."""
        for name, tensor in ours.items():
            if name in theirs:
                self.close(f"{title}.{name}", tensor, theirs[name], tolerance(name))
            else:
                self.out(f"{title}.{name}", "computed here but not stored")
        self.all_seen([f"{title}.{name}" for name in theirs])

    def all_seen(self, names: Iterable[str]) -> None:
        """Check that every stored quantity was compared or skipped by name."""
        for name in names:
            if name not in self.seen:
                self.out(name, "not compared: this check does not know the quantity")


def _array(value: np.ndarray | Tensor | float) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value).astype(np.float64)
