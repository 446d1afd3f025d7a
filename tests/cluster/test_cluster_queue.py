"""A job in a Kueue queue, and the progress of its training, on a real API server.

The test acts as Kueue: it suspends the job and writes a Workload with the label and conditions of
Kueue's sources, which tests/cluster/test_queue.py cites.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from components.launcher.progress import PROGRESS
from components.launcher.templates import FAILURE, job_name
from tests.cluster.test_cluster_failures import meanwhile
from tests.cluster.test_queue import ADMITTED, UNCOVERED, workload
from tests.helpers.cluster import (
    PATIENT,
    PIPELINE_RUN,
    Scene,
    definition,
    kubectl,
    on_cluster,
    template,
    wait_until,
)

pytestmark = on_cluster
LINE = "step 40/100  0:30 left  12.3 images/s  loss 3.500 (cls 1.250)"


@pytest.fixture(scope="module")
def live(live: Scene) -> Scene:
    given = definition("kueue.x-k8s.io", "v1beta2", "workloads", "Workload")
    kubectl("apply -f -", given=given)
    kubectl("wait --for=condition=established crd/workloads.kueue.x-k8s.io")
    return live


def queued() -> str:
    job = yaml.safe_load(template(script=True))
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "vitdet"
    job["spec"]["runPolicy"]["suspend"] = True
    return yaml.safe_dump(job)


def test_the_queues_reason_is_logged_and_the_progress_is_annotated(live: Scene) -> None:
    name = job_name(PIPELINE_RUN, "queued")
    where = ("-n", live.namespace)

    def write(found: dict) -> None:
        uid = wait_until(lambda: live.job("queued"))["metadata"]["uid"]
        metadata = {"name": name, "labels": {"kueue.x-k8s.io/job-uid": uid}}
        about = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "metadata": metadata}
        kubectl("apply", *where, "-f", "-", given={**about, **found})

    def kueue() -> None:
        write(workload(UNCOVERED))
        wait_until(lambda: any("add the resource to coveredResources" in x for x in live.lines))
        write(workload(*ADMITTED))
        resume = json.dumps({"spec": {"runPolicy": {"suspend": False}}})
        kubectl("patch pytorchjob", *where, name, "--type=merge", "-p", resume)

    with meanwhile(kueue):
        live.launch(queued(), [f"echo '{LINE}'; sleep 3"], "queued")
    assert LINE in live.lines and not any("is not queued" in line for line in live.lines)
    progress = json.loads(live.job("queued")["metadata"]["annotations"][PROGRESS])
    assert (progress["step"], progress["steps"], progress["images_per_second"]) == (40, 100, 12.3)


def test_a_job_without_a_workload_fails_the_step_and_stays_suspended(live: Scene) -> None:
    with pytest.raises(RuntimeError, match="Kueue has no Workload for it.*since Kueue 0.19"):
        live.launch(queued(), ["true"], "unknown", timeouts=replace(PATIENT, operator=3))
    job = live.job("unknown")
    assert job["spec"]["runPolicy"]["suspend"] and not live.pods("unknown")
    # the job is another one, which Kueue does not resume
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vitdet-none"
    assert "Kueue has no Workload" in job["metadata"]["annotations"][FAILURE]
    with pytest.raises(RuntimeError, match="Kueue has no Workload for it"):
        live.launch(queued(), ["true"], "unknown")  # a retry of the step does not train
