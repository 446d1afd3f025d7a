"""How the registry stores the evaluations of a model version.

A version may have been evaluated several times, on different validation data or with different
settings (`vitdet.data.protocol.Protocol`). Each evaluation is stored by the digest of its
protocol: its metrics in tags of the version named METRIC_DIGEST, its per-image matches in the
artifact evaluation/DIGEST/matches.npz. The tags METRIC, `val_fingerprint` and `evaluate_settings`
without a digest are the evaluation that the version was registered with.
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
    """Return the metrics that are stored in tags, with four significant digits."""
    return {key: f"{value:.4g}" for key in METRICS if (value := metrics.get(key)) is not None}


def matches_folder(protocol: Protocol) -> str:
    """Return the artifact folder of the matches under this protocol."""
    return f"evaluation/{protocol.digest}"


def model_id_of(version: ModelVersion) -> str | None:
    """Return the id of the logged model that a version was created from; None if there is none.

    Database stores do not keep `model_id`, but the source, models:/ID.
    """
    scheme, _, model = (version.source or "").rpartition("/")
    return model if scheme == "models:" else None


def known_metrics(version: ModelVersion, protocol: Protocol) -> dict[str, float]:
    """Return the metrics of a version under this protocol; empty without such an evaluation."""
    tags, own = version.tags, protocol.tags()
    if not own:
        return {}
    registered = own.items() <= tags.items()  # with an evaluation under this protocol
    # a later evaluation, in the tags with the digest, takes precedence over that of the
    # registration
    found = {
        key: tags.get(protocol.tag(key), tags.get(key) if registered else None) for key in METRICS
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def read_evaluation(
    client: Client, version: ModelVersion, protocol: Protocol, matches: bool
) -> Evaluation:
    """Return the stored evaluation of a version under this protocol, or one without metrics.

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
    """Store an evaluation of a version. plots: the folder with its matches, if there are any."""
    # the matches first: metrics without them would look complete
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
    """Store the matches of an evaluation whose metrics a version has already.

    metrics: metrics of the evaluation in `plots`. If they differ from the stored metrics, or if
    matches are already stored, a warning is logged and nothing is stored.
    """
    model, reason = model_id_of(version), ""
    known = tags_of(known_metrics(version, protocol))
    if not model:
        reason = "it has no logged model"
    elif not known or known != tags_of(metrics):
        reason = f"its metrics are from a different evaluation: {known}, not {tags_of(metrics)}"
    elif _has_matches(client, version, protocol):
        reason = "it already has matches of this evaluation"
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
    """Return a new evaluation, given its metrics and the folder of its matches.

    plots: the folder of `vitdet evaluate --plots`; None: without matches. Raises FileNotFoundError
    if it has no matches, and ValueError if their AP is not that of the metrics.
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
        ap = float(WeightedAP(one)(np.ones(len(one.image_ids), int))[0, 0])
        expected = metrics.get(key)
        if ap == ap and (expected is None or abs(ap - expected) > 1e-6):
            raise ValueError(
                f"{path}: from a different evaluation than the metrics ({key} {ap:.6g}, "
                f"not {expected}); run `vitdet evaluate` with --output and --plots and register "
                "both"
            )
    return Evaluation(metrics, matches)


def protocol_of(record: Mapping) -> Protocol:
    """Return the protocol in the file that a pipeline's step `evaluate` wrote."""
    return Protocol(record["val_fingerprint"], record["evaluate_settings"])


def plots_of(record: Mapping) -> Path | None:
    """Return the folder of matches in the file that a pipeline's step `evaluate` wrote.

    None if the folder does not exist, e.g. if the step was cached and its files have been removed
    since.
    """
    path = Path(record.get("plots", "")) / MATCHES
    return path.parent if "plots" in record and path.is_file() else None


def recorded_evaluation(record: Mapping) -> Evaluation:
    """Return the evaluation in the file that a pipeline's step `evaluate` wrote."""
    found = evaluation_of(record["metrics"], plots_of(record))
    removed = (
        "its files have been removed since the pipeline's step `evaluate` was cached; submit the "
        "pipeline again with --no-cache"
    )
    return found if found.matches else replace(found, remedy=removed)
