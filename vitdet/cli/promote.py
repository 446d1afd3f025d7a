"""`vitdet promote` and `vitdet rollback`: change the champion of a registered model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitdet.cli.arguments import add_file, given_path


def add_promote(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet promote`."""
    settings = "tracking, gate, data and evaluate settings"
    _add_model(verb, f"YAML file whose {settings} replace the version's settings")
    help = "version to promote (default: the version with the alias `candidate`)"
    verb.add_argument("--version", type=_number, metavar="N", help=help)
    help = "skip the gate; REASON is stored as a tag of the model version"
    verb.add_argument("--force", metavar="REASON", type=_reason, help=help)
    verb.set_defaults(run=run_promote)


def add_rollback(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet rollback`."""
    _add_model(verb, "YAML file with the setting tracking.uri")
    help = "reason for the rollback, stored as a tag of the model version"
    verb.add_argument("--reason", default="", help=help)
    verb.set_defaults(run=run_rollback)


def run_promote(args: argparse.Namespace) -> int:
    """Run `vitdet promote`."""
    config, store = _read_model(args)
    from vitdet.tracking.promotion import promote_version

    version, reason = promote_version(
        args.name, args.version, config=config, force=args.force, **store
    )
    print(f"{args.name}, version {version} (champion): {reason}")
    return 0


def run_rollback(args: argparse.Namespace) -> int:
    """Run `vitdet rollback`."""
    _, store = _read_model(args)
    from vitdet.tracking.promotion import roll_back

    before, now = roll_back(args.name, reason=args.reason, **store)
    print(f"{args.name}, version {now} (champion): replaces version {before}")
    return 0


def _add_model(verb: argparse.ArgumentParser, config: str) -> None:
    verb.add_argument("name", help="name of the registered model (setting tracking.model_name)")
    help = "folder of mlflow.db, unless MLFLOW_TRACKING_URI or --config sets a URI (default: runs)"
    verb.add_argument("--runs", metavar="DIR", type=given_path, default=Path("runs"), help=help)
    add_file(verb, "--config", config)


def _read_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the config (None without --config) and the location of the MLflow store."""
    from vitdet.config import TrackingConfig
    from vitdet.config.ranges import ModelName, check
    from vitdet.data.layout import resolve_config
    from vitdet.tracking.runs import require_mlflow

    require_mlflow()
    check("NAME", ModelName, args.name)
    config = resolve_config(args.config)[0] if args.config else None
    uri = config.tracking.uri if config else TrackingConfig.uri
    return config, {"uri": uri, "folder": args.runs}


def _number(text: str) -> str:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a version number, got {text!r}")
    return str(int(text))


def _reason(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a reason, got an empty string")
    return text.strip()
