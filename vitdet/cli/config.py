"""`vitdet config`: a resolved config, or the names of the recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from vitdet.cli.overrides import add_set, log_resolved
from vitdet.config import Config, dump_config, recipes, to_dict
from vitdet.data.layout import CLASSES, explicit_settings, resolve_config
from vitdet.files import written


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


def run_config(args: argparse.Namespace) -> int:
    """vitdet config"""
    if args.recipe is None:
        if args.overrides or args.output:
            raise ValueError("--set and --output need a recipe; run `vitdet config` to list them")
        print("\n".join(recipes()))
        return 0
    config, found = resolve_config(args.recipe, args.overrides)
    log_resolved(config, found)
    text = dump_config(config)
    explicit = explicit_settings(args.recipe, args.overrides)
    if "data.root" in explicit and CLASSES not in explicit:
        text = without_classes(config)
    if args.output:
        with written(args.output) as temporary:
            temporary.write_text(text)
    else:
        print(text, end="")
    return 0


def without_classes(config: Config) -> str:
    """The config as YAML without the number of classes, which `vitdet train` then reads from the data: it may change."""
    tree = to_dict(config)
    del tree["model"]["roi_heads"]["num_classes"]
    return (
        f"# {CLASSES}: as many as the data in data.root has\n"
        f"{yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)}"
    )
