"""The verbs that speak with a server: submit, status, terminate. Words and help, a call, lines for the reader."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from kfp_server_api import V2beta1RecurringRun, V2beta1Run

from pipeline.client import ENDED, Server, failures, steps
from pipeline.connection import LOGIN, Refusal, address, connect, inside, secrets
from pipeline.order import Order, Schedule, bare, check, cron, jobs, pool, specification

EXPERIMENT = "vitdet"
ACCOUNT = "vitdet-pipeline"  # may make training jobs
STOPPING = 300.0  # seconds until a run has ended: the pods' grace of 30, Argo's looks, the pod of the exit handler
RECURRING = "recurringrun"  # as the links of Kubeflow's pages call a schedule


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """Adds submit, status and terminate to the command line."""
    verb = verbs.add_parser(
        "submit", allow_abbrev=False, help="train, evaluate and compare recipes on a cluster"
    )
    verb.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="a recipe's name, or the absolute path of one on the cluster's volume",
    )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a setting, as `vitdet train --set`; may be repeated",
    )
    shape = verb.add_argument_group("the cluster's part, no part of the experiment")
    shape.add_argument("--nodes", type=positive, metavar="N", help="machines a training runs on")
    shape.add_argument(
        "--pool", metavar="NAME", help="the pool of nodes that trains (their label vitdet/pool)"
    )
    shape.add_argument(
        "--job-kind", choices=("pytorchjob", "trainjob"), help="what the training job is made as"
    )
    shape.add_argument(
        "--workspace", metavar="FOLDER", help="the folder for data and runs on the shared volume"
    )
    shape.add_argument(
        "--service-account",
        default=ACCOUNT,
        metavar="NAME",
        help=f"whose rights the steps have ({ACCOUNT}, of manifests/; '' leaves it to the server)",
    )
    shape.add_argument(
        "--pipeline-root", default="", metavar="URL", help="where the steps' artifacts are kept"
    )
    run = verb.add_argument_group("the run")
    run.add_argument(
        "--experiment", default=EXPERIMENT, metavar="NAME", help=f"group of runs ({EXPERIMENT})"
    )
    run.add_argument("--name", default="", help="of the run (the recipes and the time)")
    run.add_argument(
        "--no-cache", action="store_true", help="run every step, also one that has run before"
    )
    source = run.add_mutually_exclusive_group()
    source.add_argument(
        "--package",
        type=Path,
        metavar="FILE",
        help="a compiled pipeline; without, it is compiled now",
    )
    source.add_argument(
        "--job",
        default="",
        metavar="FILE",
        help="compile it with the training jobs of this YAML, as `compile --job`; - is standard input",
    )
    run.add_argument(
        "--wait", action="store_true", help="follow the run; exit code 0 only when it succeeded"
    )
    run.add_argument(
        "--cron",
        default="",
        metavar="WHEN",
        help="start it again and again: '0 3 * * 1-5' as in a crontab (UTC), @daily, '@every 12h'",
    )
    run.add_argument(
        "--max-concurrency",
        type=int,
        choices=range(1, 11),
        default=1,
        metavar="N",
        help="with --cron: runs at one time, 1..10 (1)",
    )
    run.add_argument(
        "--no-catch-up",
        action="store_true",
        help="with --cron: leave out the times that were missed",
    )
    add_server(verb)
    verb.set_defaults(run=run_submit)

    for name, does, told in (
        ("status", run_status, "say how far a run is, or when a schedule starts one"),
        ("terminate", run_terminate, "end a run and delete its training jobs; delete a schedule"),
    ):
        verb = verbs.add_parser(name, allow_abbrev=False, help=told)
        verb.add_argument("run_id", metavar="RUN", help="the id of a run or schedule, or its link")
        add_server(verb)
        verb.set_defaults(run=does)


def add_server(verb: argparse.ArgumentParser) -> None:
    """Where the server is and who asks."""
    group = verb.add_argument_group("the server")
    group.add_argument(
        "--host",
        default="",
        metavar="URL",
        help="address of Kubeflow Pipelines, as in https://kubeflow.example.com/pipeline "
        "(KF_PIPELINES_ENDPOINT; in a pod the cluster's own)",
    )
    group.add_argument(
        "--ui-host", default="", metavar="URL", help="address for links, where it is another one"
    )
    group.add_argument(
        "--namespace", default="", metavar="NAME", help="your profile's, on a server with users"
    )
    group.add_argument(
        "--token-file",
        default="",
        metavar="FILE",
        help="holds a bearer token; - is the standard input (KFP_TOKEN; in a pod the pod's own)",
    )
    group.add_argument(
        "--cookie-file",
        default="",
        metavar="FILE",
        help="holds the browser's cookie NAME=VALUE of a login page (KFP_COOKIE)",
    )
    group.add_argument(
        "--ca-file", default="", metavar="FILE", help="certificate of a private authority"
    )
    group.add_argument(
        "--timeout", type=seconds, default=30.0, metavar="S", help="for one answer (30)"
    )
    group.add_argument(
        "--retries",
        type=int,
        default=3,
        metavar="N",
        help="after an answer that failed to come (3)",
    )
    group.add_argument("--every", type=seconds, default=10.0, help=argparse.SUPPRESS)
    group.add_argument(
        "--token", "--cookie", "--existing-token", dest="spoken", help=argparse.SUPPRESS
    )


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return number


def run_submit(given: argparse.Namespace) -> int:
    """python -m pipeline submit"""
    schedule = None
    if [given.job, given.token_file, given.cookie_file].count("-") > 1:
        raise ValueError(
            "the standard input can be read once: as --job, --token-file or --cookie-file"
        )
    if given.cron:
        schedule = Schedule(given.cron, given.max_concurrency, catch_up=not given.no_catch_up)
        cron(given.cron)
        if given.wait:
            raise ValueError("--wait is for one run, --cron starts many; look at them with status")
    pool(given.pool)
    if not check(given.recipes, given.overrides):
        print(
            "pipeline: recipes and settings could not be looked through here; the first step does",
            file=sys.stderr,
        )
    title = " + ".join(Path(recipe).stem for recipe in given.recipes)[:100]
    name = given.name or (title if schedule else f"{title} {time.strftime('%Y-%m-%d %H-%M-%S')}")
    shape = {
        "nodes": given.nodes,
        "pool": given.pool,
        "job_kind": given.job_kind,
        "workspace": given.workspace,
    }
    parameters = {
        "recipes": given.recipes,
        "overrides": given.overrides,
        **{key: value for key, value in shape.items() if value is not None},
    }
    with package(given) as compiled:
        pipeline = specification(compiled, parameters, not given.no_cache)
    if said := bare(pipeline):
        print(f"pipeline: {said}", file=sys.stderr)
    order = Order(
        pipeline, parameters, name, given.experiment, given.service_account, given.pipeline_root
    )
    server = served(given)
    run_id = server.start(order, server.namespace(given.namespace), schedule)
    print(
        f"{'when' if schedule else 'run '} {name}\nid   {run_id}\n"
        f"link {server.link(run_id, RECURRING if schedule else 'runs')}",
        flush=True,
    )
    return follow(server, run_id, given.every) if given.wait else 0


@contextmanager
def package(given: argparse.Namespace) -> Iterator[Path]:
    """The compiled pipeline."""
    if given.package:
        yield given.package
        return
    from pipeline.pipeline import compile_pipeline, kinds

    text, wanted = jobs(given.job), given.job_kind or "pytorchjob"
    if text and wanted not in kinds(
        text
    ):  # the step that trains would say so, after data and weights
        held = " and ".join(sorted(kinds(text)))
        raise ValueError(f"--job {given.job}: holds no {wanted} but {held}; see --job-kind")
    with TemporaryDirectory() as folder:
        yield compile_pipeline(Path(folder) / "pipeline.yaml", text)


def follow(server: Server, run_id: str, every: float) -> int:
    """Waits for a run's end and says what became of it: its exit code."""
    try:
        run = server.follow(run_id, every)
    except KeyboardInterrupt:
        print(
            f"\npipeline: the run goes on; python -m pipeline terminate {run_id} ends it",
            file=sys.stderr,
        )
        return 130
    failed = failures(run)
    for name, message in failed:
        print(
            f"pipeline: {name} failed: {message or 'the server does not say why, its log does'}",
            file=sys.stderr,
        )
    if run.state == "SUCCEEDED" and not failed:
        return 0
    print(
        f"pipeline: run {run_id} {'FAILED' if failed else run.state}: {server.link(run_id)}",
        file=sys.stderr,
    )
    return 1


def run_status(given: argparse.Namespace) -> int:
    """python -m pipeline status"""
    server = served(given)
    found = server.find(identity(given.run_id))
    if isinstance(found, V2beta1RecurringRun):
        print(
            f"schedule {found.display_name}\nid       {found.recurring_run_id}\nstate    {found.status}\n"
            f"when     {found.trigger.cron_schedule.cron}\nlink     {server.link(found.recurring_run_id, RECURRING)}"
        )
        return 0
    failed = dict(failures(found))
    over = (
        f", {found.finished_at:%Y-%m-%d %H:%M:%S}"
        if found.finished_at and found.state in ENDED
        else ""
    )
    hidden = "; steps have failed" if failed and found.state == "SUCCEEDED" else ""
    print(
        f"run   {found.display_name}\nid    {found.run_id}\nstate {found.state}{over}{hidden}\n"
        f"link  {server.link(found.run_id)}"
    )
    for _, name, state in steps(found):
        print(
            f"  {state or 'PENDING':<10} {name}" + (f": {failed[name]}" if failed.get(name) else "")
        )
    return 0


def run_terminate(given: argparse.Namespace) -> int:
    """python -m pipeline terminate"""
    server = served(given)
    found = server.find(identity(given.run_id))
    server.end(found)
    if isinstance(found, V2beta1RecurringRun):
        print(f"schedule {found.recurring_run_id}: deleted; runs that it started go on")
        return 0
    run_id = found.run_id
    print(
        f"run {run_id}: {found.state}" + ("" if found.state in ENDED else ", now ending"),
        flush=True,
    )
    namespace, again = (
        given.namespace or server.place(found),
        f"python -m pipeline terminate {run_id}",
    )
    try:
        for line in end_jobs(server, found, namespace, given.every):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(
            f"\npipeline: the run is ending; training jobs that it may have made since: {again}",
            file=sys.stderr,
        )
        return 130
    except StillEnding as error:
        raise RuntimeError(f"{error}; training jobs that it may make yet: {again}") from None
    except ValueError as error:
        raise ValueError(f"the run's training jobs may still be there: {error}") from None
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"the run's training jobs may still be there ({error}): kubectl delete -n {namespace} "
            f"pytorchjobs,trainjobs -l vitdet/run={run_id}"
        ) from None
    return 0


def end_jobs(server: Server, found: V2beta1Run, namespace: str, every: float) -> Iterator[str]:
    """Deletes a run's jobs, and once more when it has ended, as a step that was at work may have made one since.

    Gives lines for the reader. Raises StillEnding when the run is not seen to end.
    """
    from components.pytorchjob import delete_jobs, whereabouts

    own = made_as(found)
    yield f"deleting its training jobs in {whereabouts(namespace)}"
    deleted, left = delete_jobs(found.run_id, namespace, own)
    yield from (f"deleted {name}" for name in deleted)
    doubt = ""
    if found.state not in ENDED:
        yield f"looking again when the run has ended, for about {STOPPING:.0f} s"
        try:
            doubt = "" if server.over(found.run_id, every, STOPPING) else "the run is still ending"
        except Refusal as refusal:  # the cluster may answer all the same
            doubt = f"whether the run has ended is not known ({refusal})"
        late, left = delete_jobs(found.run_id, namespace, own)
        yield from (f"deleted {name}, made since" for name in late)
        deleted += late
    yield from left
    if doubt:
        raise StillEnding(doubt)
    if not deleted:
        yield "found none to delete"


class StillEnding(Exception):
    """A run whose steps may still make jobs."""


def made_as(run: V2beta1Run) -> str:
    """The kind of a run's jobs: its parameter, else the pipeline's default."""
    return ((run.runtime_config and run.runtime_config.parameters) or {}).get(
        "job_kind"
    ) or "pytorchjob"


def served(given: argparse.Namespace) -> Server:
    """The server that the command line names."""
    if given.spoken is not None:
        raise ValueError(f"everybody on this machine can read a command line; give {LOGIN}")
    host = address(given.host)
    token, cookie = secrets(host, given.token_file, given.cookie_file)
    nearby = inside(host) or urlsplit(host).hostname in ("localhost", "127.0.0.1", "::1")
    if host.startswith("http:") and not nearby and (token or cookie):
        print(
            f"pipeline: {host}: without https everybody on the way can read the login",
            file=sys.stderr,
        )
    client = connect(
        host,
        token,
        cookie,
        ca_file=given.ca_file,
        timeout=given.timeout,
        retries=max(given.retries, 0),
        says=lambda line: print(f"pipeline: {line}", file=sys.stderr, flush=True),
    )
    return Server(client, given.ui_host, says=lambda line: print(line, flush=True))


def identity(run: str) -> str:
    """The id at the end of a link."""
    return run.rstrip("/").split("?")[0].rsplit("/", 1)[-1]
