"""The stages of an experiment: what the command line's verbs and the pipeline's components call.

`train`, `evaluate` and `register` take configs and paths. The others are the steps of a pipeline run on a shared folder
(`vitdet.workspace`) with files that the caller names: the resolved configs, a description of the data, a checkpoint,
metrics. A step may be repeated: what exists is not made again, and a training resumes from its checkpoint.

Imports are inside the functions: help and configs need neither torch nor MLflow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitdet.config import Config, load_config, save_config
from vitdet.config.digest import difference, digest
from vitdet.files import sha256, write_json
from vitdet.workspace import (
    logs_folder,
    resolve_paths,
    result,
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

EXPLICIT = "explicit.json"  # beside the configs of a run: the settings of each that a user chose


class Data(NamedTuple):
    """The verified data of a run: its fingerprint, the names of the configs, a line for each that it changed."""

    fingerprint: str
    names: list[str]
    notes: list[str]


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


def resolve_configs(
    recipes: Sequence[str], overrides: Sequence[str], workspace: str, folder: str
) -> list[str]:
    """Write folder/NAME.yaml for each recipe, all settings but those that depend on the data, and return the names.

    Raises ValueError or FileNotFoundError, in one line, for a recipe or setting that is wrong, for the same experiment
    twice, and for recipes that one table could not compare: of other data or another place in MLflow.
    """
    from vitdet.data.layout import SPLITS, explicit_settings
    from vitdet.tracking.comparison import check_comparable

    if not recipes:
        raise ValueError("name at least one recipe")
    configs: dict[str, Config] = {}
    explicit: dict[str, list[str]] = {}
    for recipe in recipes:
        config = resolve_paths(load_config(recipe, overrides), Path(workspace))
        name = f"{Path(recipe).stem}-{digest(config)[:8]}"
        if name in configs:
            differing = "; ".join(difference(config, configs[name]))
            raise ValueError(
                f"{recipe} is given twice with the same settings"
                + (f" for the training, only others differ ({differing})" if differing else "")
                + ": there is nothing to compare"
            )
        explicit[name] = sorted(explicit_settings(recipe, overrides))
        first = next(iter(explicit))
        named = set(explicit[first]) & set(explicit[name])
        open_ = () if "data.root" not in named else [key for key in SPLITS if key not in named]
        check_comparable(configs.get(first, config), config, recipes[0], recipe, open_)
        configs[name] = config
    for name, config in configs.items():
        save_config(config, Path(folder) / f"{name}.yaml")
    write_json(Path(folder) / EXPLICIT, explicit)
    return list(configs)


def prepare_data(settings: str, workspace: str, configs: str, manifest: str) -> Data:
    """Verify the data and write the configs with what depends on it, and a description of the data.

    The demo's data set is drawn if it is not there. Raises FileNotFoundError or ValueError, in one line, for data that is
    missing or that training could not use.
    """
    from vitdet.data.fingerprint import combined, describe
    from vitdet.data.layout import resolve, settings_text
    from vitdet.demo.tiny import make_tiny
    from vitdet.tracking.comparison import check_comparable

    every = _configs(settings)
    root = next(iter(every.values())).data.root
    demo = Path(workspace) / load_config("tiny").data.root
    if Path(root) == demo and not demo.exists():
        make_tiny(demo)
    explicit, notes = _read(Path(settings) / EXPLICIT), []
    for name, config in every.items():
        every[name], found = resolve(config, explicit[name])
        if found:
            notes.append(f"{name}: {root} has {settings_text(found)}")
    first = next(iter(every))
    for name, config in every.items():
        check_comparable(every[first], config, first, name)
    described = describe(every[first].data)
    for name, config in every.items():
        expected, count = config.model.roi_heads.num_classes, len(described["classes"])
        if expected != count:
            raise ValueError(
                f"{root} has {count} classes, but model.roi_heads.num_classes is {expected}; set it "
                f"to {count}"
            )
        save_config(config, Path(configs) / f"{name}.yaml")
    write_json(manifest, described)
    return Data(combined(described["fingerprints"]), list(every), notes)


def fetch_weights(configs: str, workspace: str) -> str:
    """Fetch what train.init of each config names into WORKSPACE/weights; returns a digest of all these files.

    Raises what `vitdet weights fetch` raises.
    """
    from vitdet.weights import resolve
    from vitdet.weights.catalogue import find
    from vitdet.weights.fetch import fetch_published

    sums, folder = [], weights_folder(workspace)
    for init in sorted({config.train.init for config in _configs(configs).values()}):
        if init and not Path(init).suffix and not (folder / find(init).file).is_file():
            fetch_published(find(init), folder)
        if file := resolve(init, folder):
            sums.append(f"{init} {sha256(file)}")
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def start_parent_run(configs: str, workspace: str, run_id: str) -> str:
    """Create the parent run of this pipeline run in MLflow; returns one line that says where it is.

    Raises ConnectionError where MLflow does not answer.
    """
    from vitdet.tracking import comparison
    from vitdet.tracking.address import hide_credentials, tracking_uri

    every, folder = _configs(configs), runs_folder(workspace)
    settings = next(iter(every.values())).tracking
    parent = comparison.start_parent_run(
        run_id, list(every), uri=settings.uri, folder=folder, experiment=settings.experiment
    )
    uri = hide_credentials(tracking_uri(settings.uri, folder))
    return f"MLflow: {uri}, experiment {settings.experiment}, parent run {parent}"


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


def train_recipe(
    settings: str, name: str, data: str, workspace: str, run_id: str, checkpoint: str
) -> None:
    """Train in this process; raises as `train_argv` and `train` do."""
    config = _verified(settings, name, data)
    if not is_trained(workspace, name, run_id):
        output = training_folder(workspace, name, run_id)
        train(config, name, output, weights=weights_folder(workspace), group=run_id)
    copy_checkpoint(workspace, name, run_id, checkpoint)


def evaluate_recipe(
    checkpoint: str,
    configs: str,
    name: str,
    data: str,
    workspace: str,
    run_id: str,
    figures: str,
    report: str,
) -> tuple[dict[str, float], bool]:
    """The detector's metrics, also in MLflow, and whether the champion's evaluation on this data is known.

    Writes the metrics with what they belong to, as the following steps read them, and the HTML file `report`.
    """
    from vitdet.data.protocol import Protocol
    from vitdet.evaluation.report import REPORT
    from vitdet.tracking import champion

    config = _verified(configs, name, data)
    folder = training_folder(workspace, name, run_id) / "evaluation"
    metrics, tracked = evaluate(
        Path(checkpoint), folder=runs_folder(workspace), config=config, plots=folder
    )
    shutil.copyfile(folder / REPORT, report)
    protocol = Protocol.of(config, data.split("-")[1])
    row = {"name": name, "run_id": tracked, "metrics": metrics, "plots": str(folder)}
    write_json(figures, row | protocol.tags())
    return metrics, champion.is_known(protocol, config.gate, **_registry(config, workspace))


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
    write_json(verdict, {**row, "passed": found.passed, "reason": found.reason})
    return found.passed, found.reason


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


def compare(verdicts: Sequence[str], configs: str, workspace: str, run_id: str, table: str) -> str:
    """The table of all recipes in Markdown, also in MLflow's parent run; writes it to the file `table`."""
    from vitdet.tracking import comparison

    config = next(iter(_configs(configs).values()))
    rows = [_read(path) for path in verdicts]
    experiment = config.tracking.experiment
    text = comparison.compare(run_id, rows, experiment=experiment, **_registry(config, workspace))
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    Path(table).write_text(text)
    return text


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


def _configs(folder: str) -> dict[str, Config]:
    return {path.stem: load_config(path) for path in sorted(Path(folder).glob("*.yaml"))}


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
