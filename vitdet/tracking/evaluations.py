"""Storage of a model version's evaluations in the registry.

A version may have been evaluated several times, on different validation data or with different
settings (`vitdet.data.protocol.Protocol`). DIGEST, the digest of the protocol, identifies an
evaluation: the version's tags METRIC_DIGEST contain its metrics, and the artifact
evaluation/DIGEST/matches.npz contains its per-image matches. The tags METRIC, `val_fingerprint`
and `evaluate_settings` contain the evaluation with which the version was registered or updated.
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
from vitdet.tracking.client import Client
from vitdet.tracking.gate import Evaluation

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)
METRICS = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")


def tags_of(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Return the tags {METRIC: value}, with values rounded to four significant digits."""
    return {key: f"{value:.4g}" for key in METRICS if (value := metrics.get(key)) is not None}


def matches_folder(protocol: Protocol) -> str:
    """Return the artifact folder for the matches of an evaluation under this protocol."""
    return f"evaluation/{protocol.digest}"


def model_id_of(version: ModelVersion) -> str | None:
    """Return the ID of the logged model that a version was created from; None if there is none.

    Database stores do not save the field `model_id`, only the source, models:/ID.
    """
    scheme, _, model = (version.source or "").rpartition("/")
    return model if scheme == "models:" else None


def known_metrics(version: ModelVersion, protocol: Protocol) -> dict[str, float]:
    """Return a version's metrics under this protocol; {} if none are stored."""
    tags, expected = version.tags, protocol.tags()
    if not expected:
        return {}
    registered = tags if expected.items() <= tags.items() else {}  # tags without a digest
    # tags with the digest take precedence over tags without a digest
    found = {key: tags.get(protocol.tag(key), registered.get(key)) for key in METRICS}
    return {key: float(value) for key, value in found.items() if value is not None}


def read_evaluation(
    client: Client, version: ModelVersion, protocol: Protocol, matches: bool
) -> Evaluation:
    """Return a version's evaluation under this protocol, without metrics if none is stored.

    matches: whether to download the per-image matches, if they are stored.
    """
    metrics = known_metrics(version, protocol)
    if not (matches and metrics and _has_matches(client, version, protocol)):
        return Evaluation(metrics)
    from vitdet.tracking.packaged_model import download

    artifact = f"models:/{version.name}/{version.version}/{matches_folder(protocol)}/{MATCHES}"
    with tempfile.TemporaryDirectory(prefix="vitdet-matches-") as work:
        return Evaluation(metrics, load_matches(download(client.uri, artifact, Path(work))))


def save_evaluation(
    client: Client,
    version: ModelVersion,
    protocol: Protocol,
    metrics: Mapping[str, float | None],
    plots: Path,
) -> None:
    """Store an evaluation of a version. plots: the folder with the matches, if there are any."""
    # matches first: after an interruption, metrics without matches would look complete
    if (model := model_id_of(version)) and (plots / MATCHES).is_file():
        client.log_model_artifact(model, str(plots / MATCHES), matches_folder(protocol))
    for key, value in tags_of(metrics).items():
        client.set_model_version_tag(version.name, version.version, protocol.tag(key), value)


def add_matches(
    client: Client,
    version: ModelVersion,
    protocol: Protocol,
    metrics: Mapping[str, float | None],
    plots: Path,
) -> None:
    """Store the matches of an evaluation whose metrics are already stored with a version.

    metrics: the metrics of the evaluation that wrote `plots`. Logs a warning and stores nothing if
    the version has no equal metrics under this protocol, has matches, or has no logged model.
    """
    model, reason = model_id_of(version), ""
    known = tags_of(known_metrics(version, protocol))
    if not model:
        reason = "the version has no logged model"
    elif not known or known != tags_of(metrics):
        shown = f"({tags_of(metrics)}; stored for the same data and settings: {known or 'none'})"
        reason = f"the version's metrics are not known to be from the same evaluation {shown}"
    elif _has_matches(client, version, protocol):
        reason = "the version already has matches of this evaluation"
    else:
        client.log_model_artifact(model, str(plots / MATCHES), matches_folder(protocol))
    if reason:
        shown = f"{version.name}, version {version.version}"
        log.warning("%s: the matches in %s are not stored, as %s", shown, plots, reason)


def _has_matches(client: Client, version: ModelVersion, protocol: Protocol) -> bool:
    model, folder = model_id_of(version), matches_folder(protocol)
    stored = client.list_logged_model_artifacts(model, folder) if model else []
    return any(artifact.path == f"{folder}/{MATCHES}" for artifact in stored)


def evaluation_of(metrics: Mapping[str, float | None], plots: Path | None) -> Evaluation:
    """Return an evaluation with these metrics and the matches in a folder.

    plots: the folder of `vitdet evaluate --plots`; None: no matches. Raises FileNotFoundError if
    the folder contains no matches, and ValueError if the AP of the matches differs from `metrics`.
    """
    if plots is None:
        return Evaluation(metrics)
    path = plots / MATCHES
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected the folder that `vitdet evaluate` wrote with --plots"
        )
    matches = load_matches(path)
    for kind, found in matches.items():
        key = f"{NAMES[kind]}_ap"
        ap = float(WeightedAP(found)(np.ones(len(found.image_ids), int))[0, 0])
        expected = metrics.get(key)
        if ap == ap and (expected is None or abs(ap - expected) > 1e-6):
            known = "none" if expected is None else f"{expected:.6g}"
            raise ValueError(
                f"{path}: matches and metrics are from different evaluations ({key}: {ap:.6g} and "
                f"{known}); run `vitdet evaluate` with --output and --plots and register "
                "both results"
            )
    return Evaluation(metrics, matches)


def protocol_of(record: Mapping) -> Protocol:
    """Return the protocol in a record of the pipeline step `evaluate`."""
    return Protocol(record["val_fingerprint"], record["evaluate_settings"])


def plots_of(record: Mapping) -> Path | None:
    """Return the folder of matches in a record of the pipeline step `evaluate`.

    Returns None if the matches do not exist, e.g. if they were removed after the step.
    """
    path = Path(record.get("plots", "")) / MATCHES
    return path.parent if "plots" in record and path.is_file() else None


def recorded_evaluation(record: Mapping) -> Evaluation:
    """Return the evaluation in a record of the pipeline step `evaluate`."""
    found = evaluation_of(record["metrics"], plots_of(record))
    removed = "they were removed after the pipeline step `evaluate`; submit the pipeline again"
    return found if found.matches else replace(found, remedy=removed)
