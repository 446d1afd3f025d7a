"""The evaluations of a model version: metrics in its tags, per-image matches among its artifacts.

Each is of a protocol, the validation data and the settings, by whose digest it is stored.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitdet.data.protocol import Protocol
from vitdet.evaluation.bootstrap import WeightedAP
from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.matches import MATCHES, load_matches
from vitdet.tracking.gate import Evaluation

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)
METRICS = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")


def tags_of(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Return the metrics that are stored as tags of a version."""
    return {key: f"{value:.4g}" for key in METRICS if (value := metrics.get(key)) is not None}


def matches_folder(protocol: Protocol) -> str:
    """Return the folder, among the artifacts of a version, of the matches under this protocol."""
    return f"evaluation/{protocol.digest}"


def model_id_of(version: ModelVersion) -> str | None:
    """Return the id of the logged model that a version was created from, None without one.

    Databases do not store `model_id`, but the source, models:/ID.
    """
    scheme, _, model = (version.source or "").rpartition("/")
    return model if scheme == "models:" else None


def known_metrics(version: ModelVersion, protocol: Protocol) -> dict[str, float]:
    """Return the metrics of a version that are known under this protocol."""
    tags, own = version.tags, protocol.tags()
    if not own:
        return {}
    is_own = own == {key: tags.get(key) for key in own}
    # under the protocol's tag when it was promoted or evaluated again, which precedes the registration
    found = {key: tags.get(protocol.tag(key), tags.get(key) if is_own else None) for key in METRICS}
    return {key: float(value) for key, value in found.items() if value is not None}


def read_evaluation(
    client: MlflowClient, uri: str, version: ModelVersion, protocol: Protocol, matches: bool
) -> Evaluation:
    """Return what the registry has of the evaluation of a version under this protocol.

    matches: whether the per-image matches are read, if they are stored.
    """
    metrics = known_metrics(version, protocol)
    folder = matches_folder(protocol)
    model = model_id_of(version) if matches and metrics else None
    stored = client.list_logged_model_artifacts(model, folder) if model else []
    if not any(one.path == f"{folder}/{MATCHES}" for one in stored):
        return Evaluation(metrics)
    from vitdet.tracking.packaged_model import download

    with tempfile.TemporaryDirectory(prefix="vitdet-matches-") as work:
        path = download(
            uri, f"models:/{version.name}/{version.version}/{folder}/{MATCHES}", Path(work)
        )
        return Evaluation(metrics, load_matches(path))


def save_evaluation(
    client: MlflowClient,
    version: ModelVersion,
    protocol: Protocol,
    metrics: Mapping[str, float | None],
    plots: Path,
) -> None:
    """Store the evaluation of a version under this protocol; the matches first, if `plots` has them."""
    if (model := model_id_of(version)) and (plots / MATCHES).is_file():
        client.log_model_artifact(model, str(plots / MATCHES), matches_folder(protocol))
    for key, value in tags_of(metrics).items():
        client.set_model_version_tag(version.name, version.version, protocol.tag(key), value)


def add_matches(
    client: MlflowClient,
    version: ModelVersion,
    protocol: Protocol,
    metrics: Mapping[str, float | None],
    plots: Path,
) -> None:
    """Store the matches of the evaluation of which a version has the metrics only; log why, if not."""
    model, folder, reason = model_id_of(version), matches_folder(protocol), ""
    known = tags_of(known_metrics(version, protocol))
    if not model:
        reason = "it has no logged model"
    elif not known or known != tags_of(metrics):
        reason = f"its metrics are of another evaluation: {known}, not {tags_of(metrics)}"
    elif any(
        one.path == f"{folder}/{MATCHES}"
        for one in client.list_logged_model_artifacts(model, folder)
    ):
        reason = "it has matches of this evaluation"
    else:
        client.log_model_artifact(model, str(plots / MATCHES), folder)
    if reason:
        log.warning(
            "%s, version %s: the matches in %s are not stored, as %s",
            version.name,
            version.version,
            plots,
            reason,
        )


def evaluation_of(metrics: Mapping[str, float | None], plots: Path | None) -> Evaluation:
    """Return the evaluation with these metrics, and the matches in the folder of `vitdet evaluate --plots`.

    Raises FileNotFoundError if there are none, and ValueError if they are of another evaluation.
    """
    if plots is None:
        return Evaluation(metrics)
    path = plots / MATCHES
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected the folder that `vitdet evaluate` wrote with --plots"
        )
    matches = load_matches(path)
    for kind, one in matches.items():
        key = f"{NAMES[kind]}_ap"
        mean = WeightedAP(one)(np.ones(len(one.image_ids), int))[0, 0]
        ap, expected = float(mean), metrics.get(key)
        if ap == ap and (expected is None or abs(ap - expected) > 1e-6):
            raise ValueError(
                f"{path}: of another evaluation than the metrics ({key} {ap:.6g}, not {expected}); "
                "run `vitdet evaluate` with --output and --plots and register both"
            )
    return Evaluation(metrics, matches)


def protocol_of(record: Mapping) -> Protocol:
    """Return the protocol in the record of an evaluation that a pipeline step wrote."""
    return Protocol(record["val_fingerprint"], record["evaluate_settings"])


def plots_of(record: Mapping) -> Path | None:
    """Return the folder of such an evaluation's files; None if they were removed since, as its step was cached."""
    path = Path(record.get("plots", "")) / MATCHES
    return path.parent if "plots" in record and path.is_file() else None


def recorded_evaluation(record: Mapping) -> Evaluation:
    """Return such an evaluation."""
    found = evaluation_of(record["metrics"], plots_of(record))
    removed = (
        "its files were removed since the pipeline's step `evaluate` was cached; submit the pipeline "
        "again with --no-cache"
    )
    return found if found.matches else replace(found, remedy=removed)
