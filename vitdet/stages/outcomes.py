"""The outcome (verdict or error) of each training run, as files in the workspace.

KFP passes no outputs of steps to the exit handler, so `compare_finished` reads these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitdet.files import write_json
from vitdet.stages.workspace import training_folder

VERDICT, FAILURE = "verdict.json", "failure.json"


@contextmanager
def recorded(workspace: str, name: str, run_id: str, step: str) -> Iterator[None]:
    """Record an error of the step; on success, remove the record of an earlier error."""
    file = training_folder(workspace, name, run_id) / FAILURE
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        with suppress(OSError):  # a failed write must not replace the step's error
            write_json(file, {"step": step, "reason": lines[0]})
        raise
    with suppress(OSError):
        file.unlink(missing_ok=True)


def write_verdict(workspace: str, name: str, run_id: str, verdict: dict[str, Any]) -> None:
    """Store a training run's row of the comparison table: its metrics and the gate's verdict."""
    write_json(training_folder(workspace, name, run_id) / VERDICT, verdict)


def read_outcomes(
    workspace: str, names: Sequence[str], run_id: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the existing verdicts, and {name: reason} for training runs that did not succeed."""
    verdicts, failures = [], {}
    for name in names:
        folder = training_folder(workspace, name, run_id)
        failure, verdict = _read(folder / FAILURE), _read(folder / VERDICT)
        if verdict:
            verdicts.append(verdict)
        if failure:
            failures[name] = f"{failure['step']} failed: {failure['reason']}"
        elif not verdict:
            failures[name] = "did not finish: see the logs of the pipeline's steps"
    return verdicts, failures


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None
