"""Terminating a run: its training jobs are shown and deleted, including jobs created in the meantime."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from components.launcher import client as kube
from components.launcher import launch as launcher
from components.launcher.progress import PROGRESS, parse
from components.launcher.templates import Kind
from tests.helpers.kubeflow import Handler, Kubeflow, Run, failing, task

RUN = "0000-run-0"


class Cluster:
    """A fake cluster; asked: (run, namespace, job kind) of each deletion; found: results of the next deletions."""

    def __init__(self) -> None:
        self.jobs: list[dict] = []
        self.asked: list[tuple[str, str, str]] = []
        self.found: list[tuple[list[str], list[str]]] = []

    def list_jobs(self, _: None, kind: Kind, namespace: str, selector: str) -> list[dict]:
        assert selector == f"vitdet/run={RUN}"
        return [job for job in self.jobs if (job["kind"], namespace) == (kind.name, "kubeflow")]

    def delete_jobs(self, run_id: str, namespace: str, own: str) -> tuple[list[str], list[str]]:
        self.asked.append((run_id, namespace, own))
        return self.found.pop(0) if self.found else ([], [])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(launcher, "delete_jobs", made.delete_jobs)
    monkeypatch.setattr(kube, "connect", lambda retries=None: (None, ""))
    monkeypatch.setattr(kube, "list_jobs", made.list_jobs)
    place = "namespace {} of the cluster of context work".format
    monkeypatch.setattr(kube, "describe_namespace", place)
    return made


def job(name: str, kind: str, condition: str, **annotations: str) -> dict:
    """Return a training job with a condition."""
    true = {"type": condition, "status": "True", "message": f"{name} is {condition}"}
    return {
        "kind": kind,
        "metadata": {"name": name, "annotations": annotations},
        "status": {"conditions": [true]},
    }


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_terminate_first_prints_what_status_prints(
    kubeflow: Kubeflow, run: Run, cluster: Cluster, kind: str
) -> None:
    run("submit", "tiny", "--name", "mine")
    details = {"task_details": [task("train-job", "RUNNING"), task("train-job-2", "")]}
    config = {"parameters": {"job_kind": kind.lower()}}
    kept = {"state": "RUNNING", "run_details": details, "runtime_config": config}
    kubeflow.kept["runs"][0] |= kept
    line = "step 200/900  03:00 left  17.4 images/s  loss 2.5"
    progress = json.dumps(parse(line, datetime(2026, 11, 27, 12, tzinfo=UTC)))
    cluster.jobs = [
        job("vitdet-a", kind, "Suspended", **{PROGRESS: progress}),
        job("vitdet-b", kind, "Failed", **{"vitdet/progress": "step 7/900"}),
        {"kind": kind, "metadata": {"name": "vitdet-c"}},
        job("another", "MPIJob", "Running"),
    ]
    _, status, _ = run("status", RUN)
    assert status.splitlines()[4:] == [
        "  RUNNING    train-job",
        "  PENDING    train-job-2",
        "  job vitdet-a: suspended, step 200/900, 17.4 images/s, expected end 2026-11-27T12:03:00Z "
        "(as of 2026-11-27T12:00:00Z)",
        "  job vitdet-b: failed, step 7/900, vitdet-b is Failed",
        "  job vitdet-c: pending",
    ]
    config["parameters"]["job_kind"] = "mpijob"
    assert "job not shown: the run's job_kind is 'mpijob'" in run("status", RUN)[1]
    config["parameters"]["job_kind"] = kind.lower()
    kubeflow.plan[f"GET /runs/{RUN}"] = [Handler.serve, failing(404)]
    _, out, _ = run("terminate", RUN)
    assert out.replace("RUNNING, now ending", "RUNNING").startswith(status)


PLACE = "deleting the run's training jobs in namespace {} of the cluster of context work"
KEPT = "vitdet-2: failed; stays until 2026-11-29 12:00 UTC"


@pytest.mark.parametrize("state", ["FAILED", "SUCCEEDED", "CANCELED"])
def test_jobs_of_an_ended_run_are_deleted(
    kubeflow: Kubeflow, run: Run, cluster: Cluster, state: str
) -> None:
    kubeflow.users = True
    run("submit", "tiny", "--namespace", "team-a")
    kubeflow.kept["runs"][0]["runtime_config"] = {"parameters": {"job_kind": "trainjob"}}
    kubeflow.states, cluster.found = [{"state": state}], [(["vitdet-1"], [KEPT])]
    code, out, said = run("terminate", RUN)
    assert (code, said) == (0, "")
    assert out.splitlines()[2:] == [
        f"state {state}",
        f"link  {kubeflow.url}/#/runs/details/{RUN}",
        PLACE.format("team-a"),
        "deleted vitdet-1",
        KEPT,
    ]
    assert cluster.asked == [(RUN, "team-a", "trainjob")]
    assert f"POST /runs/{RUN}:terminate" not in kubeflow.words()


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "CANCELING"])
def test_jobs_are_deleted_before_and_after_the_end_of_the_run(
    kubeflow: Kubeflow, run: Run, cluster: Cluster, state: str
) -> None:
    run("submit", "tiny")
    kubeflow.states = [{"state": name} for name in (state, "CANCELING", "CANCELING", "CANCELED")]
    cluster.found = [(["vitdet-1"], [KEPT]), (["vitdet-3"], [KEPT])]
    code, out, said = run("terminate", RUN)
    assert (code, said) == (0, "")
    assert f"state {state}, now ending" in out and out.splitlines()[4:] == [
        PLACE.format("kubeflow"),
        "deleted vitdet-1",
        "waiting up to about 300 s for the run to end, then checking again",
        "deleted vitdet-3, created in the meantime",
        KEPT,
    ]
    assert cluster.asked == [(RUN, "kubeflow", "pytorchjob")] * 2
    assert (f"POST /runs/{RUN}:terminate" in kubeflow.words()) == (state != "CANCELING")


@pytest.mark.parametrize("left", [[], [KEPT]])
def test_without_jobs_the_namespace_is_named(
    kubeflow: Kubeflow, run: Run, cluster: Cluster, left: list[str]
) -> None:
    run("submit", "tiny")
    kubeflow.states, cluster.found = [{"state": "FAILED"}], [([], left)]
    out = run("terminate", RUN)[1]
    assert out.splitlines()[4:] == [
        PLACE.format("kubeflow"),
        *left,
        "found no training jobs to delete",
    ]


@pytest.mark.parametrize("status", [503, 401, 404])  # an outage, an expired login, a deleted run
def test_jobs_are_deleted_even_if_the_runs_end_is_not_observed(
    kubeflow: Kubeflow, run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("pipeline.cli.terminate.END_TIMEOUT", 0.3)
    run("submit", "tiny")
    cluster.found = [(["vitdet-1"], []), (["vitdet-2"], [KEPT])]
    kubeflow.plan[f"GET /runs/{RUN}"] = [Handler.serve, *[failing(status)] * 3]
    code, out, said = run("terminate", RUN, "--retries", 0)
    assert (code, out.splitlines()[-2:]) == (1, ["deleted vitdet-2, created in the meantime", KEPT])
    assert len(cluster.asked) == 2
    unknown = "it is unknown whether the run has ended ("
    last = said.splitlines()[-1]
    assert last.startswith(f"pipeline: {'the run is still ending' if status == 503 else unknown}")
    assert last.endswith(f"jobs created later, run `python -m pipeline terminate {RUN}`")


def test_ctrl_c_while_a_run_ends_shows_how_to_delete_later_jobs(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.client.Server.wait_until_ended", interrupt)
    run("submit", "tiny")
    code, _, said = run("terminate", RUN)
    assert code == 130 and len(cluster.asked) == 1
    assert said.endswith(f"jobs that still exist, run `python -m pipeline terminate {RUN}`\n")


def test_a_missing_namespace_is_reported_after_the_termination(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(namespace: str) -> str:
        raise ValueError(f"the cluster of context work has no namespace {namespace}")

    monkeypatch.setattr(kube, "describe_namespace", another)
    run("submit", "tiny")
    code, out, said = run("terminate", RUN)
    assert code == 1 and "now ending" in out and cluster.asked == []
    assert said.endswith(
        "training jobs may still exist: the cluster of context work has no namespace kubeflow\n"
    )


def test_a_run_may_end_before_termination(kubeflow: Kubeflow, run: Run, cluster: Cluster) -> None:
    run("submit", "tiny")
    kubeflow.plan[f"POST /runs/{RUN}:terminate"] = [failing(400, "Row not found")]
    kubeflow.states = [{"state": "RUNNING"}, {"state": "FAILED"}]
    assert run("terminate", RUN)[0] == 0
    assert {asked[:2] for asked in cluster.asked} == {(RUN, "kubeflow")}


def test_jobs_that_cannot_be_deleted_are_reported_with_a_command(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(run_id: str, namespace: str, own: str) -> tuple[list[str], list[str]]:
        raise RuntimeError("may not delete pytorchjobs")

    monkeypatch.setattr(launcher, "delete_jobs", forbidden)
    run("submit", "tiny")
    code, out, said = run("terminate", RUN, "--namespace", "team-a")
    assert code == 1 and "now ending" in out and len(said.splitlines()) == 1
    assert f"kubectl delete -n team-a pytorchjob -l vitdet/run={RUN}" in said


def test_a_schedule_is_deleted(kubeflow: Kubeflow, run: Run, cluster: Cluster) -> None:
    run("submit", "tiny", "--cron", "@daily")
    code, out, _ = run("terminate", "0000-rec-0")
    assert code == 0 and "runs that it started continue" in out
    assert not kubeflow.kept["recurringruns"] and not cluster.asked
