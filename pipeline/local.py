"""A pipeline run on this machine: kfp's local runner, each step a process, the training one of them."""

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
from pipeline.pipeline import build

COLOR = re.compile(r"\033\[\d+m")
BEGIN = re.compile(r"Executing task '([\w-]+)'")
FAILED = re.compile(r"Task '([\w-]+)' finished with status FAILURE")
# kfp's own lines: its executor's, the JSON of a step's inputs, times and levels, rulers
NOISE = re.compile(r"\s*(\[KFP Executor |[\"{}\[\]]|\d\d:\d\d:\d\d\.\d+ - |-{20,}|$)")


class Screen:
    """Shows the steps' own lines, each under its step's name, and of an error its last line; all goes to a log file."""

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self.screen, self.log = screen, log
        self.line, self.depth = "", -1  # depth: indentation of a traceback that is being left out
        self.waits = False  # for the value of an output, which kfp shows in more lines

    def write(self, text: str) -> int:
        """Takes any piece of text."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            plain = COLOR.sub("", line)
            self.log.write(f"{plain}\n")
            self.take(plain)
        return len(text)

    def take(self, line: str) -> None:
        """Looks at one line."""
        indent = len(line) - len(line.lstrip())
        if begun := BEGIN.search(line):
            self.waits = False
            self.show(f"-- {begun[1]}")
        elif failed := FAILED.search(line):
            self.show(f"-- {failed[1]} failed")
        elif NOISE.match(line):
            self.waits = "outputs:" in line or (self.waits and " - " not in line[:20])
        elif line.lstrip().startswith("Traceback (most recent"):
            self.depth = indent
        elif self.waits or indent > self.depth >= 0:
            return
        else:
            self.depth = -1
            self.show(line.lstrip(" "))  # parallel steps indent each other's lines

    def show(self, line: str) -> None:
        """At once."""
        self.screen.write(f"{line}\n")
        self.screen.flush()

    def flush(self) -> None:
        """As files do."""
        self.screen.flush()
        self.log.flush()


def run_here(recipes: Sequence[str], overrides: Sequence[str], workspace: Path) -> str:
    """Runs the pipeline to its end and gives the run's id; what the steps pass on lies in WORKSPACE/pipeline.

    Raises RuntimeError when a step fails; why is then on the screen, and in the log beside. Ctrl-C ends the run.
    """
    root, run_id = workspace / "pipeline", uuid4().hex
    root.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_ID] = run_id
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module="kfp.local"
    )  # that our image is none of Python's
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root))
    show = builtins.print
    with open(root / f"{run_id}.log", "w") as log, redirect_stdout(Screen(sys.stdout, log)):
        try:
            build(train)(
                recipes=list(recipes),
                overrides=list(overrides),
                workspace=str(workspace),
                job_kind="",
            )
        except RuntimeError as error:
            failed = re.findall(
                r"'([\w-]+)'", COLOR.sub("", str(error)).partition("Inner task failed:")[2]
            )
            raise RuntimeError(
                f"step {failed[0] if failed else '?'} failed; the whole log: {log.name}"
            ) from error
        except (
            KeyboardInterrupt
        ):  # kfp's runner leaves the exit handler out, and MLflow's run would go on for ever
            ended = dsl.PipelineTaskFinalStatus("CANCELED", "", "", None, None)
            clean_up.python_func(
                recipes=list(recipes),
                overrides=list(overrides),
                workspace=str(workspace),
                job_kind="",
                status=ended,
            )
            raise
        finally:
            builtins.print = show  # kfp puts its own there, and with parallel steps leaves it
    return run_id
