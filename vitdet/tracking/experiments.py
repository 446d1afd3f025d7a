"""The experiment that a run belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.tracking.address import hide_credentials
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
        number = _checked(experiment.experiment_id, uri)
        if experiment.lifecycle_stage == "deleted":
            raise RefusedError(
                f"the MLflow experiment {name!r} was deleted; restore it with `mlflow experiments "
                f"restore -x {number}`, or set {setting} to another name"
            )
        return number

    return create(found, lambda: client.create_experiment(name, place))


def check_server(client: MlflowClient, uri: str) -> None:
    """Raise RefusedError if the service at `uri` is not MLflow, e.g. answers `{}` to every request."""
    experiment = client.get_experiment_by_name("connection check")  # usually there is none
    if experiment is not None:
        _checked(experiment.experiment_id, uri)


def _checked(number: str, uri: str) -> str:
    if not number:
        raise RefusedError(
            f"{hide_credentials(uri)} is not an MLflow server: its responses lack the requested fields; "
            "set tracking.uri or MLFLOW_TRACKING_URI to http://HOST:PORT of an MLflow server"
        )
    return number
