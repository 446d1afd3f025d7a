"""Arguments shared by several commands: the experiment, the server, the jobs file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.client import Server
from pipeline.connection import LOGIN, connect, credentials, in_cluster_address, server_address
from pipeline.versions import Version, read_version


def add_command(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    """Add a command; its description is the help text."""
    text = f"{help[0].upper()}{help[1:]}."
    return commands.add_parser(name, allow_abbrev=False, help=help, description=text)


def add_text(group: argparse._ActionsContainer, name: str, metavar: str, help: str) -> None:
    """Add an option with a text value, empty by default."""
    group.add_argument(name, default="", metavar=metavar, help=help)


def add_experiment(command: argparse.ArgumentParser) -> None:
    """Add --set, --sweep, --seeds and --fetch."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting, as in `vitdet train`; may be repeated",
    )
    command.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE,VALUE,...",
        help="train with each of these values; repeat the option to train with every combination",
    )
    command.add_argument(
        "--seeds",
        type=positive,
        default=1,
        metavar="N",
        help="train each recipe and combination with N seeds; the table shows mean and standard "
        "deviation (default: 1)",
    )
    add_text(
        command,
        "--fetch",
        "DATA",
        "download or convert the data first: coco, lvis or 'convert SOURCE', with the "
        "options of `vitdet data`",
    )


def add_parallel(command: argparse._ActionsContainer, default: str) -> None:
    """Add --parallel."""
    command.add_argument(
        "--parallel",
        type=positive,
        metavar="N",
        help=f"maximum number of concurrent training runs ({default})",
    )


def positive(text: str) -> int:
    """Parse an integer of at least 1 (an argparse type)."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


def add_version(command: argparse._ActionsContainer, default: str) -> None:
    """Add --kfp."""
    command.add_argument(
        "--kfp",
        type=version,
        metavar="VERSION",
        help=(
            "version of Kubeflow Pipelines; unsupported fields are left out of the pipeline, with "
            f"a message ({default})"
        ),
    )


def version(given: str) -> Version:
    """Parse a supported version of Kubeflow Pipelines (an argparse type)."""
    try:
        return read_version(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_server(command: argparse.ArgumentParser) -> None:
    """Add the arguments for the server and its credentials."""
    group = command.add_argument_group("the server")
    add_text(
        group,
        "--host",
        "URL",
        "URL of Kubeflow Pipelines, e.g. https://kubeflow.example.com/pipeline (default: "
        "KF_PIPELINES_ENDPOINT, or, in a pod, the cluster's service)",
    )
    add_text(group, "--ui-host", "URL", "URL of the web interface, if it differs from --host")
    add_text(group, "--namespace", "NAME", "your profile's namespace, for multi-user servers")
    add_text(
        group,
        "--token-file",
        "FILE",
        "file with a bearer token, - for standard input (default: KFP_TOKEN, or the pod's token)",
    )
    add_text(
        group,
        "--cookie-file",
        "FILE",
        "file with the browser's login cookie NAME=VALUE (default: KFP_COOKIE)",
    )
    add_text(group, "--ca-file", "FILE", "certificate of a private certificate authority")
    group.add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="timeout of a request in seconds (default: 30)",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=3,
        metavar="N",
        help="maximum number of retries of a failed request (default: 3)",
    )
    group.add_argument("--every", type=seconds, default=10.0, help=argparse.SUPPRESS)
    group.add_argument(
        "--token", "--cookie", "--existing-token", dest="inline_secret", help=argparse.SUPPRESS
    )


def connect_server(args: argparse.Namespace) -> Server:
    """Connect to the server given by the arguments of `add_server`."""
    if args.inline_secret is not None:
        raise ValueError(
            "credentials on the command line are visible to other users of this machine; use "
            f"{LOGIN}"
        )
    host = server_address(args.host)
    token, cookie = credentials(host, args.token_file, args.cookie_file)
    loopback = urlsplit(host).hostname in ("localhost", "127.0.0.1", "::1")
    nearby = loopback or in_cluster_address(host)
    if host.startswith("http:") and not nearby and (token or cookie):
        remark(f"{host}: without https the credentials are sent unencrypted")
    client = connect(
        host,
        token,
        cookie,
        ca_file=args.ca_file,
        timeout=args.timeout,
        retries=max(args.retries, 0),
        report=remark,
    )
    return Server(client, args.ui_host, report=lambda line: print(line, flush=True))


def seconds(text: str) -> float:
    """Parse a finite number of seconds above 0 (an argparse type)."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text}")
    return number


def run_id_of(run: str) -> str:
    """Return the ID of a run or schedule, given its ID or link."""
    # in a link from Kubeflow's dashboard, a query precedes the fragment: ?ns=NAME#/runs/details/ID
    return run.rpartition("#")[2].partition("?")[0].rstrip("/").rpartition("/")[2]


def remark(line: str) -> None:
    """Print a line for the user to stderr."""
    print(f"pipeline: {line}", file=sys.stderr, flush=True)


def read_job_file(file: str) -> str:
    """Return a --job file's text ("-": stdin, "": no file). Raises ValueError if it is empty."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text() if file else ""
    if file and not text.strip():
        raise ValueError(f"--job {file}: the input is empty; expected YAML with a training job")
    return text
