"""Registration of a checkpoint: what its metrics were measured on, the gate, the registry."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, from_dict
from vitdet.data.fingerprint import change, fingerprint, fingerprints
from vitdet.data.protocol import Protocol
from vitdet.files import sha256
from vitdet.tracking import champion
from vitdet.tracking.champion import Evaluate
from vitdet.tracking.measured import Measured, agree
from vitdet.tracking.registry import register
from vitdet.tracking.wheel import build_wheel


class Registered(NamedTuple):
    """A version of the registered model; `reason`: why it is the champion, '' where the gate was not asked."""

    name: str
    version: str
    reason: str


def register_checkpoint(
    checkpoint: Path,
    *,
    folder: Path,
    alias: str,
    evaluation: Callable[[Config, dict, Protocol], Evaluate],
    config: Config | None = None,
    metrics: dict[str, float] | None = None,
    protocol: Protocol | None = None,
    measured: Measured | None = None,
) -> Registered:
    """Add a checkpoint to the model registry under an alias, which `champion` is only if it passes the gate.

    folder: of the default MLflow store. config: names server and model; and the data and settings that `metrics` were
    measured with. Without it, and without metrics, those in the checkpoint. protocol: what the metrics were measured on,
    if known; measured: the same, as `vitdet evaluate` wrote it beside them. The data is read only for the gate.
    evaluation: (config, content of the checkpoint, protocol) -> evaluates a champion. Raises ValueError for a
    candidate that the gate refuses, and what `vitdet.tracking.registry.register` raises.
    """
    stored = load_model_file(checkpoint)
    own = from_dict(stored["config"])
    is_gated = alias == champion.ALIAS
    used = own if metrics is None else config or own
    if protocol is None and metrics is None:
        protocol = Protocol.of(own, _own_fingerprint(stored, own, is_gated))
    elif protocol is None:
        used, protocol = _measured_on(checkpoint, stored, own, config, measured, is_gated)
    metrics = stored["metrics"] if metrics is None else metrics
    tracking, side = (config or own).tracking, own.data.image_size
    place: dict[str, Any] = {
        "uri": tracking.uri,
        "folder": folder,
        "model_name": tracking.model_name,
    }
    if is_gated:
        if not protocol.fingerprint:
            raise ValueError(
                f"{checkpoint}: on which data its metrics were measured is not known; run `vitdet "
                "evaluate CHECKPOINT --output FILE` and register it with --metrics FILE, or name by "
                "--config what they were measured with"
            )
        evaluate = evaluation(used, stored, protocol)
        verdict = champion.judge(
            metrics.get("box_ap"),
            protocol,
            **place,
            evaluate=evaluate,
            checkpoint_sha256=sha256(checkpoint),
        )
        if not verdict.passed:
            raise ValueError(f"{checkpoint}: not the champion: {verdict.reason}")
    prints = stored.get("fingerprints") or {}
    figures = {key: metrics[key] for key in ("box_ap", "mask_ap") if metrics.get(key) is not None}
    with tempfile.TemporaryDirectory() as work:
        name, version = register(
            checkpoint,
            run_id=stored["run_id"],
            alias=None if is_gated else alias,
            metrics=figures,
            example=np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8),
            wheel=build_wheel(Path(work)),
            tags=protocol.tags()
            | {f"{key}_fingerprint": prints[key] for key in prints if key == "train"},
            **place,
        )
    champion.update_tags(version, figures, protocol, **place)  # of one that was there before
    reason = ""
    if is_gated:
        verdict = champion.promote(version, metrics.get("box_ap"), protocol, **place)
        reason = verdict.reason
        if not verdict.passed:
            raise ValueError(
                f"{checkpoint}: registered as version {version}, not the champion: {reason}"
            )
    return Registered(name, version, reason)


def _measured_on(
    checkpoint: Path,
    stored: dict,
    own: Config,
    config: Config | None,
    measured: Measured | None,
    is_gated: bool,
) -> tuple[Config, Protocol]:
    """The config and the protocol that metrics beside the checkpoint were measured with.

    Its fingerprint is '' where that is not known. Raises ValueError if the gate would have to
    trust metrics of another checkpoint or of another config than the one given.
    """
    unknown = config or own, Protocol.of(config or own, "")
    if measured is None:
        if config is None or not is_gated:
            return unknown
        known = _own_fingerprint(stored, own, is_gated)
        return config, Protocol.of(config, _fingerprint_now(config, own, known))
    used, problem = measured.config(own), ""
    if measured.checkpoint_sha256 != sha256(checkpoint):
        problem = "are of another checkpoint"
    elif config is not None and not agree(config, used):
        problem = "were measured with other data or evaluate settings than those of --config"
    if problem and is_gated:
        raise ValueError(
            f"{checkpoint}: the --metrics {problem}; run `vitdet evaluate` again and register it "
            "with what that wrote"
        )
    if problem:
        return unknown
    return config or used, Protocol.of(used, measured.val_fingerprint)


def _own_fingerprint(stored: dict, own: Config, may_read: bool) -> str:
    """That of the validation split that a checkpoint's own metrics were measured on; '' where it is not known.

    may_read: whether the data may be looked at, which files of version 0.1 need.
    """
    known = stored.get("fingerprints")
    if known or not stored.get("dataset_digest") or not may_read:
        return (known or {}).get("val", "")
    try:  # a file of version 0.1 holds the digest of both splits: compare it with the data that is there
        prints = fingerprints(own.data)
        return "" if change(stored, own.data, prints) else prints["val"]
    except (OSError, ValueError):
        return ""


def _fingerprint_now(measured: Config, own: Config, known: str) -> str:
    """That of the validation split that is there now; without it `known`, if that is of the same split."""
    data = measured.data
    try:
        return fingerprint(data, data.val_split)
    except FileNotFoundError:
        keys = ("dataset", "root", "val_split", "max_images")
        same = all(getattr(data, key) == getattr(own.data, key) for key in keys)
        return known if same else ""
