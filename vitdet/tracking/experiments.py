"""The experiment and the parent run of a new MLflow run.

The MLflow plugin of Kubeflow Pipelines (since 2.17, with its setting `injectUserEnvVars`) creates
and ends an MLflow run for the pipeline run, with a nested run for each step. In each step, it sets
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_ID and the step's MLFLOW_RUN_ID (kubeflow/pipelines 2.17.0,
backend/src/v2/common/plugins/mlflow/handler.go). The training runs become children of the pipeline
run's MLflow run, in the same experiment, so that MLflow shows one tree.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.tracking.address import hide_credentials
from vitdet.tracking.client import Client, RefusedError, create

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run

PARENT = "mlflow.parentRunId"
# tag that the plugin sets: backend/src/apiserver/plugins/mlflow/run_start.go
OWNER = "kfp.pipeline_run_id"
DEPTH = 8  # maximum levels of runs from a step to the pipeline; each loop adds a level


def find_experiment(
    client: Client, folder: Path, name: str, setting: str = "tracking.experiment"
) -> str:
    """Return the ID of the experiment; create the experiment if it does not exist.

    folder: its subfolder mlartifacts holds the artifacts of an SQLite store. setting: the setting
    that contains the name, for messages. Raises RefusedError if the experiment was deleted, or if
    the server is not MLflow.
    """
    is_file = client.uri.startswith("sqlite:")
    artifacts = (Path(folder).resolve() / "mlartifacts").as_uri() if is_file else None

    def find() -> str | None:
        experiment = _experiment(client, name)
        if experiment is None:
            return None
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            raise RefusedError(
                f"the MLflow experiment {name!r} was deleted; restore it with `mlflow experiments "
                f"restore -x {experiment_id}`, or set {setting} to another name"
            )
        return experiment_id

    return create(find, lambda: client.create_experiment(name, artifacts))


def check_server(client: Client) -> None:
    """Raise RefusedError if the server is not MLflow, e.g. if all its responses are `{}`."""
    _experiment(client, "connection check")  # an experiment with this name need not exist


def _experiment(client: Client, name: str) -> Experiment | None:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and not experiment.experiment_id:
        raise RefusedError(
            f"{hide_credentials(client.uri)} is not an MLflow server: its responses lack the "
            "requested fields; set tracking.uri or MLFLOW_TRACKING_URI to http://HOST:PORT of an "
            "MLflow server"
        )
    return experiment


def plugin_run(client: Client, group: str) -> Run | None:
    """Return the MLflow plugin's run for the pipeline run `group`; None without the plugin.

    An MLFLOW_RUN_ID from any other source, such as a shell or another pipeline run, is ignored.
    Raises ConnectionError if the server does not respond.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID", "") if group else ""
    for _ in range(DEPTH):
        if not run_id:
            return None
        try:
            run = client.get_run(run_id)
        except (LookupError, RefusedError):
            return None
        if run.data.tags.get(OWNER) == group:
            return run
        run_id = run.data.tags.get(PARENT, "")
    return None
