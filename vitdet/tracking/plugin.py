"""The run that the MLflow plugin of Kubeflow Pipelines (since 2.17) makes for a pipeline run.

With the plugin's setting `injectUserEnvVars`, each step has MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_ID and
MLFLOW_RUN_ID; the latter is a run of the step, below a run of the pipeline run (kubeflow/pipelines 2.17.0,
backend/src/v2/common/plugins/mlflow/handler.go). That one becomes the parent of the trainings, in its
experiment, so that MLflow has one tree. The plugin ends it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vitdet.tracking.requests import INVALID, MISSING, RefusedError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
OWNER = (
    "kfp.pipeline_run_id"  # tag of the plugin: backend/src/apiserver/plugins/mlflow/run_start.go
)
DEPTH = 8  # runs from a step's to the pipeline's: one, and one for each loop around the step


def plugin_run(client: MlflowClient, group: str) -> Run | None:
    """Return the plugin's run of the pipeline run `group`; None without the plugin.

    An MLFLOW_RUN_ID of anything else, as of a shell or another pipeline run, is not used. Raises what
    MLflow's client raises if the server does not respond.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID", "") if group else ""
    for _ in range(DEPTH):
        if not run_id:
            return None
        try:
            run = client.get_run(run_id)
        except (LookupError, RefusedError):
            return None
        except Exception as error:  # of a client that does not translate its errors
            if getattr(error, "error_code", None) not in MISSING | INVALID:
                raise
            return None
        if run.data.tags.get(OWNER) == group:
            return run
        run_id = run.data.tags.get(PARENT, "")
    return None
