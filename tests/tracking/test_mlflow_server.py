"""The MLflow server of manifests/mlflow: its options, variables, accounts and host names."""

from __future__ import annotations

import re
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

FOLDER = ROOT / "manifests" / "mlflow"


@pytest.fixture(scope="module")
def container() -> dict:
    documents = yaml.safe_load_all((FOLDER / "server.yaml").read_text())
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.slow
def test_the_locked_mlflow_version_has_every_option_and_variable(container: dict) -> None:
    from mlflow import environment_variables
    from mlflow.cli import server

    assert container["command"] == ["mlflow", "server"]
    options = {option for parameter in server.params for option in parameter.opts}
    assert {argument.split("=")[0] for argument in container["args"]} <= options
    variables = {name.removeprefix("_") for name in vars(environment_variables)}
    variables |= {str(parameter.envvar) for parameter in server.params}
    told = {entry["name"] for entry in container["env"]}
    told |= set(re.findall(r"MLFLOW_\w+", (ROOT / "docs" / "kubeflow.md").read_text()))
    told -= {"MLFLOW_UI_URL"}  # read by vitdet, not by MLflow
    assert {name for name in told if name.startswith("MLFLOW_")} <= variables


def test_the_accounts_are_in_the_database_of_the_runs(container: dict) -> None:
    # MLflow's default file has all settings
    known = Path(find_spec("mlflow").origin).parent / "server" / "auth" / "basic_auth.ini"
    ours = ConfigParser()
    ours.read(FOLDER / "basic_auth.ini")
    settings = dict(ours["mlflow"])
    assert settings.keys() <= set(re.findall(r"(?m)^(?:# )?(\w+) = ", known.read_text()))
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert settings["database_uri"] == given["MLFLOW_BACKEND_STORE_URI"]
    user = settings["database_uri"].split("://")[1].split("@")[0]
    assert user == "mlflow", "a password has no place in a ConfigMap: libpq takes PGPASSWORD"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    path = Path(given["MLFLOW_AUTH_CONFIG_PATH"])
    assert path.name == "basic_auth.ini" and str(path.parent) in mounted


@pytest.mark.parametrize("name", ["kind", "gke", "eks", "onprem"])
def test_only_the_host_names_of_the_service_are_allowed(name: str) -> None:
    file = ROOT / "manifests" / "overlays" / name / "values" / "values.yaml"
    values = yaml.safe_load(file.read_text())["data"]
    # the host in MLFLOW_TRACKING_URI of docs/kubeflow.md, and the host of a port-forward
    service = f"mlflow.{values['mlflowNamespace']}.svc:5000"
    assert values["mlflowHosts"].split(",") == [service, "localhost:5000"]
