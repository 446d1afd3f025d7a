"""python -m pipeline compile: write the pipeline to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.arguments import (
    add_command,
    add_parallel,
    add_text,
    add_version,
    read_job_file,
    remark,
)
from pipeline.request import default_image_warning, fit_package, load_package
from pipeline.versions import NEWEST, text


def add_compile(commands: argparse._SubParsersAction) -> None:
    """Add the command and its arguments."""
    command = add_command(
        commands,
        "compile",
        "write the pipeline to a file, for `submit` or Kubeflow's web interface",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="YAML file to write")
    add_text(
        command,
        "--job",
        "FILE",
        "YAML with the training jobs to start, as printed by `kubectl kustomize "
        "manifests/overlays/NAME`; - for standard input (default: the jobs in manifests/)",
    )
    add_parallel(command, "default: 1")
    add_version(command, f"default: {text(NEWEST)}, the newest supported")
    command.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> int:
    """Compile the pipeline; warn if it uses the placeholder image."""
    from pipeline.graph import compile_pipeline

    if args.file.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{args.file}: the name of a compiled pipeline must end in .yaml or .yml")
    job = read_job_file(args.job)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    compile_pipeline(args.file, job, args.parallel or 1)
    for line in fit_package(args.file, args.kfp or NEWEST):
        remark(line)
    print(args.file)
    if warning := default_image_warning(load_package(args.file, {"recipes": []}, True)):
        remark(warning)
    return 0
