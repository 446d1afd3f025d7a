"""`python -m pipeline terminate` on a real API server: the jobs of a run are deleted, of both kinds, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.jobs import KINDS, RUN, label
from tests.cluster import PIPELINE_RUN, kubectl, on_cluster, scene, template
from tests.kubeflow import Kubeflow, command, serving

pytestmark = on_cluster
OTHER = "11111111-1f3e-4b7e-9b1b-0d6c35f7a001"


def jobs(namespace: str) -> list[str]:
    kinds = ",".join(f"{kind.plural}.{kind.group}" for kind in KINDS.values())
    return sorted(kubectl("get", kinds, "-n", namespace, "-o", "name").split())


def test_terminate_deletes_the_jobs_of_its_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    with scene(tmp_path, node=False, operator=False) as made, serving(Kubeflow()) as kubeflow:
        for kind, run, name in (("pytorchjob", PIPELINE_RUN, "a"), ("trainjob", PIPELINE_RUN, "b"),
                                ("pytorchjob", OTHER, "c")):
            job = yaml.safe_load(template(kind))
            job["metadata"].update(name=name, namespace=made.namespace, labels={RUN: label(run)})
            kubectl("create", "-f", "-", given=job)
        kubeflow.kept["experiments"] = [{"experiment_id": "e", "display_name": "e", "namespace": made.namespace}]
        kubeflow.kept["runs"] = [{"run_id": PIPELINE_RUN, "experiment_id": "e", "state": "RUNNING"}]
        pipeline = command(kubeflow, monkeypatch, capsys)
        code, out, said = pipeline("terminate", PIPELINE_RUN)
        assert (code, said) == (0, "") and kubeflow.kept["runs"][0]["state"] == "CANCELING"
        assert out == f"run {PIPELINE_RUN}: RUNNING, now ending\ndeleted a\ndeleted b\n"
        assert jobs(made.namespace) == ["pytorchjob.kubeflow.org/c"]
        code, out, _ = pipeline("terminate", PIPELINE_RUN)
        assert code == 0 and out.endswith("no training jobs of it are left\n")
