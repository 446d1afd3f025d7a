"""The experiment that a run belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.tracking.requests import RefusedError, create, using

if TYPE_CHECKING:
    from mlflow import MlflowClient


def experiment_id(
    client: MlflowClient,
    uri: str,
    folder: Path,
    name: str,
    setting: str = "tracking.experiment",
) -> str:
    """Return the id of the experiment; a new one in a sqlite file keeps its artifacts in FOLDER/mlartifacts.

    setting: where its name is from. Raises RefusedError if it was deleted, and if the store can never be used.
    """
    place = (Path(folder).resolve() / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None

    def found() -> str | None:
        with using(uri):
            experiment = client.get_experiment_by_name(name)
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
