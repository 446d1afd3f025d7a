"""The command line. Each verb has a module of its own: its arguments, and the call that runs it.

Imports of torch, MLflow and the like are inside the functions that run a verb, so that `vitdet --help` and
`vitdet config` answer at once. A verb returns the exit code; `main` prints the errors that it raises in one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence

from vitdet.cli.bench import add_bench
from vitdet.cli.compare import add_compare
from vitdet.cli.config import add_config
from vitdet.cli.data import add_data
from vitdet.cli.evaluate import add_evaluate
from vitdet.cli.predict import add_predict
from vitdet.cli.promote import add_promote, add_rollback
from vitdet.cli.register import add_register
from vitdet.cli.train import add_train
from vitdet.cli.weights import add_weights
from vitdet.tracking.address import HidingFilter, hide_credentials

# what a user can change when a GPU's memory does not suffice
MEMORY_ADVICE = {
    "train": "Raise train.accumulate (the same batch in smaller parts), set train.activation_checkpointing=blocks, or lower "
    "train.batch_size, data.image_size or, for evaluations, evaluate.batch_size; or use a GPU "
    "with more memory",
    "evaluate": "Lower evaluate.batch_size, or use a GPU with more memory or the CPU: CUDA_VISIBLE_DEVICES= vitdet evaluate ...",
    "predict": "Use a GPU with more memory or the CPU: CUDA_VISIBLE_DEVICES= vitdet predict ...",
}
SIGPIPE = 141  # the exit code that a shell reports for a program that this signal ended


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on stderr and exit code 1 (2 for the command line itself)."""
    verb = ""
    try:
        try:
            args = parser().parse_args(arguments)
            verb = args.verb
            code = _run(args)
        finally:
            print(end="", flush=True)
    except (ValueError, OSError, LookupError) as error:
        if isinstance(error, KeyError | IndexError):
            raise  # a mistake of ours, not of the user's
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            # as in `vitdet weights list | head -1`; what is still buffered must not fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = SIGPIPE
        else:
            print("vitdet:", *hide_credentials(error).splitlines(), file=sys.stderr)
            code = 1
    except Exception as error:
        # torch's and MLflow's, which are not imported here
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds & {"OutOfMemoryError", "MlflowException"}:
            raise
        line = next(iter(hide_credentials(error).strip().splitlines()), type(error).__name__)
        if "OutOfMemoryError" in kinds:
            # what was asked for and what the GPU has; torch goes on to explain its allocator
            line = "".join(line.partition(" is free.")[:2])
            line += f" {MEMORY_ADVICE.get(verb, 'Use a GPU with more memory')}"
        print(f"vitdet: {line}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    # what matters about an odd image is logged in one line
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for handler in logging.root.handlers:
        handler.addFilter(HidingFilter())
    return args.run(args)


def _output_is_closed() -> bool:
    """Whether the reader of the pipe that is standard output has closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parser() -> argparse.ArgumentParser:
    """All verbs and their arguments."""
    root = argparse.ArgumentParser(prog="vitdet", description="Plain Vision Transformer detectors.")
    verbs = root.add_subparsers(required=True, metavar="VERB", dest="verb")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")

    add_config(
        add("config", help="print the resolved settings of a recipe, or the names of all recipes")
    )
    add_data(add("data", help="fetch, check, convert or generate a data set"))
    add_weights(add("weights", help="list, fetch and convert published weights"))
    add_train(add("train", help="train a detector, or resume an interrupted training"))
    add_evaluate(
        add(
            "evaluate",
            help="compute AP of a checkpoint on its validation images, or of a results file",
        )
    )
    add_compare(add("compare", help="compare the AP of results, with confidence intervals"))
    add_predict(add("predict", help="detect objects in images and draw them"))
    add_bench(
        add("bench", help="measure the speed of training, detection, evaluation or data loading")
    )
    add_register(add("register", help="add a checkpoint to the MLflow model registry"))
    add_promote(add("promote", help="make a registered version the champion if it passes the gate"))
    add_rollback(add("rollback", help="restore the previous champion"))
    return root
