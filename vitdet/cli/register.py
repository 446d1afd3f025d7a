"""`vitdet register`: register a checkpoint in the MLflow model registry."""

from __future__ import annotations

import argparse

from vitdet.cli.arguments import CHECKPOINT, add_file, add_folder, given_path


def add_register(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet register`."""
    verb.add_argument("checkpoint", type=given_path, help=CHECKPOINT)
    help = (
        "alias to set in addition to `candidate`; `champion` is set only if the model version "
        "passes the gate, which re-evaluates the champion if necessary (default: none)"
    )
    verb.add_argument("--alias", metavar="NAME", default="candidate", help=help)
    settings = "tracking, gate, data and evaluate settings"
    add_file(
        verb, "--config", f"YAML file with the {settings} (default: the checkpoint's settings)"
    )
    help = (
        "JSON file from --output of `vitdet evaluate`; its metrics become tags of the version "
        "(default: the checkpoint's metrics)"
    )
    add_file(verb, "--metrics", help)
    help = "folder from --plots of `vitdet evaluate`; the version gets its report and matches"
    add_folder(verb, "--plots", help)
    add_file(verb, "--output", "write the model name, version and alias to this JSON file")
    verb.set_defaults(run=run_register)


def run_register(args: argparse.Namespace) -> int:
    """Run `vitdet register`."""
    from vitdet import stages
    from vitdet.data.layout import resolve_config
    from vitdet.files import write_json
    from vitdet.stages.workspace import result
    from vitdet.tracking.gate import RejectedError
    from vitdet.tracking.measured import read_measured, read_metrics
    from vitdet.tracking.runs import default_folder

    checkpoint = result(args.checkpoint)
    try:
        found = stages.register(
            checkpoint,
            folder=default_folder(checkpoint.parent),
            alias=args.alias,
            config=resolve_config(args.config)[0] if args.config else None,
            metrics=read_metrics(args.metrics) if args.metrics else None,
            measured=read_measured(args.metrics) if args.metrics else None,
            plots=args.plots,
        )
    except RejectedError as error:
        if args.output:
            write_json(args.output, dict(error.registered))
        raise
    reason = f": {found.reason}" if found.reason else ""
    print(f"{found.name}, version {found.version} ({args.alias}){reason}")
    if args.output:
        content = {"name": found.name, "version": found.version, "alias": args.alias}
        write_json(args.output, content)
    return 0
