"""Step retries and the end of a run on a real API server: which jobs are recreated, kept and deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.launcher.launch import delete_jobs
from components.launcher.templates import FAILURE, job_name
from tests.cluster.test_cluster_failures import IMAGE, meanwhile, script, worker, write_status
from tests.helpers.cluster import (
    PIPELINE_RUN,
    Scene,
    job_containers,
    kubectl,
    on_cluster,
    scene,
    template,
    wait_until,
)

pytestmark = on_cluster


def failing() -> str:
    """Return a job whose containers are not restarted."""
    job = yaml.safe_load(script())
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["restartPolicy"] = "Never"
    return yaml.safe_dump(job)


def refused(
    made: Scene,
    recipe: str,
    text: str,
    args: list[str],
    step: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Return the error with which the step in this pod fails."""
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError) as raised:
        made.launch(text, args, recipe)
    return str(raised.value)


def test_a_failed_job_is_recreated_when_the_user_retries_the_run(
    live: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = live.step_pod("failing-0"), live.step_pod("failing-1", attempt=1)
    fails = "if [ $RANK = 1 ]; then echo no such weights; exit 3; fi; sleep 60"
    args = [f"echo one try >> /data/tries; {fails}"]
    error = refused(live, "failing", failing(), args, first, monkeypatch)
    name = job_name(PIPELINE_RUN, "failing")
    assert error.endswith(
        f"cause: pod {name}-worker-0 on node {live.node.name}: Error, exit code 3\n"
        "last lines of its log:\n  no such weights"
    )
    job = live.job("failing")
    assert job["metadata"]["annotations"][FAILURE] == error

    assert refused(live, "failing", failing(), args, second, monkeypatch) == error
    assert live.job("failing")["metadata"]["uid"] == job["metadata"]["uid"]
    # the pod is kept for inspection
    assert "no such weights" in kubectl(f"logs -n {live.namespace} {name}-worker-0")
    assert (live.volume / "tries").read_text() == "one try\n" * 2  # one per pod

    # Kubeflow's `Retry` deletes the pods of failed steps and counts their attempts from 0 again
    # (backend/src/common/util/workflow.go).
    kubectl(f"delete pod -n {live.namespace} failing-0 failing-1 --wait=false")
    for key, value in live.step_pod("failing-anew").items():
        monkeypatch.setenv(key, value)
    live.launch(failing(), ["echo mended"], "failing")
    assert "mended" in live.lines


def test_a_job_that_could_not_start_is_kept_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene(tmp_path, node=False) as still:
        step = still.step_pod("step")
        with meanwhile(lambda: write_status(still, worker(still, "image"), IMAGE)):
            error = refused(still, "image", script(), ["true"], step, monkeypatch)
        assert error.endswith('Back-off pulling image "vitdet:typo"; the job is suspended')
        wait_until(lambda: not still.pods("image"))
        retry = still.step_pod("retry", attempt=1)
        again = refused(still, "image", script(), ["true"], retry, monkeypatch)
        assert again == error and not still.pods("image")
        monkeypatch.setenv("KUBECONFIG", str(still.kubeconfig))
        assert delete_jobs(PIPELINE_RUN) == ([job_name(PIPELINE_RUN, "image")], [])
        wait_until(lambda: still.job("image") is None)


def test_the_end_of_a_run_deletes_only_running_jobs(
    live: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "11111111-1f3e-4b7e-9b1b-0d6c35f7a002"
    live.launch(script(), ["echo last words"], "ended", run=run)
    given = yaml.safe_load(template())
    labels = {"vitdet/run": run}
    given["metadata"] = {"name": "going-on", "namespace": live.namespace, "labels": labels}
    for container in job_containers(given):
        container.update(command=["sh", "-c"], args=["echo on; sleep 60"])
    kubectl("create -f -", given=given)
    wait_until(lambda: "going-on-master-0" in live.node.containers)
    monkeypatch.setenv("KUBECONFIG", str(live.kubeconfig))
    deleted, left = delete_jobs(run)
    name = job_name(run, "ended")
    assert deleted == ["going-on"] and len(left) == 1
    assert left[0].startswith(f"{name}: succeeded; kept, with the logs")
    assert " UTC" in left[0]
    assert "last words" in kubectl(f"logs -n {live.namespace} {name}-master-0")
    wait_until(lambda: "going-on" not in kubectl(f"get pytorchjobs -n {live.namespace} -o name"))
