"""A pipeline run's parent run in MLflow, and the table that compares its training runs."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vitdet.config import Config, flatten, load_config, save_config
from vitdet.config.digest import training_settings
from vitdet.stages.outcomes import read_outcomes
from vitdet.stages.plan import read_configs
from vitdet.stages.workspace import registry, run_folder, runs_folder

COMPARISON = "comparison.html"  # file in a pipeline run's folder if no training run failed


def start_parent_run(settings: str, workspace: str, run_id: str) -> str:
    """Create the MLflow run that groups the training runs; return its server and ID as text.

    Also saves the configs to the pipeline run's folder, for `compare_finished`. Raises
    ConnectionError if MLflow does not respond.
    """
    from vitdet.tracking import comparison
    from vitdet.tracking.address import hide_credentials, tracking_uri

    loaded, folder = read_configs(settings), runs_folder(workspace)
    for name, config in loaded.items():
        save_config(config, run_folder(workspace, run_id) / f"{name}.yaml")
    tracking = next(iter(loaded.values())).tracking
    parent = comparison.start_parent_run(
        run_id, list(loaded), uri=tracking.uri, folder=folder, experiment=tracking.experiment
    )
    uri = hide_credentials(tracking_uri(tracking.uri, folder))
    return f"MLflow: {uri}, parent run {parent}"


def compare(
    verdicts: Sequence[str], configs: str, workspace: str, run_id: str, table: str, links: str
) -> str:
    """Return the table of all training runs in Markdown, and log it to the parent run.

    Also writes the table as HTML to the file `table`, and as Markdown with links to MLflow pages to
    the file `links`.
    """
    rows = [json.loads(Path(path).read_text()) for path in verdicts]
    text, linked = _compare(read_configs(configs), rows, {}, workspace, run_id, table)
    Path(links).parent.mkdir(parents=True, exist_ok=True)
    Path(links).write_text(linked)
    return text


def compare_finished(workspace: str, run_id: str, table: str) -> str:
    """Return the table after a failure, with the reasons why training runs did not succeed.

    Also writes the table as HTML to the file `table`. Returns "" if all training runs succeeded and
    `compare` has created the table, or if no training run was planned.
    """
    folder = run_folder(workspace, run_id)
    configs = read_configs(folder)
    rows, failures = read_outcomes(workspace, list(configs), run_id)
    if configs and (failures or not (folder / COMPARISON).is_file()):
        return _compare(configs, rows, failures, workspace, run_id, table)[0]
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    if configs:
        shutil.copyfile(folder / COMPARISON, table)
    else:
        Path(table).write_text("<p>No training run was started.</p>\n")
    return ""


def end_parent_run(
    recipes: Sequence[str], overrides: Sequence[str], workspace: str, run_id: str, state: str
) -> None:
    """End the parent run, if there is one. state: the pipeline run's state in KFP."""
    from vitdet.tracking import comparison

    try:
        settings = load_config(recipes[0], overrides).tracking
    except (ValueError, FileNotFoundError, IndexError):
        return  # the first step failed with this error, so there is no parent run
    folder = runs_folder(workspace)
    comparison.end_parent_run(
        run_id, state, uri=settings.uri, folder=folder, experiment=settings.experiment
    )


def _compare(
    configs: dict[str, Config],
    rows: Sequence[dict],
    failures: dict[str, str],
    workspace: str,
    run_id: str,
    table: str,
) -> tuple[str, str]:
    from vitdet.tracking import comparison

    config = next(iter(configs.values()))
    text, linked, html = comparison.compare(
        run_id,
        rows,
        failures,
        _varied_settings(configs),
        experiment=config.tracking.experiment,
        **registry(config, workspace),
    )
    complete = [] if failures else [run_folder(workspace, run_id) / COMPARISON]
    for path in (Path(table), *complete):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html)
    return text, linked


def _varied_settings(configs: dict[str, Config]) -> dict[str, dict[str, str]]:
    """Return, for each training run, the settings whose values differ among runs of its recipe.

    Settings that do not affect the result of a training run are omitted.
    """
    recipes = defaultdict(list)
    for name in configs:
        recipes[name.rpartition("-")[0]].append(name)
    varied = {}
    for names in recipes.values():
        settings = [training_settings(configs[name]) for name in names]
        keys = [key for key in settings[0] if len({setting[key] for setting in settings}) > 1]
        for name in names:
            values = flatten(configs[name])
            varied[name] = {key: str(values[key]) for key in keys}
    return varied
