"""Evaluation of a detector, and of the champion with which it is compared."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from vitdet.config import Config, load_config
from vitdet.files import sha256, write_json
from vitdet.stages.outcomes import recorded
from vitdet.stages.preparation import verified_config
from vitdet.stages.workspace import champion_file, registry, runs_folder, training_folder

log = logging.getLogger(__name__)


def evaluate(
    checkpoint: Path,
    overrides: Sequence[str] = (),
    *,
    folder: Path,
    config: Config | None = None,
    output: Path | None = None,
    pictures: Path | None = None,
    plots: Path | None = None,
    report: Path | None = None,
) -> tuple[dict[str, float], str | None]:
    """Evaluate a checkpoint; log metrics and files to the checkpoint's MLflow run.

    Args:
        checkpoint: The file of a detector.
        overrides: data and evaluate settings to change, as "SECTION.KEY=VALUE".
        folder: The folder of MLflow's default store.
        config: Its data and evaluate settings replace the checkpoint's; then overrides apply.
        output, pictures, plots, report: Files and folders to write; see `vitdet evaluate`.

    Returns the metrics and the MLflow run's ID (None if this process logs nothing). Raises
    the errors of `vitdet.evaluate` and `vitdet.tracking.address.tracking_uri`.
    """
    from vitdet import distributed
    from vitdet.evaluation.evaluator import evaluate as measure
    from vitdet.tracking.address import tracking_uri
    from vitdet.tracking.measured import write_evaluation
    from vitdet.tracking.runs import has_mlflow, log_evaluation

    if has_mlflow():  # reject an invalid MLflow address before the evaluation
        tracking_uri(config.tracking.uri if config else "", folder)
    # before the evaluation, as a training run may replace best.pt; `measure` reports a missing file
    on_rank0 = distributed.rank() == 0
    digest = sha256(checkpoint) if on_rank0 and checkpoint.is_file() else ""
    metrics = measure(
        checkpoint,
        overrides,
        config=config,
        pictures=pictures,
        plots=plots,
        report=report,
        detailed=True,
    )
    if not on_rank0:
        return metrics, None
    write_evaluation(checkpoint, digest, overrides, config, metrics, output, plots)
    if sha256(checkpoint) != digest:
        log.warning("%s: was replaced during its evaluation; nothing is logged", checkpoint)
        return metrics, None
    return metrics, log_evaluation(checkpoint, metrics, config, folder, pictures, plots, report)


class Evaluation(NamedTuple):
    """The evaluation of a detector in a pipeline run.

    known: True if the champion was evaluated on the same data with the same settings, or if there
    is no champion. page: the URL of the detector's MLflow run; "" if there is no run or no UI.
    """

    metrics: dict[str, float]
    known: bool
    page: str

    def text(self) -> str:
        """Return the AP and the URL in one line."""
        kinds = [
            f"{kind} AP {self.metrics[f'{kind}_ap']}"
            for kind in ("box", "mask")
            if f"{kind}_ap" in self.metrics
        ]
        return " ".join([", ".join(kinds) or "no AP", self.page]).strip()


def evaluate_recipe(
    checkpoint: str,
    configs: str,
    name: str,
    data: str,
    workspace: str,
    run_id: str,
    figures: str,
    report: str,
) -> Evaluation:
    """Evaluate the detector of a training run.

    Writes the metrics, the data's fingerprint and the settings to the JSON file `figures`, and the
    report to the HTML file `report`. Raises the errors of `verified_config` and `evaluate`.
    """
    from vitdet.data.protocol import Protocol
    from vitdet.evaluation.report import REPORT
    from vitdet.tracking import champion
    from vitdet.tracking.comparison import page_of_run

    with recorded(workspace, name, run_id, "evaluate"):
        config, runs = verified_config(configs, name, data), runs_folder(workspace)
        plots = training_folder(workspace, name, run_id) / "evaluation"
        metrics, tracked = evaluate(Path(checkpoint), folder=runs, config=config, plots=plots)
        shutil.copyfile(plots / REPORT, report)
        protocol = Protocol.of(config, data.split("-")[1])
        row = {"name": name, "run_id": tracked, "metrics": metrics, "plots": str(plots)}
        write_json(figures, row | protocol.tags())
        known = champion.is_known(protocol, config.gate, **registry(config, workspace))
        page = page_of_run(tracked, uri=config.tracking.uri, folder=runs)
        return Evaluation(metrics, known, page)


def evaluate_champion(
    checkpoint: str, figures: str, configs: str, name: str, workspace: str, run_id: str
) -> str:
    """Evaluate the champion on the data and with the settings of the detector's evaluation.

    Returns one line: the champion's metric or error, or "there is no champion".
    """
    from vitdet.checkpoint import load_model_file
    from vitdet.tracking import champion, evaluations
    from vitdet.tracking.gate import label

    with recorded(workspace, name, run_id, "evaluate-champion"):
        config = load_config(Path(configs) / f"{name}.yaml")
        protocol = evaluations.protocol_of(json.loads(Path(figures).read_text()))
        names = load_model_file(checkpoint)["class_names"]
        found = champion.evaluate_champion(
            protocol,
            config.gate,
            champion.evaluation_like(config, names, protocol),
            **registry(config, workspace),
        )
        if found is None:
            return "there is no champion"
        write_json(champion_file(workspace, name, run_id), asdict(found))
        value = found.failure or f"{label(config.gate)} {found.metrics[config.gate.metric]:.4g}"
        return f"champion, version {found.version}: {value}"
