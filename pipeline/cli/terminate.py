"""python -m pipeline terminate: end a run and delete its training jobs, or delete a schedule."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from kfp_server_api import V2beta1RecurringRun, V2beta1Run

from pipeline.cli.arguments import add_command, add_server, connect_server, remark, run_id_of
from pipeline.cli.report import job_kind, print_run
from pipeline.client import ENDED, Server
from pipeline.connection import ServerError

# Seconds to wait for a run to end. The grace period of its pods is 30 s; the exit handler follows.
END_TIMEOUT = 300.0


class StillEnding(Exception):
    """Raised if a run may not have ended, so its steps may still create jobs."""


def add_terminate(commands: argparse._SubParsersAction) -> None:
    """Add the command and its arguments."""
    command = add_command(
        commands, "terminate", "end a run and delete its training jobs, or delete a schedule"
    )
    command.add_argument("run_id", metavar="RUN", help="ID or link of a run or schedule")
    add_server(command)
    command.set_defaults(run=run_terminate)


def run_terminate(args: argparse.Namespace) -> int:
    """End a run and delete its training jobs, or delete a schedule."""
    server = connect_server(args)
    found = server.find(run_id_of(args.run_id))
    server.terminate(found)
    if isinstance(found, V2beta1RecurringRun):
        print(f"schedule {found.recurring_run_id}: deleted; runs that it started continue")
        return 0
    run_id = found.run_id
    namespace = args.namespace or server.pod_namespace(found)
    print_run(server, found, namespace, "" if found.state in ENDED else ", now ending")
    sys.stdout.flush()
    again = f"`python -m pipeline terminate {run_id}`"
    try:
        for line in delete_run_jobs(server, found, namespace, args.every):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        remark(f"interrupted; to delete training jobs that still exist, run {again}")
        return 130
    except StillEnding as error:
        raise RuntimeError(f"{error}; to delete training jobs created later, run {again}") from None
    except ValueError as error:
        raise ValueError(f"the run's training jobs may still exist: {error}") from None
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"the run's training jobs may still exist ({error}); `kubectl delete -n {namespace} "
            f"{job_kind(found).lower()} -l vitdet/run={run_id}` deletes them"
        ) from None
    return 0


def delete_run_jobs(
    server: Server, found: V2beta1Run, namespace: str, every: float
) -> Iterator[str]:
    """Delete a run's jobs now and after the run's end: until then, a step may create jobs.

    Yields progress messages. Raises StillEnding if the run may not have ended.
    """
    from components.launcher.client import describe_namespace
    from components.launcher.launch import delete_jobs

    own = job_kind(found)
    yield f"deleting the run's training jobs in {describe_namespace(namespace)}"
    deleted, left = delete_jobs(found.run_id, namespace, own)
    yield from (f"deleted {name}" for name in deleted)
    doubt = ""
    if found.state not in ENDED:
        yield f"waiting up to about {END_TIMEOUT:.0f} s for the run to end, then checking again"
        try:
            ended = server.wait_until_ended(found.run_id, every, END_TIMEOUT)
            doubt = "" if ended else "the run is still ending"
        except ServerError as error:  # the Kubernetes API may still respond
            doubt = f"it is unknown whether the run has ended ({error})"
        late, left = delete_jobs(found.run_id, namespace, own)
        yield from (f"deleted {name}, created in the meantime" for name in late)
        deleted += late
    yield from left
    if doubt:
        raise StillEnding(doubt)
    if not deleted:
        yield "found no training jobs to delete"
