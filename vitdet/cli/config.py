"""`vitdet config`: a resolved config, or the names of the recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.cli.overrides import add_set
from vitdet.config import dump_config, load_config, recipes, save_config


def add_config(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `config`."""
    verb.add_argument(
        "recipe",
        nargs="?",
        help="a recipe's name or a YAML file; without one, the names are listed",
    )
    add_set(verb)
    verb.add_argument("--output", type=Path, help="write it to this file instead")
    verb.set_defaults(run=run_config)


def run_config(given: argparse.Namespace) -> int:
    """vitdet config"""
    if given.recipe is None:
        if given.overrides or given.output:
            raise ValueError("of which recipe? `vitdet config` alone lists them")
        print("\n".join(recipes()))
        return 0
    config = load_config(given.recipe, given.overrides)
    if given.output:
        save_config(config, given.output)
    else:
        print(dump_config(config), end="")
    return 0
