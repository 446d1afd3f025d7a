"""Run the pipeline on this machine with kfp's local runner: each step is a process."""

from __future__ import annotations

import builtins
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from kfp import dsl, local

from components import RUN_ID
from components.cleanup import clean_up
from components.train import train
from pipeline.graph import build

COLOR = re.compile(r"\033\[\d+m")
BEGIN = re.compile(r"Executing task '([\w-]+)'")
FAILED = re.compile(r"Task '([\w-]+)' finished with status FAILURE")
# Lines that kfp prints: executor messages, JSON of a step's inputs, log records, separators
NOISE = re.compile(r"\s*(\[KFP Executor |[\"{}\[\]]|\d\d:\d\d:\d\d\.\d+ - |-{20,}|$)")


class Screen:
    """Shows the steps' output and the last line of each traceback; writes everything to a log."""

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self.screen, self.log = screen, log
        self.line, self.depth = "", -1  # depth: indentation of a traceback to skip; -1: none
        self.in_outputs = False  # inside an output value, which kfp prints on several lines

    def write(self, text: str) -> int:
        """Split text into lines and process the complete lines."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            plain = COLOR.sub("", line)
            self.log.write(f"{plain}\n")
            self.process(plain)
        return len(text)

    def process(self, line: str) -> None:
        """Show a line unless it is from kfp itself or part of a traceback."""
        indent = len(line) - len(line.lstrip())
        if begun := BEGIN.search(line):
            self.in_outputs = False
            self.show(f"-- {begun[1]}")
        elif failed := FAILED.search(line):
            self.show(f"-- {failed[1]} failed")
        elif NOISE.match(line):
            self.in_outputs = "outputs:" in line or (self.in_outputs and " - " not in line[:20])
        elif line.lstrip().startswith("Traceback (most recent"):
            self.depth = indent
        elif self.in_outputs or indent > self.depth >= 0:
            return
        else:
            self.depth = -1
            self.show(line.lstrip(" "))  # parallel steps indent each other's lines

    def show(self, line: str) -> None:
        """Write and flush a line."""
        self.screen.write(f"{line}\n")
        self.screen.flush()

    def flush(self) -> None:
        """Flush the screen and the log; required of a file-like object."""
        self.screen.flush()
        self.log.flush()


def run_locally(
    recipes: Sequence[str],
    overrides: Sequence[str],
    workspace: Path,
    *,
    sweep: Sequence[str] = (),
    seeds: int = 1,
    fetch: str = "",
    parallel: int = 1,
) -> str:
    """Run the pipeline and return the run's ID; artifacts and log are in WORKSPACE/pipeline.

    parallel: maximum number of concurrent training runs; kfp's local runner allows at most two.
    Raises RuntimeError if a step fails, after printing the step's error. Ctrl-C ends the run.
    """
    root, run_id = workspace / "pipeline", uuid4().hex
    root.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_ID] = run_id
    # kfp warns that the components' base image is not an official Python image
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp.local")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
    original_print = builtins.print
    inputs = {
        "recipes": list(recipes),
        "overrides": list(overrides),
        "workspace": str(workspace),
        "job_kind": "",
    }
    with open(root / f"{run_id}.log", "w") as log, redirect_stdout(Screen(sys.stdout, log)):
        try:
            pipeline = build(train, parallel=parallel)
            pipeline(**inputs, sweep=list(sweep), seeds=seeds, fetch=fetch)
        except RuntimeError as error:
            cause = COLOR.sub("", str(error)).partition("Inner task failed:")[2]
            failed = re.search(r"'([\w-]+)'", cause)
            raise RuntimeError(
                f"step {failed[1] if failed else '?'} failed; full log: {log.name}"
            ) from error
        except KeyboardInterrupt:
            # kfp skips the exit handler after Ctrl-C, so MLflow's parent run would not end
            ended = dsl.PipelineTaskFinalStatus("CANCELED", "", "", None, None)
            table = dsl.HTML(uri=str(root / f"{run_id}.html"))
            clean_up.python_func(**inputs, status=ended, table=table)
            raise
        finally:
            # kfp replaces `print` and does not restore it if steps run in parallel
            builtins.print = original_print
    return run_id
