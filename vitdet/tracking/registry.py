"""Registration of checkpoints in the model registry; the alias `champion` requires the gate."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, check_names, from_dict
from vitdet.data.fingerprint import change, fingerprint, fingerprints
from vitdet.data.protocol import Protocol
from vitdet.files import sha256
from vitdet.ranges import Alias, check
from vitdet.tracking import champion
from vitdet.tracking.champion import Evaluate
from vitdet.tracking.experiments import experiment_id
from vitdet.tracking.measured import Measured, agree
from vitdet.tracking.mlflow import connect, tracking_uri
from vitdet.tracking.packaged_model import exported, pack
from vitdet.tracking.requests import UnknownRunError, create
from vitdet.tracking.trial import try_model
from vitdet.tracking.wheel import build_wheel

log = logging.getLogger(__name__)


class Registered(NamedTuple):
    """A registered model version; `reason`: the gate's reason, "" if the gate was not applied."""

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
    """Add a checkpoint to the model registry under an alias; `champion` requires the gate.

    The data is read only for the gate.

    Args:
        checkpoint: The detector.
        folder: The folder of the default MLflow store.
        alias: The alias that then points to this version.
        evaluation: (config, content of the checkpoint, protocol) -> function that evaluates a
            champion.
        config: The server and model name, and the data and settings that `metrics` were measured
            with; default: the config in the checkpoint.
        metrics: Metrics of the checkpoint; default: those in the checkpoint.
        protocol: The protocol of the metrics, if known.
        measured: The provenance of the metrics that `vitdet evaluate` wrote.

    Raises:
        ValueError: The gate rejects the candidate; also what `register` raises.
    """
    check("the alias", Alias, alias)
    stored = load_model_file(checkpoint)
    own = from_dict(stored["config"])
    check_names((config or own).tracking)
    is_gated = alias == champion.ALIAS
    used = own if metrics is None else config or own
    if protocol is None and metrics is None:
        protocol = Protocol.of(own, _own_fingerprint(stored, own, is_gated))
    elif protocol is None:
        used, protocol = _measured_on(checkpoint, stored, own, config, measured, is_gated)
    metrics = stored.get("metrics") or {} if metrics is None else metrics
    tracking, side = (config or own).tracking, own.data.image_size
    place: dict[str, Any] = {
        "uri": tracking.uri,
        "folder": folder,
        "model_name": tracking.model_name,
    }
    if is_gated:
        if not protocol.fingerprint:
            raise ValueError(
                f"{checkpoint}: the data of its metrics is unknown; run `vitdet "
                "evaluate CHECKPOINT --output FILE` and register it with --metrics FILE, or pass the "
                "config of the evaluation with --config"
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
    champion.update_tags(version, figures, protocol, **place)  # if the version existed
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
    """Return the config and the protocol of metrics that are not from the checkpoint.

    The fingerprint is "" if unknown. Raises ValueError if the gate would have to trust metrics of
    another checkpoint or config.
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
            f"{checkpoint}: the --metrics {problem}; run `vitdet evaluate` again and pass the file "
            "that it writes"
        )
    if problem:
        return unknown
    return config or used, Protocol.of(used, measured.val_fingerprint)


def _own_fingerprint(stored: dict, own: Config, may_read: bool) -> str:
    """Return the fingerprint of the validation split of a checkpoint's own metrics; "" if unknown.

    may_read: whether the data may be read, which is necessary for files of version 0.1.
    """
    known = stored.get("fingerprints")
    if known or not stored.get("dataset_digest") or not may_read:
        return (known or {}).get("val", "")
    try:  # version 0.1 stored a digest of both splits: compare it with the current data
        prints = fingerprints(own.data)
        return "" if change(stored, own.data, prints) else prints["val"]
    except (OSError, ValueError):
        return ""


def _fingerprint_now(measured: Config, own: Config, known: str) -> str:
    """Return the validation split's current fingerprint; without data, `known` of the same split."""
    data = measured.data
    try:
        return fingerprint(data, data.val_split)
    except FileNotFoundError:
        keys = ("dataset", "root", "val_split", "max_images")
        same = all(getattr(data, key) == getattr(own.data, key) for key in keys)
        return known if same else ""


def register(
    checkpoint: Path,
    *,
    run_id: str | None,
    uri: str,
    folder: Path,
    model_name: str,
    alias: str | None,
    metrics: dict[str, float],
    example: np.ndarray,
    wheel: Path,
    tags: dict[str, str],
) -> tuple[str, str]:
    """Register a checkpoint, set the alias, if any, and return (name, version).

    A checkpoint of a run is registered once; a repeated registration only moves the alias and does
    not change the tags (see `vitdet.tracking.champion.update_tags`). example: an image (H, W, 3)
    uint8 for testing the packaged model before it is registered. metrics, tags and the run's git
    revision become tags of the version. If the server does not know the run, e.g. of a checkpoint that was copied from
    another machine, the version has no run, but its id in the tag `training_run`. Raises ConnectionError if the server
    does not respond.
    """
    try:
        client, run_id = connect(run_id, uri, folder)
    except UnknownRunError as error:
        log.warning("%s; the version is registered without a run", error)
        tags = {**tags, "training_run": str(run_id)}
        client, run_id = connect(None, uri, folder)
    uri = tracking_uri(uri, folder)
    digest = sha256(checkpoint)

    def registered() -> ModelVersion | None:
        for version in client.search_model_versions(f"name = '{model_name}'"):
            of_run = (version.run_id or None) == run_id
            if of_run and version.tags.get("checkpoint_sha256") == digest:
                return version
        return None

    if version := registered():
        if alias is not None:
            client.set_registered_model_alias(model_name, alias, version.version)
        return model_name, str(version.version)
    with tempfile.TemporaryDirectory(prefix="vitdet-model-") as work:
        packed = Path(work) / "model"
        model = Model(run_id=run_id)
        pack(packed, model, load_model_file(checkpoint), wheel, example)
        try_model(packed, wheel)
        place = (
            client.get_run(run_id).info.experiment_id
            if run_id
            else experiment_id(client, uri, folder, model_name, "tracking.model_name")
        )
        logged = client.create_logged_model(place, "detector", run_id, model_type="detection")
        model.model_id = model.model_uuid = logged.model_id
        model.artifact_path = logged.artifact_location
        model.save(str(packed / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(packed))
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    create(
        lambda: next(iter(client.search_registered_models(f"name = '{model_name}'")), None),
        lambda: client.create_registered_model(model_name),
    )
    if run_id and (revision := client.get_run(run_id).data.tags.get("git_revision")):
        tags = {"git_revision": revision, **tags}
    texts = {
        **tags,
        **{key: f"{value:.4g}" for key, value in metrics.items()},
        "checkpoint_sha256": digest,
    }
    with exported(uri):
        version = create(
            registered,
            lambda: client.create_model_version(
                model_name, f"models:/{logged.model_id}", run_id, texts, model_id=logged.model_id
            ),
        )
    if alias is not None:
        client.set_registered_model_alias(model_name, alias, version.version)
    return model_name, str(version.version)
