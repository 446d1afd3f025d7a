"""Runs on a server: started exactly once, followed to their end, inspected, terminated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from components.launcher import client as kube
from components.launcher import launch as launcher
from tests.helpers.kubeflow import Handler, Kubeflow, command, cut, failing, serving, stalling, task

Run = Callable[..., tuple[int, str, str]]
RUN = "0000-run-0"


@pytest.fixture
def kubeflow() -> Iterator[Kubeflow]:
    with serving(Kubeflow()) as server:
        yield server


@pytest.fixture
def pipeline(
    kubeflow: Kubeflow,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """submit takes a pipeline of nothing, and looks every 10 ms."""
    package, run = tmp_path / "package.yaml", command(kubeflow, monkeypatch, capsys)
    parameters = {name: {"parameterType": "LIST"} for name in ("recipes", "overrides")}
    package.write_text(yaml.safe_dump({"root": {"inputDefinitions": {"parameters": parameters}}}))
    # `test_submit` has it
    monkeypatch.setattr("pipeline.cli.submit.check_recipes", lambda *_: True)
    return lambda verb, *words: run(
        verb, *words, "--every", 0.01, *(["--package", package] if verb == "submit" else [])
    )


@pytest.mark.parametrize(
    "trouble",
    [
        [failing(503)],
        [failing(429)],
        [failing(500), failing(504)],
        [failing(503, done=True)],
        [failing(500), failing(502, done=True)],
        [failing(409, done=True)],
    ],
)
@pytest.mark.parametrize("words", [[], ["--cron", "@daily"]], ids=["run", "schedule"])
def test_a_request_that_failed_or_seemed_to_is_made_once(
    kubeflow: Kubeflow, pipeline: Run, trouble: list, words: list[str]
) -> None:
    kind = "recurringruns" if words else "runs"
    kubeflow.plan[f"POST /{kind}"] = list(trouble)
    code, out, _ = pipeline("submit", "tiny", *words)
    assert code == 0 and len(kubeflow.kept[kind]) == 1
    assert f"id   0000-{kind[:3]}-0" in out


@pytest.mark.parametrize("trouble", [stalling, cut])
def test_a_request_without_an_answer_is_not_repeated_blindly(
    kubeflow: Kubeflow, pipeline: Run, trouble: Callable
) -> None:
    kubeflow.plan["POST /runs"] = [trouble]
    code, _, said = pipeline("submit", "tiny", "--timeout", 1 if trouble is stalling else 60)
    assert code == 1 and kubeflow.words().count("POST /runs") == 1
    assert said.splitlines()[-1].endswith(
        "; nothing was created so far: check before you submit again"
    )


def test_a_server_that_stays_ill_gets_no_run(kubeflow: Kubeflow, pipeline: Run) -> None:
    kubeflow.plan["POST /runs"] = [failing(500, "no space left")] * 9
    code, out, said = pipeline("submit", "tiny", "--retries", 2)
    assert (code, out) == (1, "") and kubeflow.words().count("POST /runs") == 3
    assert (
        said.splitlines()[-1]
        == f"pipeline: {kubeflow.url} returned 500 Internal Server Error: no space left"
    )


def test_an_experiment_that_another_makes_at_the_same_moment_is_used(
    kubeflow: Kubeflow, pipeline: Run
) -> None:
    kubeflow.plan["POST /experiments"] = [failing(409, "Already exists", done=True)]
    assert pipeline("submit", "tiny")[0] == 0
    assert kubeflow.bodies("POST /runs")[0]["experiment_id"] == "0000-exp-0"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "requires authentication (401)"),
        (403, "(403): cannot create"),
        (400, "returned 400 Bad Request: cannot create"),
    ],
)
def test_a_refused_request_is_not_repeated(
    kubeflow: Kubeflow, pipeline: Run, code: int, said: str
) -> None:
    kubeflow.plan["POST /runs"] = [failing(code, "cannot create")]
    status, out, line = pipeline("submit", "tiny")
    assert (status, out) == (1, "") and said in line and len(line.splitlines()) == 1
    assert kubeflow.words().count("POST /runs") == 1


@pytest.mark.parametrize(
    "words", [["submit", "tiny"], ["status", "x"], ["terminate", "x"]], ids=lambda words: words[0]
)
def test_an_address_without_the_api(kubeflow: Kubeflow, pipeline: Run, words: list[str]) -> None:
    kubeflow.plan["GET /healthz"] = [lambda handler: handler.send(404, "404 page not found")]
    code, _, said = pipeline(*words)
    assert (
        code == 1
        and "is not the Kubeflow Pipelines API (404); in a full Kubeflow deployment the address ends in "
        in said
    )


def test_waiting_says_each_change_once_and_ends_well_after_success_only(
    kubeflow: Kubeflow, pipeline: Run
) -> None:
    shells = [
        task("root", "RUNNING"),
        task("root-driver", "SUCCEEDED"),
        task("for-loop-2", "RUNNING"),
        task("iteration-iterations(0:0)", "RUNNING"),
        task("executor", "RUNNING"),
    ]
    kubeflow.states = [
        {
            "state": "RUNNING",
            "run_details": {"task_details": [*shells, task("configs", "RUNNING")]},
        },
        {
            "state": "RUNNING",
            "run_details": {"task_details": [*shells, task("configs", "RUNNING")]},
        },
        {
            "state": "RUNNING",
            "run_details": {
                "task_details": [
                    *shells,
                    task("configs", "SUCCEEDED"),
                    task("train-job", "RUNNING"),
                ]
            },
        },
        {
            "state": "SUCCEEDED",
            "run_details": {
                "task_details": [
                    task("configs", "SUCCEEDED"),
                    task("train-job", "SUCCEEDED"),
                    task("train-job(0)", "FAILED"),
                    task("register", "SKIPPED"),
                ]
            },
        },
    ]
    code, out, said = pipeline("submit", "tiny", "--wait")
    assert (code, said) == (0, "")
    assert [line[9:] for line in out.splitlines()[3:]] == [
        "run RUNNING",
        "configs RUNNING",
        "configs SUCCEEDED",
        "train-job RUNNING",
        "run SUCCEEDED",
        "train-job SUCCEEDED",
        "register SKIPPED",
    ]


FAILED = [
    task("root", "FAILED", end_time="2026-11-22T10:00:09Z"),
    task("exit-handler-1", "FAILED", end_time="2026-11-22T10:00:08Z"),
    task("evaluate-driver", "FAILED", end_time="2026-11-22T10:00:07Z"),
    task(
        "train-job",
        "FAILED",
        end_time="2026-11-22T10:00:05Z",
        state_history=[
            {"state": "RUNNING"},
            {"state": "FAILED", "error": {"code": 13, "message": "OOMKilled\n(exit 137)"}},
        ],
    ),
    task("executor", "FAILED", end_time="2026-11-22T10:00:04Z"),
    task("clean-up", "SUCCEEDED"),
]


@pytest.mark.parametrize(
    "state", ["FAILED", "SUCCEEDED"]
)  # the second: what older servers make of an ExitHandler
def test_a_failed_step_is_named_with_its_message(
    kubeflow: Kubeflow, pipeline: Run, state: str
) -> None:
    kubeflow.states = [{"state": state, "run_details": {"task_details": FAILED}}]
    code, _, said = pipeline("submit", "tiny", "--wait")
    assert code == 1 and said.splitlines() == [
        "pipeline: train-job failed: OOMKilled (exit 137)",
        "pipeline: evaluate failed: the server reports no reason; see its log",
        f"pipeline: run {RUN} FAILED: {kubeflow.url}/#/runs/details/{RUN}",
    ]


@pytest.mark.parametrize("state", ["CANCELED", "SKIPPED"])
def test_a_run_that_ended_otherwise_is_no_success(
    kubeflow: Kubeflow, pipeline: Run, state: str
) -> None:
    kubeflow.states = [{"state": "CANCELING"}, {"state": state}]
    code, _, said = pipeline("submit", "tiny", "--wait")
    assert code == 1 and f"run {RUN} {state}" in said


def test_a_run_that_failed_without_a_step_has_its_own_message(
    kubeflow: Kubeflow, pipeline: Run
) -> None:
    kubeflow.states = [
        {"state": "FAILED", "error": {"code": 3, "message": "workflow quota exceeded"}}
    ]
    assert "run failed: workflow quota exceeded" in pipeline("submit", "tiny", "--wait")[2]


def test_waiting_outlasts_a_server_that_is_away_but_not_a_login_that_has_expired(
    kubeflow: Kubeflow, pipeline: Run
) -> None:
    kubeflow.plan[f"GET /runs/{RUN}"] = [failing(503)] * 6
    kubeflow.states = [{"state": "SUCCEEDED"}]
    code, out, _ = pipeline("submit", "tiny", "--wait", "--retries", 1)
    assert code == 0 and out.count("; the run continues") == 3
    kubeflow.plan["GET /runs/0000-run-1"] = [failing(401)]
    code, _, said = pipeline("submit", "tiny", "--wait")
    assert code == 1 and said.rstrip().endswith(
        "; the run continues: `python -m pipeline status 0000-run-1`"
    )


def test_ctrl_c_ends_the_waiting_not_the_run(
    kubeflow: Kubeflow, pipeline: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.client.time.sleep", interrupt)
    code, _, said = pipeline("submit", "tiny", "--wait")
    assert code == 130 and f"python -m pipeline terminate {RUN}" in said
    assert f"POST /runs/{RUN}:terminate" not in kubeflow.words()


def test_status_of_a_run_and_of_a_schedule(kubeflow: Kubeflow, pipeline: Run) -> None:
    pipeline("submit", "tiny", "--name", "mine")
    pipeline("submit", "tiny", "--cron", "0 3 * * *")
    kubeflow.states = [
        {
            "state": "FAILED",
            "finished_at": "2026-11-22T10:00:09Z",
            "run_details": {"task_details": FAILED},
        }
    ]
    code, out, _ = pipeline("status", f"{kubeflow.url}/#/runs/details/{RUN}")
    assert code == 0 and out == (
        f"run   mine\nid    {RUN}\nstate FAILED, 2026-11-22 10:00:09\nlink  {kubeflow.url}/#/runs/details/{RUN}\n"
        "  FAILED     train-job: OOMKilled (exit 137)\n  SUCCEEDED  clean-up\n"
    )
    code, out, _ = pipeline("status", "0000-rec-0")
    assert code == 0, _
    assert "when     0 0 3 * * *" in out
    code, out, said = pipeline("status", "none")
    assert (code, out, said) == (1, "", f"pipeline: {kubeflow.url} has no run or schedule none\n")


class Cluster:
    """asked: (run, namespace, kind of its jobs) of each deletion; found: what the next deletions find."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.found: list[tuple[list[str], list[str]]] = []

    def delete_jobs(self, run_id: str, namespace: str, own: str) -> tuple[list[str], list[str]]:
        self.asked.append((run_id, namespace, own))
        return self.found.pop(0) if self.found else ([], [])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(launcher, "delete_jobs", made.delete_jobs)
    monkeypatch.setattr(
        kube, "describe_namespace", "namespace {} of the cluster of context work".format
    )
    return made


PLACE = "deleting its training jobs in namespace {} of the cluster of context work"
KEPT = "vitdet-2: failed; stays until 2026-11-29 12:00 UTC"


@pytest.mark.parametrize("state", ["FAILED", "SUCCEEDED", "CANCELED"])
def test_the_jobs_of_a_run_that_has_ended_are_deleted(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster, state: str
) -> None:
    kubeflow.users = True
    pipeline("submit", "tiny", "--namespace", "team-a")
    kubeflow.kept["runs"][0]["runtime_config"] = {"parameters": {"job_kind": "trainjob"}}
    kubeflow.states, cluster.found = [{"state": state}], [(["vitdet-1"], [KEPT])]
    code, out, said = pipeline("terminate", RUN)
    assert (code, said) == (0, "")
    assert out.splitlines() == [
        f"run {RUN}: {state}",
        PLACE.format("team-a"),
        "deleted vitdet-1",
        KEPT,
    ]
    assert cluster.asked == [(RUN, "team-a", "trainjob")]
    assert f"POST /runs/{RUN}:terminate" not in kubeflow.words()


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "CANCELING"])
def test_the_jobs_of_a_run_are_deleted_at_once_and_when_it_has_ended(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster, state: str
) -> None:
    pipeline("submit", "tiny")
    kubeflow.states = [
        {"state": state},
        {"state": "CANCELING"},
        {"state": "CANCELING"},
        {"state": "CANCELED"},
    ]
    cluster.found = [(["vitdet-1"], [KEPT]), (["vitdet-3"], [KEPT])]
    code, out, said = pipeline("terminate", RUN)
    assert (code, said) == (0, "")
    assert out.splitlines()[1:] == [
        PLACE.format("kubeflow"),
        "deleted vitdet-1",
        "looking again when the run has ended, for about 300 s",
        "deleted vitdet-3, made since",
        KEPT,
    ]
    assert cluster.asked == [(RUN, "kubeflow", "pytorchjob")] * 2
    assert (f"POST /runs/{RUN}:terminate" in kubeflow.words()) == (state != "CANCELING")


@pytest.mark.parametrize("left", [[], [KEPT]])
def test_where_there_are_no_jobs_it_says_where_it_looked(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster, left: list[str]
) -> None:
    pipeline("submit", "tiny")
    kubeflow.states, cluster.found = [{"state": "FAILED"}], [([], left)]
    assert pipeline("terminate", RUN)[1].splitlines()[1:] == [
        PLACE.format("kubeflow"),
        *left,
        "found none to delete",
    ]


@pytest.mark.parametrize(
    "status", [503, 401, 404]
)  # silent; the login has expired; somebody has deleted the run
def test_jobs_of_a_run_that_is_not_seen_to_end_are_deleted(
    kubeflow: Kubeflow,
    pipeline: Run,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr("pipeline.cli.terminate.END_TIMEOUT", 0.3)
    pipeline("submit", "tiny")
    cluster.found = [(["vitdet-1"], []), (["vitdet-2"], [KEPT])]
    kubeflow.plan[f"GET /runs/{RUN}"] = [Handler.serve, *[failing(status)] * 3]
    code, out, said = pipeline("terminate", RUN, "--retries", 0)
    assert (
        code == 1
        and out.splitlines()[-2:] == ["deleted vitdet-2, made since", KEPT]
        and len(cluster.asked) == 2
    )
    cause = (
        "the run is still ending" if status == 503 else "it is unknown whether the run has ended ("
    )
    assert said.splitlines()[-1].startswith(f"pipeline: {cause}") and said.splitlines()[
        -1
    ].endswith(f"; to delete training jobs created later: `python -m pipeline terminate {RUN}`")


def test_ctrl_c_while_a_run_ends_says_what_is_left_to_do(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.client.Server.wait_until_ended", interrupt)
    pipeline("submit", "tiny")
    code, _, said = pipeline("terminate", RUN)
    assert code == 130 and len(cluster.asked) == 1
    assert said.endswith(
        f"; to delete training jobs created since: `python -m pipeline terminate {RUN}`\n"
    )


def test_a_cluster_without_the_namespace_is_refused_in_one_line(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(namespace: str) -> str:
        raise ValueError(f"the cluster of context work has no namespace {namespace}")

    monkeypatch.setattr(kube, "describe_namespace", another)
    pipeline("submit", "tiny")
    code, out, said = pipeline("terminate", RUN)
    assert code == 1 and "now ending" in out and cluster.asked == []
    assert said.endswith(
        "training jobs may still exist: the cluster of context work has no namespace kubeflow\n"
    )


def test_terminating_a_run_that_ends_in_the_meantime(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster
) -> None:
    pipeline("submit", "tiny")
    kubeflow.plan[f"POST /runs/{RUN}:terminate"] = [failing(400, "Row not found")]
    kubeflow.states = [{"state": "RUNNING"}, {"state": "FAILED"}]
    assert pipeline("terminate", RUN)[0] == 0 and {asked[:2] for asked in cluster.asked} == {
        (RUN, "kubeflow")
    }


def test_jobs_that_cannot_be_deleted_are_an_error_that_says_how(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(run_id: str, namespace: str, own: str) -> tuple[list[str], list[str]]:
        raise RuntimeError("may not delete pytorchjobs")

    monkeypatch.setattr(launcher, "delete_jobs", forbidden)
    pipeline("submit", "tiny")
    code, out, said = pipeline("terminate", RUN, "--namespace", "team-a")
    assert code == 1 and "now ending" in out and len(said.splitlines()) == 1
    assert f"kubectl delete -n team-a pytorchjobs,trainjobs -l vitdet/run={RUN}" in said


def test_terminating_a_schedule_deletes_it(
    kubeflow: Kubeflow, pipeline: Run, cluster: Cluster
) -> None:
    pipeline("submit", "tiny", "--cron", "@daily")
    code, out, _ = pipeline("terminate", "0000-rec-0")
    assert code == 0 and "runs that it started continue" in out
    assert not kubeflow.kept["recurringruns"] and not cluster.asked
