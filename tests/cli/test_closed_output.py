"""A closed stdout pipe, as in `vitdet weights list | head -1`, is not an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

SIGPIPE = 141  # exit code that a shell reports for a process that the signal ended


@pytest.mark.parametrize("command", ["weights list", "config tiny", "--help"])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_closed_pipe_ends_the_command_without_a_message(
    command: str, unbuffered: bool, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, *(["-u"] if unbuffered else []), "-m", "vitdet", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert errors == ""
    # argparse ignores errors of its own output: 0 for --help that is not buffered
    assert process.wait() in ((0, SIGPIPE) if command == "--help" else (SIGPIPE,))


def test_a_closed_pipe_ends_a_command_of_the_pipeline_without_a_message(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pipeline", "compile", str(tmp_path / "pipeline.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment(tmp_path), "VITDET_IMAGE": "registry.example.com/vitdet:1"},
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == SIGPIPE


def test_a_shell_shows_the_first_line_only(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m vitdet weights list | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert done.returncode in (0, SIGPIPE)  # 0 where all fits into the pipe's buffer


def test_other_broken_pipes_are_reported(tmp_path: Path) -> None:
    code = (
        "import argparse, vitdet.cli\n"
        "def run(args):\n    raise BrokenPipeError(32, 'Broken pipe', 'the server')\n"
        "parser = argparse.ArgumentParser()\nparser.set_defaults(run=run, verb='run')\n"
        "vitdet.cli.parser = lambda: parser\nvitdet.cli.main([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert done.returncode == 1
    assert done.stderr == "vitdet: [Errno 32] Broken pipe: 'the server'\n"
