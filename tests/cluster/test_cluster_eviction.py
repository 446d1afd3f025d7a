"""Training jobs survive the eviction of their step's pods, and end with the pipeline run.

The events are those of Argo (workflow/controller of v3.7) and of Kubeflow's Terminate and Retry
(backend/src/common/util of Pipelines 2.17). Pod conditions that the tests' API server is too old for
are written as in pkg/kubelet/nodeshutdown of Kubernetes 1.31.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest

from components.launcher.launch import clean_up_jobs
from components.launcher.templates import job_name
from tests.cluster.test_cluster_failures import gone, running, script, write_status
from tests.helpers.cluster import PIPELINE_RUN, Scene, kubectl, on_cluster, wait_until

pytestmark = on_cluster


class Training:
    """A job of two pods, and the step's attempts that follow it."""

    def __init__(self, made: Scene, recipe: str) -> None:
        self.made, self.recipe, self.run = made, recipe, f"run-{recipe}"
        self.attempts = self.workflows = 0
        self.follow()
        running(made, recipe)
        self.pods = self.uids()
        assert len(self.pods) == 2

    def uids(self) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.made.pods(self.recipe)}

    def follow(self, attempt: int | None = None) -> None:
        """Start the next attempt and wait until it follows the job."""
        self.pod = f"step-{self.recipe}-{self.attempts}"
        number = self.attempts if attempt is None else attempt
        environment = self.made.step_pod(self.pod, self.run, number)
        self.attempts += 1
        self.launcher = self.made.start(script(), ["echo on; sleep 900"], self.recipe, environment)
        for line in self.launcher.stdout:
            if line.startswith("launcher: created ") or "following it" in line:
                return
        raise AssertionError("the launcher has ended")

    def end(self, number: int) -> str:
        """Send the launcher a signal; return the rest of its output."""
        self.launcher.send_signal(number)
        output, _ = self.launcher.communicate(timeout=120)
        assert self.launcher.returncode == (143 if number == signal.SIGTERM else -number)
        return output

    def kubectl(self, *words: str) -> str:
        return kubectl(*words, "-n", self.made.namespace)

    def patch(self, kind: str, name: str, change: dict) -> None:
        self.kubectl(f"patch {kind} {name} --type=merge -p", json.dumps(change))

    def owners(self) -> list[str]:
        job = self.made.job(self.recipe)
        return [owner["uid"] for owner in job["metadata"].get("ownerReferences") or []]


def evicted(training: Training) -> None:
    """The API server marks the pod as deleted, then the kubelet sends SIGTERM."""
    training.patch("pod", training.pod, {"metadata": {"finalizers": ["vitdet/test"]}})
    training.kubectl(f"delete pod {training.pod} --wait=false")
    assert "its run continues" in training.end(signal.SIGTERM)
    training.patch("pod", training.pod, {"metadata": {"finalizers": None}})
    training.follow()


def node_gone(training: Training) -> None:
    """The node and its process disappear at once; the pod is deleted later."""
    training.end(signal.SIGKILL)
    training.kubectl(f"delete pod {training.pod} --force --grace-period=0 --wait=false")
    training.follow()


def killed(training: Training) -> None:
    """The kernel kills the process for lack of memory; the pod is not deleted."""
    training.end(signal.SIGKILL)
    training.follow()


def killed_soon_after_sigterm(training: Training) -> None:
    """Argo ends the step: SIGKILL follows SIGTERM within about a second."""
    for seconds in (0.0, 0.3, 1.0):
        training.launcher.send_signal(signal.SIGTERM)
        time.sleep(seconds)
        training.launcher.kill()
        training.launcher.communicate(timeout=120)
        training.follow()


def node_shut_down(training: Training) -> None:
    """The kubelet sends SIGTERM and then writes the status; the pod is not deleted."""
    assert "its run continues" in training.end(signal.SIGTERM)
    text = "Pod was terminated in response to imminent node shutdown."
    status = {"phase": "Failed", "reason": "Terminated", "message": text}
    target = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    write_status(training.made, training.pod, {**status, "conditions": [target]})
    training.follow()


def failed_and_collected(training: Training) -> None:
    """No retries are left: the exit handler runs, the Workflow is deleted, the user retries."""
    training.end(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(training.made.kubeconfig))
        exit_handler = f"exit-{training.recipe}-{training.attempts}"
        for key, value in training.made.step_pod(exit_handler, training.run).items():
            patch.setenv(key, value)
        deleted, left = clean_up_jobs(PIPELINE_RUN, "pytorchjob", succeeded=False)
    name = job_name(PIPELINE_RUN, training.recipe)
    (told,) = [line for line in left if line.startswith(name)]
    assert deleted == [] and "is kept. Retrying the run follows the job again" in told
    assert f"terminate {PIPELINE_RUN}" in told and training.owners() == []
    training.patch("workflow", training.run, {"status": {"phase": "Failed"}})
    training.kubectl(f"delete workflow {training.run}")
    wait_until(lambda: exit_handler not in training.kubectl("get pods -o name"))
    training.follow(attempt=0)
    workflow = json.loads(training.kubectl(f"get workflow {training.run} -o json"))
    assert training.owners() == [workflow["metadata"]["uid"]]


def terminated(training: Training) -> None:
    training.patch("workflow", training.run, {"spec": {"activeDeadlineSeconds": 0}})
    assert "(its run has been terminated); deleting" in training.end(signal.SIGTERM)


def terminated_by_argo(training: Training) -> None:
    training.patch("workflow", training.run, {"spec": {"shutdown": "Terminate"}})
    assert "(its run is being shut down); deleting" in training.end(signal.SIGTERM)


def deleted_while_it_runs(training: Training) -> None:
    training.kubectl(f"delete workflow {training.run} --wait=false")
    wait_until(lambda: training.pod not in training.kubectl("get pods -o name"))
    training.launcher.send_signal(signal.SIGTERM)
    training.launcher.communicate(timeout=120)


@pytest.mark.parametrize(
    ("times", "ending"),
    [(1, terminated), (1, terminated_by_argo), (5, deleted_while_it_runs)],
    ids=["terminated", "terminated by argo", "five times, then deleted"],
)
def test_a_training_run_outlives_its_launchers(
    live: Scene, times: int, ending: Callable[[Training], None]
) -> None:
    training = Training(live, ending.__name__.replace("_", "-"))
    kills = (node_gone, killed, killed_soon_after_sigterm)
    for event in (evicted, *kills, node_shut_down, failed_and_collected):
        for _ in range(times):
            event(training)
            assert training.uids() == training.pods, event.__name__
    assert len(training.owners()) == 1
    ending(training)
    gone(live, training.recipe)


def test_the_exit_handler_of_a_terminated_run_deletes_its_jobs(live: Scene) -> None:
    training = Training(live, "stopped-run")
    training.end(signal.SIGKILL)
    training.patch("workflow", training.run, {"spec": {"shutdown": "Stop"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(live.kubeconfig))
        for key, value in live.step_pod("exit-stopped", training.run).items():
            patch.setenv(key, value)
        deleted, _ = clean_up_jobs(PIPELINE_RUN, "pytorchjob", succeeded=False)
    assert deleted == [job_name(PIPELINE_RUN, training.recipe)]
    gone(live, training.recipe)
