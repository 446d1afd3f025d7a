"""Failures of a TrainJob on a real API server; the pods' processes are shell scripts.

tests/cluster/test_cluster_failures.py has those of a PyTorchJob, and cites the sources of the statuses. In addition:
JobSet 0.12 reports a failure beyond the runtime's maxRestarts (pkg/controllers/failure_policy.go,
restartJobSetActionApplier, messageWithFirstFailedJob); Kueue suspends a TrainJob, before or after its admission, by
spec.suspend (pkg/controller/jobs/trainjob/trainjob_controller.go, Suspend, Unsuspend, Stop), and Trainer 2.3 then
writes the condition Suspended (pkg/controller/trainjob_controller.go, setSuspendedCondition).
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from components.launcher.client import Timeouts
from components.launcher.templates import job_name
from tests.cluster.test_cluster_failures import NO_NODE, evicted, meanwhile, write_status
from tests.conftest import ROOT
from tests.helpers.cluster import (
    PATIENT,
    PIPELINE_RUN,
    Scene,
    kubectl,
    on_cluster,
    scene,
    template,
    wait_until,
)
from tests.helpers.manifests import kustomize

pytestmark = on_cluster
INDEX = "batch.kubernetes.io/job-completion-index"


def with_runtime(made: Scene) -> Scene:
    """Apply the runtime of the manifests with a limit of one restart."""
    runtime, _ = kustomize(ROOT / "manifests/overlays/kind/trainjob")
    runtime["metadata"]["namespace"] = made.namespace
    runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] = 1
    kubectl("apply -f -", given=runtime)
    return made


@pytest.fixture(scope="module")
def live(live: Scene) -> Scene:
    return with_runtime(live)


def launch(
    made: Scene,
    recipe: str,
    words: str,
    task: dict | None = None,
    timeouts: Timeouts | None = None,
    **changes: object,
) -> None:
    job = yaml.safe_load(template("trainjob", script=True))
    job["spec"].update(changes)
    made.launch(yaml.safe_dump(job), [words], recipe, kind="trainjob", task=task, timeouts=timeouts)


def second(made: Scene, recipe: str) -> str:
    """Return the name of the second node's pod as soon as it exists."""

    def there(pod: dict) -> bool:
        about, failed = pod["metadata"], pod["status"]["phase"] == "Failed"
        return about["labels"][INDEX] == "1" and not failed and "deletionTimestamp" not in about

    pods = wait_until(lambda: [*filter(there, made.pods(recipe, kind="trainjob"))])
    return pods[0]["metadata"]["name"]


def running(made: Scene, recipe: str) -> str:
    """Return the name of the second node's pod as soon as its script has written a line."""

    def name() -> str:
        container = made.node.containers.get(found := second(made, recipe))
        return found if container and container.lines[0] else ""

    return wait_until(name)


def test_a_pod_that_keeps_failing_fails_the_step_with_its_last_lines(live: Scene) -> None:
    failing = "echo working; if [ $PET_NODE_RANK = 1 ]; then seq 100; exit 3; fi; sleep 60"
    with pytest.raises(RuntimeError) as raised:
        launch(live, "failing", failing)
    head, *tail = str(raised.value).split("\n  ")
    name = job_name(PIPELINE_RUN, "failing")
    text = (
        f"{name} failed: jobset failed due to reaching max number of restarts (first failed job: "
    )
    assert f"{text}{name}-node-0" in head and f"cause: pod {name}-node-0-1-" in head
    assert f"on node {live.node.name}: Error, exit code 3" in head
    assert tail == [str(number) for number in range(71, 101)]
    pods = [key for key in live.node.containers if key.startswith(f"{name}-node-0-1-")]
    assert len(pods) == 2  # the runtime's one restart recreated all pods
    wait_until(
        lambda: (
            {pod["status"]["phase"] for pod in live.pods("failing", kind="trainjob")} == {"Failed"}
        )
    )


def test_a_job_out_of_memory_is_not_restarted(live: Scene) -> None:
    with pytest.raises(RuntimeError) as raised:
        launch(live, "oom", "if [ $PET_NODE_RANK = 1 ]; then kill -9 $$; fi; sleep 60")
    name = job_name(PIPELINE_RUN, "oom")
    assert "OOMKilled" in str(raised.value) and f"pod {name}-node-0-1-" in str(raised.value)
    pods = [key for key in live.node.containers if key.startswith(f"{name}-node-0-1-")]
    assert len(pods) == 1


def test_an_evicted_pod_is_logged_and_all_pods_are_recreated(live: Scene) -> None:
    status, text = evicted("disk"), "Evicted: The node was low on resource: disk."
    with meanwhile(lambda: write_status(live, running(live, "evicted"), status)):
        launch(live, "evicted", "echo on; sleep 3")
    lines = [line for line in live.lines if job_name(PIPELINE_RUN, "evicted") in line]
    assert any("-node-0-1-" in line and text in line for line in lines)
    assert lines[-1].endswith(": succeeded (jobset completed successfully)")


def test_the_launcher_waits_for_a_job_that_kueue_suspends_and_preempts(live: Scene) -> None:
    name = job_name(PIPELINE_RUN, "queued")

    def suspend(value: bool) -> None:
        # with the API group, as test_cluster_versions may install another kind TrainJob meanwhile
        job = f"trainjobs.trainer.kubeflow.org/{name}"
        kubectl(
            f"patch {job} -n {live.namespace} --type=merge -p",
            json.dumps({"spec": {"suspend": value}}),
        )

    def told(times: int) -> bool:
        return (
            sum(f"{name}: suspended until a queue (Kueue)" in line for line in live.lines) == times
        )

    def queue() -> None:
        wait_until(lambda: told(1))
        time.sleep(7)  # longer than the timeouts for a node and a start
        suspend(False)
        # The launcher logs a second suspension only after it has seen the job run.
        wait_until(lambda: any(f"{name}: running" in line for line in live.lines))
        wait_until(lambda: "spoken" in live.lines)
        suspend(True)
        wait_until(lambda: told(2) and not live.pods("queued", kind="trainjob"))
        suspend(False)

    task = {
        "node_selector": {"disk": "fast"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "env": [{"name": "WORD", "value": "spoken"}],
        "volumes": [{"name": "vitdet-data", "persistentVolumeClaim": {"claimName": "vitdet-data"}}],
        "volume_mounts": [{"name": "vitdet-data", "mountPath": "/more"}],
    }
    script = "echo $WORD; if mkdir /more/life-of-$PET_NODE_RANK 2>/dev/null; then sleep 60; fi; ls /data/ > /more/seen"
    timeouts = replace(PATIENT, start=5, schedule=5)
    with meanwhile(queue):
        launch(live, "queued", script, task, timeouts, suspend=True)
    assert live.lines.count("spoken") == 2  # before the preemption, and after it
    assert "seen" in (live.volume / "seen").read_text()
    spec = live.pods("queued", kind="trainjob")[0]["spec"]
    assert spec["nodeSelector"]["disk"] == "fast" and task["tolerations"][0] in spec["tolerations"]
    assert sum("persistentVolumeClaim" in volume for volume in spec["volumes"]) == 1


def test_an_unschedulable_pod_fails_the_step_and_frees_the_queue(tmp_path: Path) -> None:
    with scene(tmp_path, node=False) as still:
        with_runtime(still)
        write = meanwhile(lambda: write_status(still, second(still, "no-node"), NO_NODE))
        with write, pytest.raises(RuntimeError) as raised:
            launch(still, "no-node", "true")
        text = "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        assert "has not been able to start for 3 s" in str(raised.value) and text in str(
            raised.value
        )
        assert any("waiting" in line and text in line for line in still.lines)
        wait_until(lambda: not still.pods("no-node", kind="trainjob"))
