"""`vitdet config`: print a resolved config or the names of the recipes."""

from __future__ import annotations

import argparse

from vitdet.cli.arguments import add_file
from vitdet.cli.overrides import add_set, log_resolved


def add_config(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet config`."""
    help = "name of a recipe, or a YAML file (default: list the recipes)"
    verb.add_argument("recipe", nargs="?", help=help)
    add_set(verb)
    add_file(verb, "--output", "write the settings to this file (default: standard output)")
    help = "also write the settings that affect the trained weights to this JSON file"
    add_file(verb, "--training", help)
    verb.set_defaults(run=run_config)


def run_config(args: argparse.Namespace) -> int:
    """Run `vitdet config`."""
    from vitdet.config import dump_config, recipes
    from vitdet.config.digest import training_settings
    from vitdet.data.layout import FROM_DATA, explicit_settings, following, resolve_config
    from vitdet.files import atomic_write, write_json

    if args.recipe is None:
        if args.overrides or args.output or args.training:
            raise ValueError("--set, --output and --training need a recipe; see `vitdet config`")
        print("\n".join(recipes()))
        return 0
    config, found = resolve_config(args.recipe, args.overrides)
    log_resolved(config, found)
    text = dump_config(config)
    if settings := following(explicit_settings(args.recipe, args.overrides)):
        # `vitdet train` determines these settings again, since the data may change before training
        text = f"{FROM_DATA}{', '.join(settings)}\n{text}"
    if args.training:
        write_json(args.training, training_settings(config))
    if args.output:
        with atomic_write(args.output) as temporary:
            temporary.write_text(text)
    else:
        print(text, end="")
    return 0
