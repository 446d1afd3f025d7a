"""python -m pipeline run: run the pipeline on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.arguments import add_command, add_experiment, add_parallel
from pipeline.request import check_recipes, is_file


def add_run(commands: argparse._SubParsersAction) -> None:
    """Add the command and its arguments."""
    command = add_command(commands, "run", "run the pipeline on this machine, without a cluster")
    command.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="name or file of a recipe; several recipes are compared",
    )
    add_experiment(command)
    add_parallel(command, "default: 1, at most 2")
    command.add_argument(
        "--workspace",
        type=Path,
        default=Path("work/pipeline"),
        metavar="DIR",
        help="folder for data, runs and models; base of relative paths in recipes "
        "(default: work/pipeline)",
    )
    command.set_defaults(run=run_run)


def run_run(args: argparse.Namespace) -> int:
    """Run all steps as processes; print the run's ID and the path of its log."""
    from pipeline.local import run_locally

    recipes = [
        str(Path(recipe).resolve()) if is_file(recipe) else recipe for recipe in args.recipes
    ]
    check_recipes(recipes, args.overrides, args.sweep, args.seeds, args.fetch)
    workspace = args.workspace.resolve()
    run_id = run_locally(
        recipes,
        args.overrides,
        workspace,
        sweep=args.sweep,
        seeds=args.seeds,
        fetch=args.fetch,
        parallel=args.parallel or 1,
    )
    print(f"run {run_id}\nlog {workspace / 'pipeline' / run_id}.log")
    return 0
