"""The command line. Each command has a module that adds its arguments and runs the command.

The function that runs a command returns the exit code. Slow imports, such as torch, are inside this
function, so that `vitdet --help` is fast. `main` prints a user error in one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence

from vitdet import __version__
from vitdet.cli.arguments import add_kind
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

VERBS = {
    "config": (add_config, "print the resolved settings of a recipe, or the names of all recipes"),
    "data": (add_data, "download, generate, check, report on or convert a data set"),
    "weights": (add_weights, "list, download, convert or pre-train weights"),
    "train": (add_train, "train a detector, or resume an interrupted training run"),
    "evaluate": (
        add_evaluate,
        "compute the AP of a checkpoint on its validation images, or of a results file",
    ),
    "compare": (add_compare, "compare the AP of detectors, with confidence intervals"),
    "predict": (add_predict, "detect objects in images and draw them"),
    "bench": (add_bench, "measure the speed of training, detection, evaluation or data loading"),
    "register": (add_register, "register a checkpoint in the MLflow model registry"),
    "promote": (
        add_promote,
        "make a registered model version the champion if it passes the promotion gate",
    ),
    "rollback": (add_rollback, "make the previous champion the champion again"),
}
# command -> advice if the GPU runs out of memory
MEMORY_ADVICE = {
    "train": "Raise train.accumulate (the same batch in smaller micro-batches), set "
    "train.activation_checkpointing=blocks, or lower train.batch_size, data.image_size or, for "
    "evaluations, evaluate.batch_size; or use a GPU with more memory",
    "evaluate": "Lower evaluate.batch_size, or use a GPU with more memory or the CPU: "
    "CUDA_VISIBLE_DEVICES= vitdet evaluate ...",
    "predict": "Use a GPU with more memory or the CPU: CUDA_VISIBLE_DEVICES= vitdet predict ...",
}
SIGPIPE = 141  # exit code that a shell reports for a process ended by this signal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; 1: user error, 2: invalid arguments, 130: Ctrl-C."""
    verb = ""
    try:
        try:
            args = parser().parse_args(arguments)
            verb = args.verb
            code = _run(args)
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            # after `vitdet weights list | head -1`, flushing stdout at exit must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = SIGPIPE
        elif message := _message(error, verb):
            print(f"vitdet: {message}", file=sys.stderr)
            code = 1
        else:
            raise
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    # hide Pillow's warnings about images: vitdet checks images itself
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for handler in logging.root.handlers:
        handler.addFilter(HidingFilter())
    return args.run(args)


def _message(error: Exception, verb: str) -> str:
    """Return the error message for a user error, in one line, or "" for a bug in vitdet."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # avoids importing torch and mlflow
    lines = hide_credentials(error).strip().splitlines() or [type(error).__name__]
    if "OutOfMemoryError" in kinds:
        # keep the sentences on requested and available memory, not those on torch's allocator
        memory = "".join(lines[0].partition(" is free.")[:2])
        return f"{memory} {MEMORY_ADVICE.get(verb, 'Use a GPU with more memory')}"
    if "MlflowException" in kinds:
        return lines[0]
    if isinstance(error, ValueError | OSError | LookupError):
        return "" if isinstance(error, KeyError | IndexError) else " ".join(lines)
    return ""


def _output_is_closed() -> bool:
    """Return whether the reader of standard output has closed the pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _Version(argparse.Action):
    """Print the versions of vitdet, torch and Python. Imports torch only when called."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import torch

        print(f"vitdet {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their arguments."""
    description = "Train, evaluate and register plain Vision Transformer detectors (ViTDet)."
    root = argparse.ArgumentParser(prog="vitdet", description=description)
    help = "print the versions of vitdet, torch and Python"
    root.add_argument("--version", action=_Version, nargs=0, help=help)
    verbs = root.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, (add_arguments, help) in VERBS.items():
        add_arguments(add_kind(verbs, name, help))
    return root
