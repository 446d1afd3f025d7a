"""Registration of checkpoints in the model registry; the alias `champion` requires the gate."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, check_names, from_dict, save_config
from vitdet.data.fingerprint import change, fingerprint, fingerprints
from vitdet.data.protocol import Protocol
from vitdet.evaluation.report import REPORT
from vitdet.files import sha256
from vitdet.ranges import Alias, check
from vitdet.tracking import champion
from vitdet.tracking.evaluations import (
    MATCHES,
    add_matches,
    evaluation_of,
    matches_folder,
    model_id_of,
    tags_of,
)
from vitdet.tracking.experiments import experiment_id
from vitdet.tracking.gate import Evaluation, RejectedError
from vitdet.tracking.measured import Measured, agree, read_measured
from vitdet.tracking.mlflow import connect, tracking_uri
from vitdet.tracking.model_card import description_of, render
from vitdet.tracking.packaged_model import exported, pack
from vitdet.tracking.requests import UnknownRunError, create
from vitdet.tracking.shipper import same_number
from vitdet.tracking.trial import try_model
from vitdet.tracking.wheel import build_wheel

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CARD, CONFIG = "model_card.md", "config.yaml"  # artifacts of a version, beside the report
DESCRIPTION = (  # of a registered model
    "Detectors of vitdet. `candidate`: the version that was "
    "registered last. `champion`: the best version, which only a version that passes the gate "
    "replaces (`vitdet promote`, `vitdet rollback`). A version's description is its model card."
)
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
    config: Config | None = None,
    metrics: dict[str, float] | None = None,
    protocol: Protocol | None = None,
    measured: Measured | None = None,
    plots: Path | None = None,
) -> Registered:
    """Add a checkpoint to the model registry under an alias; `champion` requires the gate.

    The version becomes `candidate` in any case. The data is read only for the gate.

    Args:
        checkpoint: The detector.
        folder: The folder of the default MLflow store.
        alias: The alias that then also points to this version.
        config: The server, model name and gate, and the data and settings that `metrics` were
            measured with, which `vitdet promote` then uses; default: the config in the checkpoint.
        metrics: Metrics of the checkpoint; default: those in the checkpoint.
        protocol: The protocol of the metrics, if known.
        measured: The provenance of the metrics that `vitdet evaluate` wrote.
        plots: The folder of `vitdet evaluate --plots` of the same evaluation, whose report and
            per-image matches are stored with the version. Without their provenance, the report is not.

    Raises:
        RejectedError: The gate rejects the candidate, which is registered.
        ValueError: As `register` raises it.
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
    gate = (config or own).gate
    used = replace(used, gate=gate)
    metrics = stored.get("metrics") or {} if metrics is None else metrics
    evaluation = evaluation_of(metrics, plots)
    _check_plots(checkpoint, plots)
    tracking = (config or own).tracking
    place: dict[str, Any] = {
        "uri": tracking.uri,
        "folder": folder,
        "model_name": tracking.model_name,
    }
    if is_gated and not protocol.fingerprint:
        raise ValueError(
            f"{checkpoint}: the data of its metrics is unknown; run `vitdet "
            "evaluate CHECKPOINT --output FILE` and register it with --metrics FILE, or pass the "
            "config of the evaluation with --config"
        )
    name, version = register(
        checkpoint,
        run_id=stored["run_id"],
        alias=CANDIDATE,
        evaluation=evaluation,
        protocol=protocol,
        used=used,
        plots=plots,
        **place,
    )
    if not is_gated:
        if alias != CANDIDATE:
            client, _ = connect(None, tracking.uri, folder)
            client.set_registered_model_alias(name, alias, version)
        return Registered(name, version, "")
    evaluate = champion.evaluation_like(used, stored["class_names"], protocol)
    verdict = champion.judge(
        evaluation, protocol, gate, **place, evaluate=evaluate, version=version
    )
    if verdict.passed:
        verdict = champion.promote(version, evaluation, protocol, gate, **place)
    if not verdict.passed:
        raise RejectedError(
            f"{checkpoint}: registered as version {version} ({CANDIDATE}), not the champion: "
            f"{verdict.reason}",
            {"name": name, "version": version, "alias": CANDIDATE},
        )
    return Registered(name, version, verdict.reason)


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


def _check_plots(checkpoint: Path, plots: Path | None) -> None:
    """Raise ValueError if the folder of `vitdet evaluate --plots` is of another checkpoint."""
    measured = read_measured(plots / MATCHES) if plots else None
    if measured and measured.checkpoint_sha256 != sha256(checkpoint):
        raise ValueError(
            f"{plots}: of another checkpoint than {checkpoint}; run `vitdet evaluate {checkpoint} "
            f"--plots {plots}` again"
        )


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
    evaluation: Evaluation,
    protocol: Protocol,
    used: Config,
    plots: Path | None = None,
) -> tuple[str, str]:
    """Register a checkpoint, set the alias, if any, and return (name, version).

    A checkpoint of a run is registered once; a repeated registration moves the alias, and replaces the
    evaluation, report and model card if the metrics are of known data (see
    `vitdet.tracking.champion.update_tags`). The packaged model is tried before anything is uploaded.
    evaluation: of the checkpoint under `protocol`, with the config `used`, whose gate, data and
    evaluate settings the version's config contains. plots: the folder of its
    files. If the server does not know the run, e.g. of a checkpoint that was copied from another
    machine, the version has no run, but its id in the tag `training_run`. Raises ConnectionError if
    the server does not respond, ValueError if the packaged model does not answer.
    """
    try:
        client, run_id = connect(run_id, uri, folder)
        unknown_run = {}
    except UnknownRunError as error:
        log.warning("%s; the version is registered without a run", error)
        unknown_run = {"training_run": str(run_id)}
        client, run_id = connect(None, uri, folder)
    digest = sha256(checkpoint)

    def registered() -> ModelVersion | None:
        for version in client.search_model_versions(f"name = '{model_name}'"):
            of_run = (version.run_id or None) == run_id
            if of_run and version.tags.get("checkpoint_sha256") == digest:
                return version
        return None

    stored, version = load_model_file(checkpoint), registered()
    revision = client.get_run(run_id).data.tags.get("git_revision", "") if run_id else ""
    with tempfile.TemporaryDirectory(prefix="vitdet-model-") as work:
        files, card = Path(work) / "files", ""

        def write_files() -> None:
            nonlocal card
            card = render(model_name, stored, used, evaluation, protocol, run_id, revision)
            _write_files(files, card, stored, protocol, used, plots)

        if version is None:
            write_files()
            tags = {
                **({"git_revision": revision} if revision else {}),
                **protocol.tags(),
                **tags_of(evaluation.metrics),
                **_data_tags(stored),
                **unknown_run,
                "checkpoint_sha256": digest,
            }
            model_id = _log_model(
                client, run_id, uri, folder, model_name, stored, Path(work), files
            )
            _log_model_metrics(client, run_id, model_id, stored["step"], evaluation, protocol, used)
            create(
                lambda: next(iter(client.search_registered_models(f"name = '{model_name}'")), None),
                lambda: client.create_registered_model(model_name, description=DESCRIPTION),
            )
            with exported(tracking_uri(uri, folder)):
                version = create(
                    registered,
                    lambda: client.create_model_version(
                        model_name,
                        f"models:/{model_id}",
                        run_id,
                        tags,
                        description=description_of(card),
                        model_id=model_id,
                    ),
                )
        elif champion.update_tags(
            str(version.version),
            evaluation.metrics,
            protocol,
            uri=uri,
            folder=folder,
            model_name=model_name,
        ):
            write_files()
            if model := model_id_of(version):
                client.log_model_artifacts(model, str(files))
                _log_model_metrics(
                    client, run_id, model, stored["step"], evaluation, protocol, used
                )
            client.update_model_version(model_name, version.version, description_of(card))
        elif plots is not None:
            add_matches(client, version, protocol, evaluation.metrics, plots)
    if alias is not None:
        client.set_registered_model_alias(model_name, alias, version.version)
    return model_name, str(version.version)


def _data_tags(stored: dict) -> dict[str, str]:
    train = (stored.get("fingerprints") or {}).get("train")
    return {"train_fingerprint": train} if train else {}


def _write_files(
    folder: Path,
    card: str,
    stored: dict,
    protocol: Protocol,
    used: Config,
    plots: Path | None,
) -> None:
    """Write what a version contains besides the model: card, config, report and per-image matches."""
    folder.mkdir()
    (folder / CARD).write_text(card, encoding="utf-8")
    own = from_dict(stored["config"])
    config = replace(own, gate=used.gate, data=used.data, evaluate=used.evaluate)
    save_config(config, folder / CONFIG)
    if plots is None:
        return
    matches = folder / matches_folder(protocol) / MATCHES
    matches.parent.mkdir(parents=True)
    shutil.copyfile(plots / MATCHES, matches)
    if read_measured(plots / MATCHES) and (plots / REPORT).is_file():
        shutil.copyfile(plots / REPORT, folder / REPORT)


def _log_model(
    client: MlflowClient,
    run_id: str | None,
    uri: str,
    folder: Path,
    model_name: str,
    stored: dict,
    work: Path,
    files: Path,
) -> str:
    """Pack a detector, try it, and upload it with `files`; return the id of the logged model."""
    packed, model, wheel = work / "model", Model(run_id=run_id), build_wheel(work)
    pack(packed, model, stored, wheel)
    try_model(packed, wheel)
    shutil.copytree(files, packed, dirs_exist_ok=True)
    place = (
        client.get_run(run_id).info.experiment_id
        if run_id
        else experiment_id(
            client, tracking_uri(uri, folder), folder, model_name, "tracking.model_name"
        )
    )
    logged = client.create_logged_model(place, "detector", run_id, model_type="detection")
    model.model_id = model.model_uuid = logged.model_id
    model.artifact_path = logged.artifact_location
    model.save(str(packed / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(packed))
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    return logged.model_id


def _log_model_metrics(
    client: MlflowClient,
    run_id: str | None,
    model_id: str,
    step: int,
    evaluation: Evaluation,
    protocol: Protocol,
    used: Config,
) -> None:
    """Log the metrics to the model, with the validation data that they were measured on.

    MLflow has no metrics of a model without a run. Metrics of single classes are in the report.
    """
    values = {
        key: value
        for key, value in evaluation.metrics.items()
        if value is not None and "/" not in key
    }
    if run_id is None or not values:
        return
    data, names = used.data, {}
    if protocol.fingerprint:
        name = f"{Path(data.root).name} {data.val_split}"
        names = {"dataset_name": name, "dataset_digest": protocol.fingerprint}
        source = json.dumps({"uri": str(Path(data.root).resolve())})
        dataset = Dataset(name, protocol.fingerprint, "local", source)
        client.log_inputs(
            run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])]
        )
    now, metrics = int(time.time() * 1000), []
    for key, value in values.items():
        # the same point as the run's, if it has it: a metric of a model is one of its run as well
        same = [
            point.timestamp
            for point in client.get_metric_history(run_id, key)
            if point.step == step and same_number(point.value, value)
        ]
        stamp = same[-1] if same else now
        metrics.append(Metric(key, value, stamp, step, model_id=model_id, run_id=run_id, **names))
    client.log_batch(run_id, metrics)
