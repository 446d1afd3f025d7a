"""Registration of checkpoints in the model registry; the gate protects the alias `champion`."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

from vitdet.checkpoint import load_model_file
from vitdet.config import Config, check_names, from_dict, save_config
from vitdet.config.ranges import Alias, check
from vitdet.data.protocol import Protocol
from vitdet.evaluation.report import REPORT
from vitdet.files import sha256
from vitdet.tracking import champion, evaluations
from vitdet.tracking.client import Client, UnknownRunError, create
from vitdet.tracking.evaluations import MATCHES, evaluation_of, model_id_of, tags_of
from vitdet.tracking.experiments import find_experiment
from vitdet.tracking.gate import Evaluation, RejectedError
from vitdet.tracking.measured import Measured, own_protocol, protocol_of_file, read_measured
from vitdet.tracking.mlflow import connect, connect_run
from vitdet.tracking.model_card import description_of, render
from vitdet.tracking.packaged_model import pack, try_model
from vitdet.tracking.shipper import same_number
from vitdet.tracking.wheel import build_wheel

CANDIDATE = "candidate"
CARD, CONFIG = "model_card.md", "config.yaml"  # artifacts of a model version
DESCRIPTION = (  # description of a registered model
    "Detectors of vitdet. `candidate`: the version that was registered last. `champion`: the best "
    "version; `vitdet promote` and `vitdet rollback` change it. A version's description is its "
    "model card."
)
log = logging.getLogger(__name__)


class Registered(NamedTuple):
    """A registered version. reason: the gate's reason, or "" if the gate was not applied."""

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
    """Add a checkpoint to the model registry under an alias; `champion` requires passing the gate.

    The version always gets the alias `candidate`. The dataset is read only if the gate is applied.
    The packaged model is tested before it is uploaded. If the server does not have the training
    run, the version has no run, but the tag `training_run` contains the run's ID.

    Args:
        checkpoint: The detector.
        folder: The folder of the default MLflow store.
        alias: An alias for the version, in addition to `candidate`.
        config: The server, model name and gate, and the data and settings with which `metrics` were
            measured. Default: the config in the checkpoint.
        metrics: Metrics of the detector. Default: the metrics in the checkpoint.
        protocol: The protocol of the metrics, if known.
        measured: The provenance of the metrics that `vitdet evaluate` wrote.
        plots: The folder that `vitdet evaluate --plots` wrote in the same evaluation. The version
            stores the matches and, if their provenance is known, the report.

    Raises:
        RejectedError: The gate rejects the candidate, which remains registered.
        ConnectionError: The server does not respond.
        ValueError: The packaged model cannot be run, the metrics belong to a different checkpoint,
            or the gate is applied but the data that the metrics were measured on is unknown.
    """
    check("the alias", Alias, alias)
    stored = load_model_file(checkpoint)
    own = from_dict(stored["config"])
    tracking, gate = (config or own).tracking, (config or own).gate
    check_names(tracking)
    is_gated = alias == champion.ALIAS
    used = config or own
    if metrics is None:
        used = own
        protocol = protocol or own_protocol(stored, is_gated)
        metrics = stored.get("metrics") or {}
    elif protocol is None:
        used, protocol = protocol_of_file(checkpoint, stored, config, measured, is_gated)
    evaluation = evaluation_of(metrics, plots)
    of_plots = read_measured(plots / MATCHES) if plots else None
    if of_plots and of_plots.checkpoint_sha256 != sha256(checkpoint):
        raise ValueError(
            f"{plots}: contains results of a different checkpoint than {checkpoint}; run `vitdet "
            f"evaluate {checkpoint} --plots {plots}` again"
        )
    if is_gated and not protocol.fingerprint:
        raise ValueError(
            f"{checkpoint}: the data that its metrics were measured on is unknown; run `vitdet "
            "evaluate CHECKPOINT --output FILE` and register it with --metrics FILE, or pass the "
            "config of the evaluation with --config"
        )
    run_id, name = stored["run_id"], tracking.model_name
    try:
        client, known_run = connect_run(run_id, tracking.uri, folder)
    except UnknownRunError as error:
        log.warning("%s; the version is registered without a run", error)
        client, known_run = connect(tracking.uri, folder), None
    used = replace(used, gate=gate)
    entry = _Entry(client, name, known_run, stored, evaluation, protocol, used, plots)
    version = entry.register(folder, sha256(checkpoint))
    client.set_registered_model_alias(name, CANDIDATE, version)
    if not is_gated:
        if alias != CANDIDATE:
            client.set_registered_model_alias(name, alias, version)
        return Registered(name, version, "")
    model: dict[str, Any] = {"uri": tracking.uri, "folder": folder, "model_name": name}
    evaluate = champion.evaluation_like(used, stored["class_names"], protocol)
    verdict = champion.judge(
        evaluation, protocol, gate, **model, evaluate=evaluate, version=version
    )
    if verdict.passed:
        verdict = champion.promote(version, evaluation, protocol, gate, **model)
    if not verdict.passed:
        raise RejectedError(
            f"{checkpoint}: registered as version {version} ({CANDIDATE}), but not promoted: "
            f"{verdict.reason}",
            {"name": name, "version": version, "alias": CANDIDATE},
        )
    return Registered(name, version, verdict.reason)


@dataclass(frozen=True)
class _Entry:
    """A checkpoint to register, and its evaluation.

    run_id: the training run's ID; None if the server does not have this run. stored: the content of
    the checkpoint. protocol, used, plots: the protocol, config and plots folder of the evaluation.
    """

    client: Client
    model_name: str
    run_id: str | None
    stored: dict
    evaluation: Evaluation
    protocol: Protocol
    used: Config
    plots: Path | None

    @cached_property
    def revision(self) -> str:
        if self.run_id is None:
            return ""
        return self.client.get_run(self.run_id).data.tags.get("git_revision", "")

    def register(self, folder: Path, digest: str) -> str:
        """Register the checkpoint with this digest; return the version.

        If the version exists, its evaluation, report and model card are replaced, except in the
        cases in which `champion.update_tags` changes nothing.
        """
        client, name, metrics = self.client, self.model_name, self.evaluation.metrics
        version = self.version(digest)
        with tempfile.TemporaryDirectory(prefix="vitdet-model-") as work:
            files = Path(work) / "files"
            if version is None:
                return str(self.add(folder, digest, Path(work)).version)
            if champion.update_tags(client, folder, version, metrics, self.protocol):
                card = self.write_files(files)
                if model := model_id_of(version):
                    client.log_model_artifacts(model, str(files))
                    self.log_metrics(model)
                client.update_model_version(name, version.version, description_of(card))
            elif self.plots is not None:
                evaluations.add_matches(client, version, self.protocol, metrics, self.plots)
        return str(version.version)

    def add(self, folder: Path, digest: str, work: Path) -> ModelVersion:
        """Create and return a version. work: a folder for temporary files."""
        client, name, run_id = self.client, self.model_name, self.stored["run_id"]
        card = self.write_files(work / "files")
        model_id = self.log_model(folder, work)
        self.log_metrics(model_id)
        create(
            lambda: next(iter(client.search_registered_models(f"name = '{name}'")), None),
            lambda: client.create_registered_model(name, description=DESCRIPTION),
        )
        tags = {
            "git_revision": self.revision,
            "train_fingerprint": (self.stored.get("fingerprints") or {}).get("train"),
            "training_run": None if self.run_id else run_id,
            "checkpoint_sha256": digest,
            **self.protocol.tags(),
            **tags_of(self.evaluation.metrics),
        }
        return create(
            lambda: self.version(digest),
            lambda: client.create_model_version(
                name,
                f"models:/{model_id}",
                self.run_id,
                {key: value for key, value in tags.items() if value},
                description=description_of(card),
                model_id=model_id,
            ),
        )

    def version(self, digest: str) -> ModelVersion | None:
        """Return the existing version of this run and checkpoint; None if there is none."""
        for version in self.client.search_model_versions(f"name = '{self.model_name}'"):
            has_run = (version.run_id or None) == self.run_id
            if has_run and version.tags.get("checkpoint_sha256") == digest:
                return version
        return None

    def write_files(self, folder: Path) -> str:
        """Write the version's model card, config, report and matches; return the card."""
        stored, used, plots = self.stored, self.used, self.plots
        origin = self.protocol, self.run_id, self.revision
        card = render(self.model_name, stored, used, self.evaluation, *origin)
        folder.mkdir()
        (folder / CARD).write_text(card, encoding="utf-8")
        own = from_dict(stored["config"])
        config = replace(own, gate=used.gate, data=used.data, evaluate=used.evaluate)
        save_config(config, folder / CONFIG)
        if plots is not None:
            matches = folder / evaluations.matches_folder(self.protocol) / MATCHES
            matches.parent.mkdir(parents=True)
            shutil.copyfile(plots / MATCHES, matches)
            if read_measured(plots / MATCHES) and (plots / REPORT).is_file():
                shutil.copyfile(plots / REPORT, folder / REPORT)
        return card

    def log_model(self, folder: Path, work: Path) -> str:
        """Package, test and upload the detector, with WORK/files; return the logged model's ID."""
        client, run_id, packed = self.client, self.run_id, work / "model"
        model, wheel = Model(run_id=run_id), build_wheel(work)
        pack(packed, model, self.stored, wheel)
        try_model(packed, wheel)
        shutil.copytree(work / "files", packed, dirs_exist_ok=True)
        if run_id:
            experiment = client.get_run(run_id).info.experiment_id
        else:
            experiment = find_experiment(client, folder, self.model_name, "tracking.model_name")
        try:
            logged = client.create_logged_model(
                experiment, "detector", run_id, model_type="detection"
            )
        except LookupError as error:  # the server has no such endpoint
            raise LookupError(f"{error}; the server must be MLflow 3 or later") from None
        model.model_id = model.model_uuid = logged.model_id
        model.artifact_path = logged.artifact_location
        model.save(str(packed / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(packed))
        client.finalize_logged_model(logged.model_id, "READY")
        if run_id:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
        return logged.model_id

    def log_metrics(self, model_id: str) -> None:
        """Log the metrics to the model, linked to the validation data.

        MLflow stores no metrics for a model without a run. Per-class metrics are not logged.
        """
        client, run_id, step = self.client, self.run_id, self.stored["step"]
        values = {
            key: value
            for key, value in self.evaluation.metrics.items()
            if value is not None and "/" not in key
        }
        if run_id is None or not values:
            return
        data, digest, names = self.used.data, self.protocol.fingerprint, {}
        if digest:
            name = f"{Path(data.root).name} {data.val_split}"
            names = {"dataset_name": name, "dataset_digest": digest}
            source = json.dumps({"uri": str(Path(data.root).resolve())})
            context = InputTag("mlflow.data.context", "evaluation")
            dataset = DatasetInput(Dataset(name, digest, "local", source), [context])
            client.log_inputs(run_id, [dataset])
        now, metrics = int(time.time() * 1000), []
        for key, value in values.items():
            # MLflow also adds these points to the run: an equal timestamp avoids duplicates
            same = [
                point.timestamp
                for point in client.get_metric_history(run_id, key)
                if point.step == step and same_number(point.value, value)
            ]
            stamp = same[-1] if same else now
            metrics.append(
                Metric(key, value, stamp, step, model_id=model_id, run_id=run_id, **names)
            )
        client.log_batch(run_id, metrics)
