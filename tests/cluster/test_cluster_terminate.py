"""`python -m pipeline terminate` on a real API server deletes the run's jobs of both kinds, and no other jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from components.launcher.templates import KINDS, RUN, label
from tests.helpers.cluster import PIPELINE_RUN, kubectl, on_cluster, scene, template
from tests.helpers.kubeflow import Handler, Kubeflow, command, serving

pytestmark = on_cluster
OTHER = "11111111-1f3e-4b7e-9b1b-0d6c35f7a001"
OF_THE_OTHER = "pytorchjob.kubeflow.org/c"


def jobs(namespace: str) -> list[str]:
    kinds = ",".join(f"{kind.plural}.{kind.group}" for kind in KINDS.values())
    return sorted(kubectl(f"get {kinds} -n {namespace} -o name").split())


def make(namespace: str, kind: str, run: str, name: str) -> None:
    job = yaml.safe_load(template(kind))
    job["metadata"].update(name=name, namespace=namespace, labels={RUN: label(run)})
    kubectl("create -f -", given=job)


def test_terminate_deletes_only_the_jobs_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scene(tmp_path, node=False, operator=False) as made, serving(Kubeflow()) as kubeflow:
        make(made.namespace, "pytorchjob", PIPELINE_RUN, "a")
        make(made.namespace, "trainjob", PIPELINE_RUN, "b")
        make(made.namespace, "pytorchjob", OTHER, "c")
        experiment = {"experiment_id": "e", "display_name": "e", "namespace": made.namespace}
        kubeflow.kept["experiments"] = [experiment]
        kubeflow.kept["runs"] = [{"run_id": PIPELINE_RUN, "experiment_id": "e", "state": "RUNNING"}]

        def end(handler: Handler) -> None:
            """End the run, whose step creates another job just before it is stopped."""
            assert kubeflow.kept["runs"][0]["state"] == "CANCELING"
            assert jobs(made.namespace) == [OF_THE_OTHER]
            make(made.namespace, "pytorchjob", PIPELINE_RUN, "late")
            kubeflow.kept["runs"][0]["state"] = "CANCELED"
            handler.serve()

        kubeflow.plan[f"GET /runs/{PIPELINE_RUN}"] = [Handler.serve, end]
        pipeline = command(kubeflow, monkeypatch, capsys)
        code, out, said = pipeline("terminate", PIPELINE_RUN, "--every", 0.1)
        assert (code, said) == (0, "")
        context = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())["current-context"]
        place = f"deleting the run's training jobs in namespace {made.namespace} of the cluster of context {context}\n"
        assert "state RUNNING, now ending\n" in out
        assert out.endswith(
            f"{place}deleted a\ndeleted b\n"
            "waiting up to about 300 s for the run to end, then checking again\ndeleted late, created in the meantime\n"
        )
        assert jobs(made.namespace) == [OF_THE_OTHER]
        code, out, _ = pipeline("terminate", PIPELINE_RUN)
        assert code == 0 and out.endswith(f"{place}found no training jobs to delete\n")
        experiment["namespace"] = "of-another-cluster"
        code, _, said = pipeline("terminate", PIPELINE_RUN)
        assert code == 1
        assert (
            f"the cluster of context {context} has no namespace of-another-cluster; pass the "
            "namespace of the run's pods with --namespace"
        ) in said
