"""Unattended jobs on a real API server: deadline, and time to live after completion.

tests/helpers/fake_operator.py imitates the operators and cites their sources.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import yaml

from components.launcher.status import job_phase
from components.launcher.templates import KINDS, job_name
from tests.cluster.test_cluster_failures import meanwhile, running, script
from tests.cluster.test_cluster_trainjob import with_runtime
from tests.helpers.cluster import (
    PATIENT,
    PIPELINE_RUN,
    Scene,
    kubectl,
    on_cluster,
    template,
    wait_until,
)

pytestmark = on_cluster


@pytest.fixture(scope="module")
def live(live: Scene) -> Scene:
    return with_runtime(live)


def test_the_training_operator_ends_a_job_at_the_next_event_after_its_deadline(live: Scene) -> None:
    name, quiet = job_name(PIPELINE_RUN, "late"), []

    def stir() -> None:
        running(live, "late")
        time.sleep(12)
        quiet.append(job_phase(KINDS["pytorchjob"], live.job("late"))[0])
        kubectl(f"annotate pytorchjob -n {live.namespace} {name} something=happened")

    with meanwhile(stir), pytest.raises(RuntimeError) as raised:
        live.launch(script(activeDeadlineSeconds=10), ["echo on; sleep 60"], "late")
    assert quiet == ["running"]  # past its deadline, but the operator has received no event yet
    assert str(raised.value) == (
        f"PyTorchJob {name} failed: Job {name} has failed because it was active longer than specified deadline\n"
        "cause: the deadline (activeDeadlineSeconds: 10 s); the checkpoints are kept"
    )
    wait_until(lambda: not live.pods("late"))


def test_kubeflow_trainer_ends_a_job_at_its_deadline(live: Scene) -> None:
    job = yaml.safe_load(template("trainjob", script=True))
    job["spec"]["activeDeadlineSeconds"] = 2
    with pytest.raises(RuntimeError) as raised:
        live.launch(yaml.safe_dump(job), ["echo on; sleep 60"], "late", kind="trainjob")
    assert str(raised.value).split(" failed: ")[1] == (
        "TrainJob exceeded its active deadline\ncause: the deadline (activeDeadlineSeconds: 2 s); the checkpoints are kept"
    )
    wait_until(lambda: not live.pods("late", kind="trainjob"))


def test_a_job_deleted_after_its_time_to_live_has_succeeded(live: Scene) -> None:
    seldom = replace(PATIENT, poll=3)  # the job ends and is deleted between two polls
    live.launch(
        script(ttlSecondsAfterFinished=0),
        ["echo on; sleep 1; echo done > /data/complete"],
        "short",
        timeouts=seldom,
        finished=lambda: (live.volume / "complete").exists(),
    )
    wait_until(lambda: live.job("short") is None and not live.pods("short"))
    assert live.lines[-1].endswith(
        ("is gone, and its training is complete", "is successfully completed.)")
    )
