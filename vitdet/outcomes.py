"""What became of each training of a pipeline run, on the shared folder: its verdict or its error.

The comparison reads it, also if a step failed and its outputs are not passed on by the pipeline.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vitdet.files import write_json
from vitdet.workspace import training_folder

P = ParamSpec("P")
R = TypeVar("R")
VERDICT, FAILURE = "verdict.json", "failure.json"


@contextmanager
def recorded(workspace: str, name: str, run_id: str, step: str) -> Iterator[None]:
    """Record the error of a step of a training, or remove the record of an earlier attempt."""
    file = training_folder(workspace, name, run_id) / FAILURE
    try:
        yield
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        with suppress(OSError):  # the step's own error matters more
            write_json(file, {"step": step, "reason": lines[0]})
        raise
    with suppress(OSError):
        file.unlink(missing_ok=True)


def step(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a step with the parameters workspace, name and run_id: `recorded`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def _call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            with recorded(given["workspace"], given["name"], given["run_id"], name):
                return function(*args, **kwargs)

        return _call

    return decorate


def write_verdict(workspace: str, name: str, run_id: str, verdict: dict[str, Any]) -> None:
    """Store the row of a training in the comparison: its metrics and the gate's verdict."""
    write_json(training_folder(workspace, name, run_id) / VERDICT, verdict)


def read_outcomes(
    workspace: str, names: Sequence[str], run_id: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return (the verdicts that exist, {name: why} of the trainings whose steps did not all succeed)."""
    verdicts, failures = [], {}
    for name in names:
        folder = training_folder(workspace, name, run_id)
        failure, verdict = _read(folder / FAILURE), _read(folder / VERDICT)
        if verdict:
            verdicts.append(verdict)
        if failure:
            failures[name] = f"{failure['step']} failed: {failure['reason']}"
        elif not verdict:
            failures[name] = "did not finish: see the logs of its steps"
    return verdicts, failures


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None
