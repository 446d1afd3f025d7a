"""The stages of an experiment: what the command line's verbs and the pipeline's components call.

`train`, `evaluate` and `register` take configs and paths. The others are the steps of a pipeline run on a shared folder
(`vitdet.workspace`) with files that the caller names: the resolved configs, a description of the data, a checkpoint,
metrics. A step may be repeated: what exists is not made again, and a training resumes from its checkpoint.

Imports are inside the functions: help and configs need neither torch nor MLflow.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitdet.config import Config, load_config, save_config
from vitdet.files import write_json
from vitdet.outcomes import read_outcomes, step, write_verdict
from vitdet.outcomes import recorded as recorded
from vitdet.preparation import EXPLICIT, read_configs
from vitdet.preparation import fetch_weights as fetch_weights
from vitdet.preparation import plan_trainings as plan_trainings
from vitdet.preparation import prepare_data as prepare_data
from vitdet.preparation import resolve_configs as resolve_configs
from vitdet.sweep import varied_settings
from vitdet.workspace import (
    logs_folder,
    result,
    run_folder,
    runs_folder,
    training_folder,
    weights_folder,
)

if TYPE_CHECKING:
    from vitdet.data.protocol import Protocol
    from vitdet.tracking.champion import Evaluated
    from vitdet.tracking.measured import Measured
    from vitdet.tracking.registry import Registered

log = logging.getLogger(__name__)

COMPARISON = "comparison.html"  # in the folder of a pipeline run whose trainings all finished


def train(
    config: Config,
    recipe: str,
    output: Path,
    *,
    checkpoints: Path | None = None,
    weights: Path | None = None,
    group: str = "",
    profile: bool = False,
) -> Path:
    """output/model.pt of a training that is tracked in MLflow; raises what `vitdet.train` raises.

    weights: the folder of train.init. group: the pipeline run that this training belongs to, if any.
    """
    from vitdet import training
    from vitdet.tracking.address import tracking_uri
    from vitdet.tracking.runs import default_folder, has_mlflow, start_tracker
    from vitdet.tracking.tracker import Tracker
    from vitdet.weights import resolve

    if has_mlflow():
        tracking_uri(config.tracking.uri, default_folder(output))  # a mistake in it ends this now

    def start_tracking(data_digest: str, run_id: str | None, step: int) -> Tracker:
        return start_tracker(config, recipe, output, group, data_digest, run_id, step)

    return training.train(
        config,
        output,
        checkpoints=checkpoints,
        weights=resolve(config.train.init, weights),
        start_tracking=start_tracking,
        profile=profile,
    )


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
    """The metrics of a checkpoint, also logged to the run that trained it with the files, and that run's id.

    The arguments are those of `vitdet evaluate`; folder: of the default MLflow store. The id is None without that store.
    """
    from vitdet import distributed
    from vitdet.evaluation.evaluator import evaluate as measure
    from vitdet.tracking.address import tracking_uri
    from vitdet.tracking.measured import write_evaluation
    from vitdet.tracking.runs import has_mlflow, log_evaluation

    if has_mlflow():  # a mistake in the address ends this now
        tracking_uri(config.tracking.uri if config else "", folder)
    metrics = measure(
        checkpoint,
        overrides,
        config=config,
        pictures=pictures,
        plots=plots,
        report=report,
        detailed=True,
    )
    if distributed.rank() != 0:
        return metrics, None
    write_evaluation(checkpoint, overrides, config, metrics, output, plots)
    return metrics, log_evaluation(checkpoint, metrics, config, folder, pictures, plots, report)


def register(
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
    """Add a checkpoint to the model registry; arguments and errors of `register_checkpoint`.

    Raises ValueError without MLflow.
    """
    from vitdet.tracking.runs import require_mlflow

    require_mlflow()
    from vitdet.tracking.registry import register_checkpoint

    return register_checkpoint(
        checkpoint,
        folder=folder,
        alias=alias,
        config=config,
        metrics=metrics,
        protocol=protocol,
        measured=measured,
        plots=plots,
    )


def start_parent_run(configs: str, workspace: str, run_id: str) -> str:
    """Create the parent run of this pipeline run in MLflow; returns one line that says where it is.

    Keeps the configs in the run's folder, where the comparison finds them after a failure too. Raises ConnectionError
    where MLflow does not answer.
    """
    from vitdet.tracking import comparison
    from vitdet.tracking.address import hide_credentials, tracking_uri

    every, folder = read_configs(configs), runs_folder(workspace)
    for name, config in every.items():
        save_config(config, run_folder(workspace, run_id) / f"{name}.yaml")
    settings = next(iter(every.values())).tracking
    parent = comparison.start_parent_run(
        run_id, list(every), uri=settings.uri, folder=folder, experiment=settings.experiment
    )
    uri = hide_credentials(tracking_uri(settings.uri, folder))
    return f"MLflow: {uri}, parent run {parent}"


def train_argv(settings: str, name: str, data: str, workspace: str, run_id: str) -> list[str]:
    """The arguments of `vitdet` in a job that trains; the config is saved where the job's processes read it.

    Checked before anything is asked of the cluster: raises as `vitdet.data.fingerprint.verify` does when the data has
    changed, and FileNotFoundError when the initial weights are gone.
    """
    from vitdet.weights import resolve

    config, output = _verified(settings, name, data), training_folder(workspace, name, run_id)
    weights = weights_folder(workspace)
    resolve(config.train.init, weights)
    file = output / f"{name}.yaml"
    save_config(config, file)
    options = {"--output": output, "--weights": weights, "--group": run_id}
    return ["train", str(file), *(str(word) for pair in options.items() for word in pair)]


def check_processes(settings: str, name: str, processes: int) -> None:
    """Raise ValueError if this number of processes cannot share a batch of the training."""
    from vitdet.data.samplers import check_batch_size

    train = load_config(Path(settings) / f"{name}.yaml").train
    check_batch_size(train.batch_size, processes, train.accumulate)


def is_trained(workspace: str, name: str, run_id: str) -> bool:
    """Whether this training is complete, as when only the end of its step was lost."""
    folder = training_folder(workspace, name, run_id)
    return (folder / "model.pt").is_file() and result(folder).is_file()


def keep_logs(settings: str, name: str, workspace: str, run_id: str, files: dict[str, str]) -> None:
    """Write the logs of a training job to its folder and its MLflow run, if any; a failure is a warning only."""
    from vitdet.tracking.runs import log_files

    output = training_folder(workspace, name, run_id)
    folder = logs_folder(workspace, name, run_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        config = load_config(Path(settings) / f"{name}.yaml")
        log_files(config, output, [folder / file for file in files], "logs")
    except (OSError, ValueError) as error:
        log.warning("the logs of the job are not kept: %s", error)


def copy_checkpoint(workspace: str, name: str, run_id: str, checkpoint: str) -> None:
    """Copy the detector that a training is for, best.pt with train.keep_best, to where the next step expects it."""
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(result(training_folder(workspace, name, run_id)), checkpoint)


@step("train")
def train_recipe(
    settings: str, name: str, data: str, workspace: str, run_id: str, checkpoint: str
) -> None:
    """Train in this process; raises as `train_argv` and `train` do."""
    config = _verified(settings, name, data)
    if not is_trained(workspace, name, run_id):
        output = training_folder(workspace, name, run_id)
        train(config, name, output, weights=weights_folder(workspace), group=run_id)
    copy_checkpoint(workspace, name, run_id, checkpoint)


class Evaluation(NamedTuple):
    """The metrics of a detector, whether the champion's evaluation on this data is known, and the address of the
    detector's run on MLflow's pages, "" if it has none.
    """

    metrics: dict[str, float]
    known: bool
    page: str

    def text(self) -> str:
        """One line with AP and address."""
        kinds = [
            f"{kind} AP {self.metrics[f'{kind}_ap']}"
            for kind in ("box", "mask")
            if f"{kind}_ap" in self.metrics
        ]
        return " ".join([", ".join(kinds) or "no AP", self.page]).strip()


@step("evaluate")
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
    """Evaluate the detector; its metrics are logged to MLflow too.

    Writes the metrics with what they belong to, as the following steps read them, and the HTML file `report`.
    """
    from vitdet.data.protocol import Protocol
    from vitdet.evaluation.report import REPORT
    from vitdet.tracking import champion
    from vitdet.tracking.comparison import page_of_run

    config = _verified(configs, name, data)
    folder = training_folder(workspace, name, run_id) / "evaluation"
    metrics, tracked = evaluate(
        Path(checkpoint), folder=runs_folder(workspace), config=config, plots=folder
    )
    shutil.copyfile(folder / REPORT, report)
    protocol = Protocol.of(config, data.split("-")[1])
    row = {"name": name, "run_id": tracked, "metrics": metrics, "plots": str(folder)}
    write_json(figures, row | protocol.tags())
    known = champion.is_known(protocol, config.gate, **_registry(config, workspace))
    page = page_of_run(tracked, uri=config.tracking.uri, folder=runs_folder(workspace))
    return Evaluation(metrics, known, page)


@step("evaluate-champion")
def evaluate_champion(
    checkpoint: str, figures: str, configs: str, name: str, workspace: str, run_id: str
) -> str:
    """Evaluate the champion as the detector in `checkpoint` was; returns one line. `gate` reads the result."""
    from vitdet.checkpoint import load_model_file
    from vitdet.tracking import champion, evaluations
    from vitdet.tracking.gate import label

    config = load_config(Path(configs) / f"{name}.yaml")
    protocol, names = (
        evaluations.protocol_of(_read(figures)),
        load_model_file(checkpoint)["class_names"],
    )
    found = champion.evaluate_champion(
        protocol,
        config.gate,
        champion.evaluation_like(config, names, protocol),
        **_registry(config, workspace),
    )
    if found is None:
        return "there is no champion"
    write_json(_champion_file(workspace, name, run_id), asdict(found))
    value = "" if found.failure else f"{label(config.gate)} {found.metrics[config.gate.metric]:.4g}"
    return f"champion, version {found.version}: {found.failure or value}"


@step("gate")
def gate(
    figures: str, configs: str, name: str, workspace: str, run_id: str, verdict: str
) -> tuple[bool, str]:
    """(whether the detector beats the registry's champion, why); writes both beside the metrics."""
    from vitdet.tracking import champion, evaluations

    row, config = _read(figures), load_config(Path(configs) / f"{name}.yaml")
    found = champion.judge(
        evaluations.recorded_evaluation(row),
        evaluations.protocol_of(row),
        config.gate,
        evaluated=_evaluated(workspace, name, run_id),
        **_registry(config, workspace),
    )
    judged = {**row, "passed": found.passed, "reason": found.reason}
    write_json(verdict, judged)
    write_verdict(workspace, name, run_id, judged)
    return found.passed, found.reason


@step("register")
def register_recipe(
    checkpoint: str, figures: str, configs: str, name: str, workspace: str, run_id: str
) -> str:
    """Register the detector and make it the champion if it still passes the gate; returns one line."""
    from vitdet.tracking import champion, evaluations

    row, config = _read(figures), load_config(Path(configs) / f"{name}.yaml")
    protocol = evaluations.protocol_of(row)
    found = register(
        Path(checkpoint),
        folder=runs_folder(workspace),
        alias="candidate",
        config=config,
        metrics=row["metrics"],
        protocol=protocol,
        plots=evaluations.plots_of(row),
    )
    verdict = champion.promote(
        found.version,
        evaluations.recorded_evaluation(row),
        protocol,
        config.gate,
        evaluated=_evaluated(workspace, name, run_id),
        **_registry(config, workspace),
    )
    mark = f" ({champion.ALIAS})" if verdict.passed else ""
    return f"{found.name}, version {found.version}{mark}: {verdict.reason}"


def compare(
    verdicts: Sequence[str], configs: str, workspace: str, run_id: str, table: str, links: str
) -> str:
    """The table of all trainings in Markdown, also in MLflow's parent run.

    Writes an HTML page to the file `table`, and Markdown with links to MLflow to the file `links`.
    """
    rows = [_read(path) for path in verdicts]
    text, linked = _compare(read_configs(configs), rows, {}, workspace, run_id, table)
    Path(links).parent.mkdir(parents=True, exist_ok=True)
    Path(links).write_text(linked)
    return text


def compare_finished(workspace: str, run_id: str, table: str) -> str:
    """The table of `compare` after a failure: the trainings that finished, and why the others did not.

    Writes the HTML page to the file `table`. Returns "" if `compare` has made the table or no training began.
    """
    every, written = read_configs(run_folder(workspace, run_id)), run_folder(workspace, run_id)
    rows, failures = read_outcomes(workspace, list(every), run_id)
    if every and (failures or not (written / COMPARISON).is_file()):
        return _compare(every, rows, failures, workspace, run_id, table)[0]
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    if every:
        shutil.copyfile(written / COMPARISON, table)
    else:
        Path(table).write_text("<p>No training was started.</p>\n")
    return ""


def _compare(
    every: dict[str, Config],
    rows: Sequence[dict],
    failures: dict[str, str],
    workspace: str,
    run_id: str,
    table: str,
) -> tuple[str, str]:
    from vitdet.tracking import comparison

    settings: dict[str, dict[str, str]] = {}
    for recipe in {name.rpartition("-")[0] for name in every}:
        group = {name: one for name, one in every.items() if name.rpartition("-")[0] == recipe}
        settings |= dict(zip(group, varied_settings(list(group.values())), strict=True))
    config = next(iter(every.values()))
    text, linked, html = comparison.compare(
        run_id,
        rows,
        failures,
        settings,
        experiment=config.tracking.experiment,
        **_registry(config, workspace),
    )
    complete = [] if failures else [run_folder(workspace, run_id) / COMPARISON]
    for path in (Path(table), *complete):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html)
    return text, linked


def end_parent_run(
    recipes: Sequence[str], overrides: Sequence[str], workspace: str, run_id: str, state: str
) -> None:
    """End the parent run, if there is one; state: how the pipeline ended, in KFP's words."""
    from vitdet.tracking import comparison

    try:
        settings = load_config(recipes[0], overrides).tracking
    except (ValueError, FileNotFoundError, IndexError):
        return  # the first step ended the run for this, before a parent was created
    comparison.end_parent_run(
        run_id,
        state,
        uri=settings.uri,
        folder=runs_folder(workspace),
        experiment=settings.experiment,
    )


def _verified(configs: str, name: str, data: str) -> Config:
    """A config of `resolve_configs` or `prepare_data` with what the data has, which has this fingerprint."""
    from vitdet.data.fingerprint import verify
    from vitdet.data.layout import resolve

    config, explicit = load_config(Path(configs) / f"{name}.yaml"), Path(configs) / EXPLICIT
    if explicit.is_file():
        config, _ = resolve(config, _read(explicit)[name])
    verify(config.data, data)
    return config


def _registry(config: Config, workspace: str) -> dict[str, Any]:
    settings = config.tracking
    folder, name = runs_folder(workspace), settings.model_name
    return {"uri": settings.uri, "folder": folder, "model_name": name}


def _champion_file(workspace: str, name: str, run_id: str) -> Path:
    return training_folder(workspace, name, run_id) / "champion.json"


def _evaluated(workspace: str, name: str, run_id: str) -> Evaluated | None:
    from vitdet.tracking.champion import Evaluated

    path = _champion_file(workspace, name, run_id)
    return Evaluated(**_read(path)) if path.is_file() else None


def _read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())
