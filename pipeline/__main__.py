"""python -m pipeline: the command line of the experiment pipeline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.remote_verbs import add_verbs


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on stderr and exit code 1 (2 for the command line itself)."""
    given = parser().parse_args(arguments)
    try:
        code = given.run(given)
    except (ValueError, OSError, RuntimeError) as error:
        print("pipeline:", *str(error).splitlines(), file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """All verbs and their arguments."""
    root = argparse.ArgumentParser(
        prog="python -m pipeline", description="The experiment as a Kubeflow pipeline."
    )
    verbs = root.add_subparsers(required=True, metavar="VERB")
    add_compile(
        verbs.add_parser(
            "compile",
            allow_abbrev=False,
            help="write the pipeline to a file, for `submit` or Kubeflow's pages",
        )
    )
    add_run(
        verbs.add_parser(
            "run", allow_abbrev=False, help="run the pipeline on this machine, without a cluster"
        )
    )
    add_verbs(verbs)
    return root


def add_compile(verb: argparse.ArgumentParser) -> None:
    """The words of `compile`."""
    verb.add_argument("file", type=Path, metavar="FILE", help="the YAML file to write")
    verb.add_argument(
        "--job",
        metavar="FILE",
        default="",
        help="YAML with the training jobs to start, as `kubectl kustomize manifests/overlays/NAME` "
        "prints it; - is the standard input (the jobs in manifests/ as they are)",
    )
    verb.set_defaults(run=run_compile)


def run_compile(given: argparse.Namespace) -> int:
    """python -m pipeline compile"""
    from pipeline.order import bare, jobs, specification
    from pipeline.pipeline import compile_pipeline

    if given.file.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{given.file}: the name of a compiled pipeline ends in .yaml")
    text = jobs(given.job)
    given.file.parent.mkdir(parents=True, exist_ok=True)
    print(compile_pipeline(given.file, text))
    if said := bare(specification(given.file, {"recipes": []}, True)):
        print(f"pipeline: {said}", file=sys.stderr)
    return 0


def add_run(verb: argparse.ArgumentParser) -> None:
    """The words of `run`."""
    verb.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="a recipe's name or file; several are compared"
    )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a setting, as `vitdet train --set`; may be repeated",
    )
    verb.add_argument(
        "--workspace",
        type=Path,
        default=Path("work/pipeline"),
        metavar="DIR",
        help="folder for data, runs and models; relative paths of the recipes start here (work/pipeline)",
    )
    verb.set_defaults(run=run_run)


def run_run(given: argparse.Namespace) -> int:
    """python -m pipeline run"""
    from pipeline.local import run_here
    from pipeline.order import check

    recipes = [
        str(Path(one).resolve()) if Path(one).suffix in (".yaml", ".yml") else one
        for one in given.recipes
    ]
    check(recipes, given.overrides)
    workspace = given.workspace.resolve()
    run_id = run_here(recipes, given.overrides, workspace)
    print(f"run {run_id}\nlog {workspace / 'pipeline' / run_id}.log")
    return 0


if __name__ == "__main__":
    main()
