"""A closed stdout pipe, as in `vitdet weights list | head -1`, is not an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import python
from tests.conftest import ROOT, environment

SIGPIPE = 141  # exit code that a shell reports for a process ended by SIGPIPE


COMMANDS = ["-m vitdet weights list", "-m vitdet config tiny", "-m vitdet --help"]
UNBUFFERED = [f"-u {command}" for command in (*COMMANDS, "-m pipeline compile OUTPUT")]


@pytest.mark.parametrize("command", COMMANDS + UNBUFFERED)
def test_a_closed_pipe_ends_the_command_without_a_message(command: str, tmp_path: Path) -> None:
    words = command.replace("OUTPUT", str(tmp_path / "pipeline.yaml")).split()
    variables = {**environment(tmp_path), "VITDET_IMAGE": "registry.example.com/vitdet:1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=variables, **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    # argparse ignores output errors: the exit code of unbuffered --help is 0
    assert process.wait() in ((0, SIGPIPE) if "--help" in words else (SIGPIPE,))


def test_a_shell_shows_the_first_line_only(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m vitdet weights list | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert done.returncode in (0, SIGPIPE)  # 0 if the output fits into the pipe's buffer


def test_other_broken_pipes_are_reported(tmp_path: Path) -> None:
    code = (
        "import argparse, vitdet.cli\n"
        "def run(args):\n    raise BrokenPipeError(32, 'Broken pipe', 'the server')\n"
        "parser = argparse.ArgumentParser()\nparser.set_defaults(run=run, verb='run')\n"
        "vitdet.cli.parser = lambda: parser\nvitdet.cli.main([])\n"
    )
    done = python(tmp_path, "-c", code)
    assert done.returncode == 1
    assert done.stderr == "vitdet: [Errno 32] Broken pipe: 'the server'\n"
