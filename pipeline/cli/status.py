"""python -m pipeline status: print the state of a run or schedule."""

from __future__ import annotations

import argparse

from kfp_server_api import V2beta1RecurringRun

from pipeline.cli.arguments import add_command, add_server, connect_server, run_id_of
from pipeline.cli.report import print_run
from pipeline.client import RECURRING


def add_status(commands: argparse._SubParsersAction) -> None:
    """Add the command and its arguments."""
    command = add_command(commands, "status", "show the state of a run or schedule")
    command.add_argument("run_id", metavar="RUN", help="ID or link of a run or schedule")
    add_server(command)
    command.set_defaults(run=run_status)


def run_status(args: argparse.Namespace) -> int:
    """Print the state of a schedule, or of a run with its steps and training jobs."""
    server = connect_server(args)
    found = server.find(run_id_of(args.run_id))
    if isinstance(found, V2beta1RecurringRun):
        link = server.link(found.recurring_run_id, RECURRING)
        cron, periodic = found.trigger.cron_schedule, found.trigger.periodic_schedule
        when = cron.cron if cron else f"every {periodic.interval_second} s"
        print(
            f"schedule {found.display_name}\nid       {found.recurring_run_id}\n"
            f"state    {found.status}\nwhen     {when}\n"
            f"link     {link}"
        )
        return 0
    print_run(server, found, args.namespace)
    return 0
