"""`vitdet config`: a resolved config, or the names of the recipes."""

from __future__ import annotations

import argparse

from vitdet.cli.overrides import add_set, log_resolved
from vitdet.cli.paths import given_path


def add_config(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `config`."""
    verb.add_argument(
        "recipe",
        nargs="?",
        help="name of a recipe, or a YAML file (default: list the recipes)",
    )
    add_set(verb)
    verb.add_argument(
        "--output",
        type=given_path,
        metavar="FILE",
        help="write the settings to this file (default: standard output)",
    )
    verb.add_argument(
        "--training",
        type=given_path,
        metavar="FILE",
        help="also write the settings that affect the result of a training to this JSON file",
    )
    verb.set_defaults(run=run_config)


def run_config(args: argparse.Namespace) -> int:
    """vitdet config"""
    from vitdet.config import dump_config, recipes
    from vitdet.data.layout import FROM_DATA, explicit_settings, following, resolve_config
    from vitdet.digest import training_settings
    from vitdet.files import write_json, written

    if args.recipe is None:
        if args.overrides or args.output or args.training:
            raise ValueError("--set and --output need a recipe; run `vitdet config` to list them")
        print("\n".join(recipes()))
        return 0
    config, found = resolve_config(args.recipe, args.overrides)
    log_resolved(config, found)
    text = dump_config(config)
    if settings := following(explicit_settings(args.recipe, args.overrides)):
        # `vitdet train` reads them again, as the data may have come or changed by then
        text = f"{FROM_DATA}{', '.join(settings)}\n{text}"
    if args.training:
        write_json(args.training, training_settings(config))
    if args.output:
        with written(args.output) as temporary:
            temporary.write_text(text)
    else:
        print(text, end="")
    return 0
