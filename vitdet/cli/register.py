"""`vitdet register`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitdet.config import load_config
from vitdet.files import write_json


def add_register(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `register`."""
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument(
        "--alias", default="candidate", help="name that then points to this version (candidate)"
    )
    verb.add_argument("--config", type=Path, help="take the tracking settings from this file")
    verb.add_argument(
        "--metrics", type=Path, help="JSON file of `vitdet evaluate`, for the version's tags"
    )
    verb.add_argument("--output", type=Path, help="write name and version to this JSON file")
    verb.set_defaults(run=run_register)


def run_register(given: argparse.Namespace) -> int:
    """vitdet register"""
    from vitdet.stages import register_checkpoint, tracking_folder

    settings = load_config(given.config).tracking if given.config else None
    metrics = json.loads(given.metrics.read_text()) if given.metrics else None
    name, version = register_checkpoint(
        given.checkpoint, settings, metrics, tracking_folder(given.checkpoint.parent), given.alias
    )
    print(f"{name}, version {version} ({given.alias})")
    if given.output:
        write_json(given.output, {"name": name, "version": version, "alias": given.alias})
    return 0
