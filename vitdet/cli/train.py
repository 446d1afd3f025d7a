"""`vitdet train`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from vitdet.cli.overrides import add_set
from vitdet.config import Config, load_config, recipes


def add_train(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `train`."""
    verb.add_argument("recipe", help="a recipe's name or a YAML file")
    add_set(verb)
    verb.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for model.pt, config.yaml and checkpoints",
    )
    verb.add_argument(
        "--checkpoints",
        type=Path,
        help="keep training states here, by config and data, not in --output",
    )
    verb.add_argument(
        "--weights", type=Path, help="folder that `vitdet weights fetch` filled, for train.init"
    )
    verb.add_argument(
        "--group", default="", metavar="RUN", help="the pipeline run that MLflow shows it under"
    )
    verb.set_defaults(run=run_train)


def run_train(given: argparse.Namespace) -> int:
    """vitdet train"""
    from vitdet import distributed
    from vitdet.stages import train_tracked
    from vitdet.training import Stopped

    config = own_data(load_config(given.recipe, given.overrides), given)
    try:
        path = train_tracked(
            config,
            Path(given.recipe).stem,
            given.output,
            checkpoints=given.checkpoints,
            weights=given.weights,
            group=given.group,
        )
    except Stopped as stopped:
        print(f"vitdet: {stopped}", file=sys.stderr)
        return 143  # as the shell says of a process that SIGTERM ended
    if distributed.rank() == 0:
        print(path)
    return 0


def own_data(config: Config, given: argparse.Namespace) -> Config:
    """The config for the data that --set data.root puts in the place of a recipe's; says what this changes.

    A file of settings is taken at its word, as a recipe that --set goes on from is not.
    """
    if given.recipe not in recipes():
        return config
    from vitdet import distributed
    from vitdet.data.layout import follow

    config, found = follow(config, given.overrides)
    if found and distributed.rank() == 0:
        settings = ", ".join(f"{key}={value}" for key, value in found.items())
        logging.getLogger(__name__).info("%s has %s", config.data.root, settings)
    return config
