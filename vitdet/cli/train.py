"""`vitdet train`: train a detector, or resume an interrupted training run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitdet import torchrun
from vitdet.cli.arguments import add_folder, given_path
from vitdet.cli.overrides import add_set, log_resolved
from vitdet.config import load_config


def add_train(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet train`."""
    verb.add_argument("recipe", help="name of a recipe, or a YAML file")
    add_set(verb)
    help = "output folder, for model.pt, best.pt, config.yaml and checkpoints/"
    verb.add_argument("--output", metavar="DIR", type=given_path, required=True, help=help)
    help = (
        "shared folder for the training states to resume from, with a subfolder for each config, "
        "data set and initial weights (default: OUTPUT/checkpoints, without subfolders)"
    )
    add_folder(verb, "--checkpoints", help)
    help = "folder with the fetched weights for train.init (default: ~/.cache/vitdet)"
    add_folder(verb, "--weights", help)
    help = "ID of a pipeline run, whose MLflow run becomes the parent of the new MLflow run"
    verb.add_argument("--group", default="", metavar="RUN", help=help)
    help = "profile a few steps, without compilation: trace in OUTPUT/profile, times in the log"
    verb.add_argument("--profile", action="store_true", help=help)
    verb.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Run `vitdet train`."""
    torchrun.end_with_torchrun()
    from vitdet.data.samplers import check_batch_size

    # fail before importing torch, reading the data and joining the process group
    train = load_config(args.recipe, args.overrides).train
    check_batch_size(train.batch_size, torchrun.world_size(), train.accumulate)

    from vitdet import distributed, stages
    from vitdet.checkpoint import load_model_file
    from vitdet.data.layout import resolve_config
    from vitdet.training import Stopped

    config, found = resolve_config(args.recipe, args.overrides)
    if distributed.rank() == 0:
        log_resolved(config, found)
    try:
        path = stages.train(
            config,
            Path(args.recipe).stem,
            args.output,
            checkpoints=args.checkpoints,
            weights=args.weights,
            group=args.group,
            profile=args.profile,
        )
    except Stopped as stopped:
        print(f"vitdet: {stopped}", file=sys.stderr)
        return 128 + stopped.signum  # exit code that a shell reports for this signal
    if distributed.rank() == 0:
        print(path)
        if metric := config.train.keep_best:
            best_path = path.with_name("best.pt")
            best = load_model_file(best_path)
            print(f"{best_path}: step {best['step']}, {metric} {best['metrics'][metric]:.4g}")
    return 0
