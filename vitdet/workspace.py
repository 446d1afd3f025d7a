"""The steps of a pipeline run on a shared folder, the workspace: what the components call.

  WORKSPACE/...                     data sets and files of weights, where the recipes' relative paths say
  WORKSPACE/weights/                what train.init names
  WORKSPACE/runs/NAME-RUN/          a training: config, checkpoints, model.pt; NAME is recipe and digest of its config,
                                    RUN the first digits of the pipeline run's id
  WORKSPACE/runs/mlflow.db          MLflow's store, where no server is named

Between the steps go a folder of resolved configs, the manifest of the data, a checkpoint and figures: files, which the
caller names. A step may be repeated: what is there is not made again, and a training goes on from its checkpoint.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vitdet.config import (
    Config,
    difference,
    digest,
    flatten,
    legacy_digest,
    load_config,
    save_config,
)
from vitdet.files import write_json

COMPARED = (
    "data.dataset",
    "data.root",
    "data.train_split",
    "data.val_split",
    "data.max_images",
    "tracking.uri",
    "tracking.experiment",
    "tracking.model_name",
)


def resolve_configs(
    recipes: Sequence[str], overrides: Sequence[str], workspace: str, folder: str
) -> list[str]:
    """Writes folder/NAME.yaml for each recipe, everything resolved, and gives the names.

    Raises ValueError or FileNotFoundError, in one line, for a recipe or setting that is wrong, for the same experiment
    twice, and for recipes that one table could not compare: of other data or another place in MLflow.
    """
    if not recipes:
        raise ValueError("name at least one recipe")
    configs: dict[str, Config] = {}
    for recipe in recipes:
        config = _placed(load_config(recipe, overrides), Path(workspace))
        name = f"{Path(recipe).stem}-{digest(config)[:8]}"
        if name in configs:
            differing = "; ".join(difference(config, configs[name]))
            raise ValueError(
                f"{recipe} is given twice with the same settings"
                + (f" for the training, only others differ ({differing})" if differing else "")
                + ": there is nothing to compare"
            )
        _check_comparable(next(iter(configs.values()), config), config, recipes[0], recipe)
        configs[name] = config
    for name, config in configs.items():
        save_config(config, Path(folder) / f"{name}.yaml")
    return list(configs)


def prepare_data(configs: str, workspace: str, manifest: str) -> str:
    """Draws the demo's data set if it is not there, verifies any; writes its manifest and gives its digest.

    Raises FileNotFoundError or ValueError, in one line, for data that is not there or that training could not use.
    """
    from vitdet.data.fingerprint import describe
    from vitdet.demo.tiny import make_tiny

    every = _all(configs)
    data = every[0].data
    demo = Path(workspace) / load_config("tiny").data.root
    if Path(data.root) == demo and not demo.exists():
        make_tiny(demo)
    described = describe(data)
    for config in every:
        expected, found = config.model.roi_heads.num_classes, len(described["classes"])
        if expected != found:
            raise ValueError(
                f"{data.root} has {found} classes, but model.roi_heads.num_classes is {expected}; set it "
                f"to {found}"
            )
    write_json(manifest, described)
    return described["digest"]


def fetch_weights(configs: str, workspace: str) -> str:
    """Brings what train.init of each config names into WORKSPACE/weights; gives a digest of all these files.

    Raises what `vitdet weights fetch` raises.
    """
    from vitdet.cli.weights import published_file
    from vitdet.weights import resolve
    from vitdet.weights.catalogue import find

    sums, folder = [], weights_folder(workspace)
    for init in sorted({config.train.init for config in _all(configs)}):
        if init and not Path(init).suffix and not (folder / find(init).file).is_file():
            published_file(find(init), folder)
        if file := resolve(init, folder):
            with open(file, "rb") as opened:
                sums.append(f"{init} {hashlib.file_digest(opened, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def open_group(configs: str, workspace: str, run_id: str) -> str:
    """Makes the parent run of this pipeline run in MLflow and says in one line where it is.

    Raises ConnectionError where MLflow does not answer.
    """
    from vitdet.tracking import comparison
    from vitdet.tracking.mlflow import tracking_uri

    names = [path.stem for path in sorted(Path(configs).glob("*.yaml"))]
    settings, folder = _all(configs)[0].tracking, runs_folder(workspace)
    parent = comparison.open_group(
        run_id, names, uri=settings.uri, folder=folder, experiment=settings.experiment
    )
    return f"MLflow: {tracking_uri(settings.uri, folder)}, experiment {settings.experiment}, parent run {parent}"


def training_words(
    configs: str, name: str, manifest: str, workspace: str, run_id: str
) -> list[str]:
    """What follows `vitdet` on the command line that trains; the config is put where the job's processes see it.

    Before anything is asked of the cluster: raises as `vitdet.data.fingerprint.verify` does when the data is not what it
    was, and FileNotFoundError when the initial weights are gone.
    """
    from vitdet.weights import resolve

    config, output = _checked(configs, name, manifest), training_folder(workspace, name, run_id)
    resolve(config.train.init, weights_folder(workspace))
    save_config(config, output / f"{name}.yaml")
    return [
        "train",
        str(output / f"{name}.yaml"),
        "--output",
        str(output),
        "--weights",
        str(weights_folder(workspace)),
        "--group",
        run_id,
    ]


def is_trained(workspace: str, name: str, run_id: str) -> bool:
    """Whether this training is complete, as when only the step's end was lost."""
    return (training_folder(workspace, name, run_id) / "model.pt").is_file()


def collect(workspace: str, name: str, run_id: str, checkpoint: str) -> None:
    """Copies the finished detector to where the next step expects it."""
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(training_folder(workspace, name, run_id) / "model.pt", checkpoint)


def train(
    configs: str, name: str, manifest: str, workspace: str, run_id: str, checkpoint: str
) -> None:
    """Trains in this process; raises as `training_words` and `vitdet.train` do."""
    from vitdet.stages import train_tracked

    config = _checked(configs, name, manifest)
    if not is_trained(workspace, name, run_id):
        train_tracked(
            config,
            name,
            training_folder(workspace, name, run_id),
            weights=weights_folder(workspace),
            group=run_id,
        )
    collect(workspace, name, run_id, checkpoint)


def evaluate(
    checkpoint: str,
    configs: str,
    name: str,
    manifest: str,
    workspace: str,
    figures: str,
) -> dict[str, float]:
    """The detector's figures by name, also in MLflow; writes them with what they belong to, as `judge` reads them."""
    from vitdet.evaluation.evaluator import evaluate as measure
    from vitdet.stages import log_evaluation

    config = _checked(configs, name, manifest)
    metrics = measure(checkpoint, config=config)
    run_id = log_evaluation(Path(checkpoint), metrics, config.tracking.uri, runs_folder(workspace))
    write_json(
        figures,
        {
            "name": name,
            "dataset_digest": _read(manifest)["digest"],
            "run_id": run_id,
            "metrics": metrics,
        },
    )
    return metrics


def judge(figures: str, configs: str, name: str, workspace: str, verdict: str) -> tuple[bool, str]:
    """(whether the detector beats the registry's champion, why); writes both beside the figures."""
    from vitdet.tracking import champion

    row, settings = _read(figures), _config(configs, name).tracking
    found = champion.judge(
        row["metrics"].get("box_ap"),
        row["dataset_digest"],
        uri=settings.uri,
        folder=runs_folder(workspace),
        model_name=settings.model_name,
    )
    write_json(verdict, {**row, "passed": found.passed, "reason": found.reason})
    return found.passed, found.reason


def register(checkpoint: str, figures: str, configs: str, name: str, workspace: str) -> str:
    """Registers the detector, makes it the champion if it is still better, and says so in one line."""
    from vitdet.stages import register_checkpoint
    from vitdet.tracking import champion

    row, settings, folder = _read(figures), _config(configs, name).tracking, runs_folder(workspace)
    model, version = register_checkpoint(
        Path(checkpoint), settings, row["metrics"], folder, "candidate"
    )
    found = champion.promote(
        version,
        row["metrics"].get("box_ap"),
        row["dataset_digest"],
        uri=settings.uri,
        folder=folder,
        model_name=model,
    )
    return f"{model}, version {version}{f' ({champion.ALIAS})' if found.passed else ''}: {found.reason}"


def compare(verdicts: Sequence[str], configs: str, workspace: str, run_id: str, table: str) -> str:
    """The table of all recipes in Markdown, also in MLflow's parent run; writes it to the file `table`."""
    from vitdet.tracking import comparison

    settings = _all(configs)[0].tracking
    rows = [_read(path) for path in verdicts]
    text = comparison.compare(
        run_id,
        rows,
        uri=settings.uri,
        folder=runs_folder(workspace),
        experiment=settings.experiment,
        model_name=settings.model_name,
    )
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    Path(table).write_text(text)
    return text


def close_group(
    recipes: Sequence[str], overrides: Sequence[str], workspace: str, run_id: str, state: str
) -> None:
    """Ends the parent run, if there is one; state: KFP's word for how the pipeline ended."""
    from vitdet.tracking import comparison

    try:
        settings = load_config(recipes[0], overrides).tracking
    except (ValueError, FileNotFoundError, IndexError):
        return  # for this the first step ended the run, so that no parent was made
    comparison.close_group(
        run_id,
        state,
        uri=settings.uri,
        folder=runs_folder(workspace),
        experiment=settings.experiment,
    )


def weights_folder(workspace: str) -> Path:
    """Where the initial weights lie."""
    return Path(workspace) / "weights"


def runs_folder(workspace: str) -> Path:
    """Where the trainings lie, and MLflow's store if no server is named."""
    return Path(workspace) / "runs"


def training_folder(workspace: str, name: str, run_id: str) -> Path:
    """A folder for each training of each pipeline run, the same for a step that is retried.

    Also one that version 0.1 began under its own digest of the config, if there is one.
    """
    run, (recipe, _, digits) = run_id[:8], name.rpartition("-")
    folder = runs_folder(workspace) / f"{name}-{run}"
    if not folder.exists():
        for other in runs_folder(workspace).glob(
            f"{glob.escape(recipe)}-????????-{run}/config.yaml"
        ):
            config = load_config(other)
            old = (legacy_digest(config) or "")[:8]
            if digest(config)[:8] == digits and other.parent.name == f"{recipe}-{old}-{run}":
                return other.parent
    return folder


def _placed(config: Config, workspace: Path) -> Config:
    """The config with the relative paths of data and weights put below the workspace."""
    init = config.train.init
    train = replace(config.train, init=str(workspace / init)) if Path(init).suffix else config.train
    return replace(
        config, data=replace(config.data, root=str(workspace / config.data.root)), train=train
    )


def _check_comparable(first: Config, other: Config, name: str, other_name: str) -> None:
    ours, theirs = flatten(first), flatten(other)
    differing = [
        f"{key} is {theirs[key]}, not {ours[key]}" for key in COMPARED if ours[key] != theirs[key]
    ]
    if differing:
        raise ValueError(
            f"{other_name} and {name} cannot be compared: of {other_name} {'; '.join(differing)}; "
            "run them one by one, or set the same for both"
        )


def _checked(configs: str, name: str, manifest: str) -> Config:
    from vitdet.data.fingerprint import verify

    config = _config(configs, name)
    verify(_read(manifest), config.data)
    return config


def _config(configs: str, name: str) -> Config:
    return load_config(Path(configs) / f"{name}.yaml")


def _all(configs: str) -> list[Config]:
    return [load_config(path) for path in sorted(Path(configs).glob("*.yaml"))]


def _read(path: str) -> dict:
    return json.loads(Path(path).read_text())
