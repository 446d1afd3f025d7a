"""The command line of the pipeline: one file per command."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence

from pipeline.cli.compile import add_compile
from pipeline.cli.run import add_run
from pipeline.cli.status import add_status
from pipeline.cli.submit import add_submit
from pipeline.cli.terminate import add_terminate

SIGPIPE = 141  # exit code: 128 + the signal's number, as in a shell


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exit with 1 and one line for a user error, 2 for invalid arguments."""
    args = parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            # e.g. `python -m pipeline status RUN | head -1`; discard output that is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = SIGPIPE
        else:
            print("pipeline:", *str(error).splitlines(), file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def output_is_closed() -> bool:
    """Return whether the reader of standard output has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    root = argparse.ArgumentParser(
        prog="python -m pipeline", description="Run experiments as a Kubeflow pipeline."
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    add_compile(commands)
    add_run(commands)
    add_submit(commands)
    add_status(commands)
    add_terminate(commands)
    return root
