"""`--set SECTION.KEY=VALUE`, which every verb with a config takes."""

from __future__ import annotations

import argparse


def add_set(verb: argparse.ArgumentParser) -> None:
    """The one way to change a setting."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a setting, as in optim.lr=2e-4; may be repeated",
    )
