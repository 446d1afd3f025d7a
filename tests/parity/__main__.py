"""`python -m tests.parity DIR...`: hold our numbers against golden cases; exit code 1 when one is out of tolerance."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.parity import detector, dynamics, resize, unit
from tests.parity.report import Report

# What tells a case's kind: the files that it consists of.
KINDS: tuple[tuple[str, Callable[[Path, Report], None]], ...] = (
    ("state_dict.npz", detector.check), ("unit.npz", unit.check), ("io.npz", resize.check),
    ("losses.json", dynamics.check),
)


def run(folder: Path) -> Report:
    """The report of one case folder; what cannot be read or run is a failure of it."""
    report = Report(str(folder))
    for file, check in KINDS:
        if (folder / file).exists():
            try:
                check(folder, report)
            except Exception as error:  # a broken case must not hide the others
                traceback.print_exc()
                report.out("the case", f"stopped by {type(error).__name__}: {error}")
            return report
    report.out("the case", f"none of {', '.join(file for file, _ in KINDS)} in this folder")
    return report


def main(folders: Sequence[str]) -> int:
    """Prints a line for each quantity of each folder; 0 if all hold."""
    if not folders:
        print("usage: python -m tests.parity DIR...   (folders with golden cases)", file=sys.stderr)
        return 2
    failures = 0
    for folder in folders:
        report = run(Path(folder))
        print(report.title, *report.lines, sep="\n")
        print(f"{report.title}: {'all hold' if report.failures == 0 else f'{report.failures} out'}")
        failures += report.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
