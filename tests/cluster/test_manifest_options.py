"""Options of the manifests that add objects: GPU types, reservations, MLflow's host name outside the cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cluster.test_manifests import OVERLAYS, build, overlay, parts, pools
from tests.helpers.manifests import kustomize, needs_kubectl, problems
from vitdet.cli import parser as vitdet_parser

pytestmark = needs_kubectl


def test_a_gpu_type_that_a_cloud_does_not_offer_is_an_error(copy: Path) -> None:
    chosen = copy / "overlays" / "gke" / "values" / "kustomization.yaml"
    chosen.write_text(chosen.read_text().replace("components/h100", "components/a10"))
    with pytest.raises(ValueError, match="data.gke"):
        kustomize(copy / "overlays" / "gke" / "cluster")


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        (
            "gke",
            "ComputeClass",
            {"affinity": "Specific", "specific": [{"name": "my-gpus", "project": "p-1"}]},
        ),
        ("eks", "EC2NodeClass", [{"id": "cr-5"}]),
    ],
)
def test_a_pool_may_use_a_reservation(name: str, kind: str, wanted: object, copy: Path) -> None:
    file = copy / "overlays" / name / "values" / "values.yaml"
    values = yaml.safe_load(file.read_text())
    values["data"] |= {"reservation": "my-gpus" if name == "gke" else "cr-5"}
    values["data"] |= {"reservationProject": "p-1"} if name == "gke" else {}
    file.write_text(yaml.safe_dump(values))
    pool = [f"node-pools/{name}", f"node-pools/{name}/reservation", "components/values"]
    documents = build(copy, name, ["cluster"], pool)
    made = {document["kind"]: document.get("spec") for document in documents}
    assert wanted == (
        made[kind]["priorities"][0]["reservations"]
        if name == "gke"
        else made[kind]["capacityReservationSelectorTerms"]
    )
    if name == "eks":
        requirements = made["NodePool"]["template"]["spec"]["requirements"]
        assert {"karpenter.sh/capacity-type": ["reserved"]}.items() <= {
            requirement["key"]: requirement["values"] for requirement in requirements
        }.items()
    others = [document for part in parts(name)[1:] for document in overlay(name, part)]
    assert problems([*documents, *others], overlay(name), pools(name)) == []


@pytest.mark.parametrize("name", ["kind", "onprem"])
def test_mlflow_uses_a_port_of_every_release_of_kubeflows_object_store(name: str) -> None:
    """Service seaweedfs: 8333 since Pipelines 2.15 (Kubeflow 1.11), also 9000 since 2.16."""
    (server,) = [item for item in overlay(name, "mlflow") if item["kind"] == "Deployment"]
    env = server["spec"]["template"]["spec"]["containers"][0]["env"]
    address = {"name": "MLFLOW_S3_ENDPOINT_URL", "value": "http://seaweedfs.kubeflow:8333"}
    assert address in env


@pytest.mark.parametrize("option", ["mlflow-ingress", "mlflow-virtualservice"])
def test_one_host_name_exposes_mlflow_outside_the_cluster(option: str, copy: Path) -> None:
    file = copy / "overlays" / "onprem" / "values" / "values.yaml"
    file.write_text(
        file.read_text()
        .replace("mlflowHost: mlflow.example.com", "mlflowHost: runs.team.org")
        .replace("mlflowNamespace: vitdet-mlflow", "mlflowNamespace: tracking")
    )
    documents = build(copy, "onprem", ["mlflow"], [f"components/{option}", "components/values"])
    assert problems(documents, [], {}) == []
    text = yaml.safe_dump_all(documents)
    assert text.count("runs.team.org") == {"mlflow-ingress": 2, "mlflow-virtualservice": 1}[option]
    assert "mlflow.example.com" not in text and "namespace: vitdet-mlflow" not in text
    if option == "mlflow-virtualservice":
        assert "host: mlflow.tracking.svc.cluster.local" in text


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_download_job_runs_commands_that_exist(name: str) -> None:
    (job,) = (document for document in overlay(name, "data") if document["kind"] == "Job")
    commands = [
        container["command"] + container["args"]
        for container in job["spec"]["template"]["spec"]["containers"]
    ]
    assert [words[:3] for words in commands] == [
        ["vitdet", "data", "coco"],
        ["vitdet", "weights", "fetch"],
    ]
    for words in commands:
        assert vitdet_parser().parse_args(words[1:]).run
