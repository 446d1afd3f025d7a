"""Where a run is created: its experiment, and the run of a pipeline that becomes its parent.

The MLflow plugin of Kubeflow Pipelines (since 2.17, with its setting `injectUserEnvVars`) gives
each step MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_ID and MLFLOW_RUN_ID, the MLflow run of the step,
nested in the MLflow run of the pipeline run (kubeflow/pipelines 2.17.0,
backend/src/v2/common/plugins/mlflow/handler.go). The MLflow run of the pipeline run becomes the
parent of the training runs, in its experiment, so that MLflow shows one tree. The plugin ends this
run.
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
# tag of the plugin: backend/src/apiserver/plugins/mlflow/run_start.go
OWNER = "kfp.pipeline_run_id"
DEPTH = 8  # longest path from a step's run to the pipeline's run, one more per loop around it


def experiment_id(
    client: Client, folder: Path, name: str, setting: str = "tracking.experiment"
) -> str:
    """Return the id of the experiment; create it if it does not exist.

    folder: parent of mlartifacts/, the artifacts of an SQLite store. setting: the setting with the
    name, for messages. Raises RefusedError if the experiment was deleted, or if the service is not
    MLflow.
    """
    is_file = client.uri.startswith("sqlite:")
    place = (Path(folder).resolve() / "mlartifacts").as_uri() if is_file else None

    def found() -> str | None:
        experiment = _experiment(client, name)
        if experiment is None:
            return None
        number = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            raise RefusedError(
                f"the MLflow experiment {name!r} was deleted; restore it with `mlflow experiments "
                f"restore -x {number}`, or set {setting} to another name"
            )
        return number

    return create(found, lambda: client.create_experiment(name, place))


def check_server(client: Client) -> None:
    """Raise RefusedError if the service is not MLflow, e.g. if it responds to every request with
    `{}`.
    """
    _experiment(client, "connection check")  # usually there is none


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
    """Return the plugin's run of the pipeline run `group`; None without the plugin.

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
