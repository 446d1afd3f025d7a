"""python -m pipeline submit: start a run, or a schedule of runs, on a cluster."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from components.launcher.templates import KINDS
from pipeline.cli.arguments import (
    add_command,
    add_experiment,
    add_parallel,
    add_server,
    add_text,
    add_version,
    connect_server,
    positive,
    read_job_file,
    remark,
)
from pipeline.client import RECURRING, Server, failed_steps
from pipeline.connection import ServerError
from pipeline.request import (
    MOUNT,
    RunRequest,
    Schedule,
    check_recipes,
    default_image_warning,
    kubeflow_cron,
    load_package,
)
from pipeline.versions import FIELDS, OLDEST, Version, fit, text

EXPERIMENT = "vitdet"
ACCOUNT = "vitdet-pipeline"  # service account that may create training jobs


def add_submit(commands: argparse._SubParsersAction) -> None:
    """Add the command and its arguments."""
    command = add_command(commands, "submit", "train, evaluate and compare recipes on a cluster")
    command.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="name of a recipe, or absolute path of a recipe file on the cluster's volume",
    )
    add_experiment(command)
    cluster = command.add_argument_group("cluster settings (do not change what is trained)")
    cluster.add_argument(
        "--nodes",
        type=positive,
        metavar="N",
        help="number of nodes of each training run (default: as in the manifest)",
    )
    add_parallel(cluster, "default: 1, or as compiled into --package")
    cluster.add_argument(
        "--pool",
        metavar="NAME",
        help="node pool for training: value of the node label vitdet/pool or, for a PyTorchJob on "
        "GKE, name of the ComputeClass (default: as in the manifest)",
    )
    cluster.add_argument(
        "--job-kind",
        choices=KINDS,
        help="kind of training job (default: as in the manifest; pytorchjob if it has both kinds)",
    )
    cluster.add_argument(
        "--workspace",
        metavar="FOLDER",
        help=f"{MOUNT} (the shared volume) or a folder in it, for data and runs (default: {MOUNT})",
    )
    cluster.add_argument(
        "--service-account",
        default=ACCOUNT,
        metavar="NAME",
        help=f"service account of the steps (default: {ACCOUNT}; '': the server's default)",
    )
    add_text(cluster, "--pipeline-root", "URL", "URL of the storage for the steps' artifacts")
    run = command.add_argument_group("the run")
    run.add_argument(
        "--experiment",
        default=EXPERIMENT,
        metavar="NAME",
        help=f"experiment that contains the run (default: {EXPERIMENT})",
    )
    add_text(run, "--name", "NAME", "name (default: the recipes and, without --cron, the time)")
    run.add_argument("--no-cache", action="store_true", help="do not reuse cached results of steps")
    source = run.add_mutually_exclusive_group()
    source.add_argument(
        "--package", type=Path, metavar="FILE", help="compiled pipeline (default: compile it now)"
    )
    add_text(
        source,
        "--job",
        "FILE",
        "compile the pipeline with the training jobs in this YAML file, as `compile --job` does; "
        "- for standard input",
    )
    run.add_argument(
        "--wait", action="store_true", help="follow the run, and exit with 0 only if it succeeds"
    )
    add_text(
        run,
        "--cron",
        "WHEN",
        "create a schedule: '0 3 * * 1-5' as in a crontab (UTC), @daily or '@every 12h'",
    )
    run.add_argument(
        "--max-concurrency",
        type=int,
        choices=range(1, 11),
        default=1,
        metavar="N",
        help="with --cron: maximum number of concurrent runs, 1..10 (default: 1)",
    )
    run.add_argument("--no-catch-up", action="store_true", help="with --cron: skip missed runs")
    add_version(run, "default: the server's")
    add_server(command)
    command.set_defaults(run=run_submit)


def run_submit(args: argparse.Namespace) -> int:
    """Start a run or create a schedule, and print its ID and link; with --wait, follow the run."""
    schedule = None
    if [args.job, args.token_file, args.cookie_file].count("-") > 1:
        raise ValueError(
            "only one of --job, --token-file and --cookie-file can read standard input"
        )
    if args.cron:
        schedule = Schedule(args.cron, args.max_concurrency, catch_up=not args.no_catch_up)
        kubeflow_cron(args.cron)
        if args.wait:
            raise ValueError("--wait follows one run, but --cron starts many; omit --wait")
    check_pool(args.pool)
    if args.workspace and not Path(args.workspace).is_relative_to(MOUNT):
        raise ValueError(f"--workspace {args.workspace}: expected {MOUNT} or a folder in it")
    if not check_recipes(args.recipes, args.overrides, args.sweep, args.seeds, args.fetch):
        remark("the first step validates the recipes and settings that are not validated here")
    title = " + ".join(Path(recipe).stem for recipe in args.recipes)[:100]
    name = args.name or (title if schedule else f"{title} {time.strftime('%Y-%m-%d %H-%M-%S')}")
    cluster = {key: getattr(args, key) for key in ("nodes", "pool", "job_kind", "workspace")}
    experiment = {"sweep": args.sweep, "seeds": args.seeds, "fetch": args.fetch}
    parameters = {
        "recipes": args.recipes,
        "overrides": args.overrides,
        **{key: value for key, value in experiment.items() if value not in ([], 1, "")},
        **{key: value for key, value in cluster.items() if value is not None},
    }
    with compiled_package(args) as package:
        pipeline = load_package(package, parameters, not args.no_cache, args.parallel)
    if warning := default_image_warning(pipeline):
        remark(warning)
    request = RunRequest(
        pipeline, parameters, name, args.experiment, args.service_account, args.pipeline_root
    )
    server = connect_server(args)
    fit_pipeline(pipeline, server, args.kfp)
    try:
        run_id = server.start(request, server.namespace(args.namespace), schedule)
    except ServerError as error:
        raise refused(error, server) from None
    print(
        f"{'name' if schedule else 'run '} {name}\nid   {run_id}\n"
        f"link {server.link(run_id, RECURRING if schedule else 'runs')}",
        flush=True,
    )
    return follow(server, run_id, args.every) if args.wait else 0


def fit_pipeline(pipeline: dict, server: Server, asked: Version | None) -> None:
    """Remove fields that the server does not support, with a message for each field."""
    version, doubt = (asked, "") if asked else server.version()
    documents = [pipeline.get("pipeline_spec", pipeline), pipeline.get("platform_spec", {})]
    if lines := fit(documents, version):
        for line in [doubt, *lines] if doubt else lines:
            remark(line)


def refused(error: ServerError, server: Server) -> ServerError:
    """Return the error of a request that the server refused, with advice for an unknown field."""
    if not error.field:
        return error
    try:
        version, doubt = server.version()
    except ValueError as problem:  # older than the supported versions
        version, doubt = OLDEST, str(problem)
    since = [field.since for field in FIELDS if field.name == error.field]
    if not since:
        advice = "the pipeline was compiled with a newer kfp than the server supports"
    elif doubt:
        advice = f"pass the server's version with --kfp; it is older than {text(min(since))}"
    else:
        advice = f"use --kfp {text(version)}"
    server_is = "the server" if doubt else f"this is Pipelines {text(version)}; it"
    return ServerError(
        f"{server.host}: {server_is} does not support {error.field} in the pipeline: {advice}",
        error.status,
    )


def check_pool(name: str | None) -> None:
    """Raise ValueError if the pool's name is not a valid label value."""
    if name and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        raise ValueError(
            f"--pool {name!r}: expected a label value: at most 63 letters, digits, -, _ or ., "
            "beginning and ending with a letter or digit"
        )


@contextmanager
def compiled_package(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the path of the --package file, or of a pipeline compiled with the jobs of --job."""
    if args.package:
        yield args.package
        return
    from pipeline.graph import compile_pipeline
    from pipeline.job_manifests import job_kinds

    text, wanted = read_job_file(args.job), args.job_kind
    if text and wanted and wanted not in job_kinds(text):
        found = " and ".join(sorted(job_kinds(text)))
        raise ValueError(f"--job {args.job}: contains no {wanted}, only {found}; see --job-kind")
    with TemporaryDirectory() as folder:
        yield compile_pipeline(Path(folder) / "pipeline.yaml", text)


def follow(server: Server, run_id: str, every: float) -> int:
    """Wait for the end of a run, print the reasons if it failed, and return the exit code."""
    try:
        run = server.follow(run_id, every)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        remark(f"the run continues; `python -m pipeline terminate {run_id}` ends it")
        return 130
    failed = failed_steps(run)
    for name, message in failed:
        reason = message or "the server reports no reason; see the step's log"
        remark(f"{name} failed: {reason}")
    if run.state == "SUCCEEDED" and not failed:
        return 0
    remark(f"run {run_id} {'FAILED' if failed else run.state}: {server.link(run_id)}")
    return 1
