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
from vitdet.tracking import champion
from vitdet.tracking.champion import Evaluate, Protocol
from vitdet.tracking.registry import register, sha256
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
) -> Registered:
    """Add a checkpoint to the model registry under an alias, which `champion` is only if it passes the gate.

    folder: of the default MLflow store. config: names server and model; and the data and settings that `metrics` were
    measured with. Without it, and without metrics, those in the checkpoint. protocol: what the metrics were measured on,
    if known. evaluation: (config, content of the checkpoint, protocol) -> evaluates a champion. Raises ValueError for a
    candidate that the gate refuses, and what `vitdet.tracking.registry.register` raises.
    """
    stored = load_model_file(checkpoint)
    own = from_dict(stored["config"])
    measured = own if metrics is None else config or own
    if protocol is None:
        known = _own_fingerprint(stored, own)
        protocol = Protocol.of(
            measured, known if metrics is None else _fingerprint_now(measured, own, known)
        )
    metrics = stored["metrics"] if metrics is None else metrics
    tracking, side = (config or own).tracking, own.data.image_size
    place: dict[str, Any] = {
        "uri": tracking.uri,
        "folder": folder,
        "model_name": tracking.model_name,
    }
    is_gated = alias == champion.ALIAS
    if is_gated:
        if not protocol.fingerprint:
            raise ValueError(
                f"{checkpoint}: on which data its metrics were measured is not known; run `vitdet evaluate` "
                "and register it with its --metrics"
            )
        evaluate = evaluation(measured, stored, protocol)
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
    with tempfile.TemporaryDirectory() as work:
        name, version = register(
            checkpoint,
            run_id=stored["run_id"],
            alias="candidate" if is_gated else alias,
            metrics={
                key: metrics[key] for key in ("box_ap", "mask_ap") if metrics.get(key) is not None
            },
            example=np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8),
            wheel=build_wheel(Path(work)),
            tags=protocol.tags()
            | {f"{key}_fingerprint": prints[key] for key in prints if key == "train"},
            **place,
        )
    reason = ""
    if is_gated:
        verdict = champion.promote(version, metrics.get("box_ap"), protocol, **place)
        reason = verdict.reason
        if not verdict.passed:
            raise ValueError(
                f"{checkpoint}: registered as version {version}, not the champion: {reason}"
            )
    return Registered(name, version, reason)


def _own_fingerprint(stored: dict, own: Config) -> str:
    """That of the validation split that a checkpoint's own metrics were measured on; '' where it is not known."""
    known = stored.get("fingerprints")
    if known or not stored.get("dataset_digest"):
        return (known or {}).get("val", "")
    try:  # a file of version 0.1 holds the digest of both splits: compare it with the data that is there
        prints = fingerprints(own.data)
        return "" if change(stored, own.data, prints) else prints["val"]
    except (FileNotFoundError, ValueError):
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
