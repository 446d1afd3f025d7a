"""Arguments that several commands share: overrides, the server, the file of training jobs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.client import Server
from pipeline.connection import LOGIN, connect, credentials, in_cluster_address, server_address


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add --set."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a setting, as `vitdet train --set`; may be repeated",
    )


def add_server(command: argparse.ArgumentParser) -> None:
    """Add the arguments that name the server and the login."""
    group = command.add_argument_group("the server")
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
        "--token", "--cookie", "--existing-token", dest="inline_secret", help=argparse.SUPPRESS
    )


def connect_server(args: argparse.Namespace) -> Server:
    """The server that the arguments of `add_server` name."""
    if args.inline_secret is not None:
        raise ValueError(f"everybody on this machine can read a command line; give {LOGIN}")
    host = server_address(args.host)
    token, cookie = credentials(host, args.token_file, args.cookie_file)
    nearby = in_cluster_address(host) or urlsplit(host).hostname in (
        "localhost",
        "127.0.0.1",
        "::1",
    )
    if host.startswith("http:") and not nearby and (token or cookie):
        print(
            f"pipeline: {host}: without https everybody on the way can read the login",
            file=sys.stderr,
        )
    client = connect(
        host,
        token,
        cookie,
        ca_file=args.ca_file,
        timeout=args.timeout,
        retries=max(args.retries, 0),
        report=lambda line: print(f"pipeline: {line}", file=sys.stderr, flush=True),
    )
    return Server(client, args.ui_host, report=lambda line: print(line, flush=True))


def seconds(text: str) -> float:
    """Argument type: a time above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return number


def run_id_of(run: str) -> str:
    """The id of a run or schedule, also from its link."""
    return run.rstrip("/").split("?")[0].rsplit("/", 1)[-1]


def read_job_file(file: str) -> str:
    """The text of a --job file, "-" is standard input. Raises ValueError when it is empty."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text() if file else ""
    if file and not text.strip():
        raise ValueError(f"--job {file}: empty")
    return text
