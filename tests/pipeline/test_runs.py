"""Runs on a server: started exactly once, followed to their end, inspected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from components.launcher import client as kube
from pipeline.cli.arguments import run_id_of
from tests.helpers.kubeflow import Handler, Kubeflow, Run, cut, failing, stalling, task

RUN = "0000-run-0"


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
def test_a_creation_is_retried_until_it_succeeds_once(
    kubeflow: Kubeflow, run: Run, trouble: list, words: list[str]
) -> None:
    kind = "recurringruns" if words else "runs"
    kubeflow.plan[f"POST /{kind}"] = list(trouble)
    code, out, _ = run("submit", "tiny", *words)
    assert code == 0 and len(kubeflow.kept[kind]) == 1
    assert f"id   0000-{kind[:3]}-0" in out


@pytest.mark.parametrize("trouble", [stalling, cut])
def test_a_creation_without_a_response_is_not_repeated(
    kubeflow: Kubeflow, run: Run, trouble: Callable
) -> None:
    kubeflow.plan["POST /runs"] = [trouble]
    code, _, said = run("submit", "tiny", "--timeout", 1 if trouble is stalling else 60)
    assert code == 1 and kubeflow.words().count("POST /runs") == 1
    assert said.endswith("; nothing has been created so far: check before you submit again\n")


def test_no_run_is_created_during_a_permanent_server_error(kubeflow: Kubeflow, run: Run) -> None:
    kubeflow.plan["POST /runs"] = [failing(500, "no space left")] * 9
    code, out, said = run("submit", "tiny", "--retries", 2)
    assert (code, out) == (1, "") and kubeflow.words().count("POST /runs") == 3
    assert said.endswith(f"{kubeflow.url} returned 500 Internal Server Error: no space left\n")


def test_an_experiment_created_concurrently_is_used(kubeflow: Kubeflow, run: Run) -> None:
    kubeflow.plan["POST /experiments"] = [failing(409, "Already exists", done=True)]
    assert run("submit", "tiny")[0] == 0
    assert kubeflow.bodies("POST /runs")[0]["experiment_id"] == "0000-exp-0"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "requires authentication (401)"),
        (403, "(403): cannot create"),
        (400, "returned 400 Bad Request: cannot create"),
    ],
)
def test_a_rejection_is_final(kubeflow: Kubeflow, run: Run, code: int, said: str) -> None:
    kubeflow.plan["POST /runs"] = [failing(code, "cannot create")]
    status, out, line = run("submit", "tiny")
    assert (status, out) == (1, "") and said in line and len(line.splitlines()) == 1
    assert kubeflow.words().count("POST /runs") == 1


@pytest.mark.parametrize(
    "words", [["submit", "tiny"], ["status", "x"], ["terminate", "x"]], ids=lambda words: words[0]
)
def test_an_address_without_the_api_fails(kubeflow: Kubeflow, run: Run, words: list[str]) -> None:
    kubeflow.plan["GET /healthz"] = [lambda handler: handler.send(404, "404 page not found")]
    code, _, said = run(*words)
    text = "is not the Kubeflow Pipelines API (404); in a full Kubeflow deployment the URL ends"
    assert code == 1 and text in said


def test_waiting_reports_each_change_once_and_the_result(kubeflow: Kubeflow, run: Run) -> None:
    groups = ("root", "for-loop-2", "iteration-iterations(0:0)", "executor")
    shells = [task("root-driver", "SUCCEEDED"), *(task(name, "RUNNING") for name in groups)]
    first = [*shells, task("configs", "RUNNING")]
    second = [*shells, task("configs", "SUCCEEDED"), task("train-job", "RUNNING")]
    last = [task("configs", "SUCCEEDED"), task("train-job", "SUCCEEDED")]
    last += [task("train-job(0)", "FAILED"), task("register", "SKIPPED")]
    looks = [*(("RUNNING", details) for details in (first, first, second)), ("SUCCEEDED", last)]
    kubeflow.states = [
        {"state": state, "run_details": {"task_details": tasks}} for state, tasks in looks
    ]
    code, out, said = run("submit", "tiny", "--wait")
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


# older servers report SUCCEEDED if the pipeline has an ExitHandler
@pytest.mark.parametrize("state", ["FAILED", "SUCCEEDED"])
def test_a_failed_step_is_reported(kubeflow: Kubeflow, run: Run, state: str) -> None:
    kubeflow.states = [{"state": state, "run_details": {"task_details": FAILED}}]
    code, _, said = run("submit", "tiny", "--wait")
    assert code == 1 and said.splitlines() == [
        "pipeline: train-job failed: OOMKilled (exit 137)",
        "pipeline: evaluate failed: the server reports no reason; see the step's log",
        f"pipeline: run {RUN} FAILED: {kubeflow.url}/#/runs/details/{RUN}",
    ]


@pytest.mark.parametrize("state", ["CANCELED", "SKIPPED"])
def test_a_canceled_run_is_not_a_success(kubeflow: Kubeflow, run: Run, state: str) -> None:
    kubeflow.states = [{"state": "CANCELING"}, {"state": state}]
    code, _, said = run("submit", "tiny", "--wait")
    assert code == 1 and f"run {RUN} {state}" in said


def test_the_error_of_a_run_without_a_failed_step_is_reported(kubeflow: Kubeflow, run: Run) -> None:
    kubeflow.states = [
        {"state": "FAILED", "error": {"code": 3, "message": "workflow quota exceeded"}}
    ]
    assert "run failed: workflow quota exceeded" in run("submit", "tiny", "--wait")[2]


def test_waiting_continues_after_an_outage_but_not_after_an_expired_login(
    kubeflow: Kubeflow, run: Run
) -> None:
    kubeflow.plan[f"GET /runs/{RUN}"] = [failing(503)] * 6
    kubeflow.states = [{"state": "SUCCEEDED"}]
    code, out, _ = run("submit", "tiny", "--wait", "--retries", 1)
    assert code == 0 and out.count("; the run continues") == 3
    kubeflow.plan["GET /runs/0000-run-1"] = [failing(401)]
    code, _, said = run("submit", "tiny", "--wait")
    assert code == 1
    assert said.rstrip().endswith(
        "; for the run's state, see `python -m pipeline status 0000-run-1`"
    )


def test_waiting_continues_with_a_renewed_token(
    kubeflow: Kubeflow, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    kubeflow.token = "first"

    def expire(handler: Handler) -> None:
        kubeflow.token = "second"
        handler.serve()

    def rewrite(handler: Handler) -> None:
        file.write_text("")  # like a program that truncates the file before it writes
        handler.serve()

    def renew(handler: Handler) -> None:
        file.write_text("second")  # after this request has read it
        handler.serve()

    kubeflow.plan[f"GET /runs/{RUN}"] = [Handler.serve, expire, Handler.serve, rewrite, renew]
    kubeflow.states = [{"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    code, out, said = run("submit", "tiny", "--wait", "--token-file", file)
    assert (code, said) == (0, "") and out.count("(401): they have expired") == 3
    reads = [request for request in kubeflow.requests if request.words == f"GET /runs/{RUN}"]
    tokens = [request.headers["authorization"] for request in reads]
    assert tokens == [*["Bearer first"] * 5, "Bearer second"]  # the renewed token is used at once


def test_waiting_ends_at_an_invalid_token(
    kubeflow: Kubeflow, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "first")
    kubeflow.token = "first"
    kubeflow.plan[f"GET /runs/{RUN}"] = [failing(401)]
    code, _, said = run("submit", "tiny", "--wait")
    assert code == 1 and said.rstrip().endswith(f"`python -m pipeline status {RUN}`")
    assert kubeflow.words().count(f"GET /runs/{RUN}") == 1


def test_ctrl_c_does_not_end_the_run(
    kubeflow: Kubeflow, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.client.time.sleep", interrupt)
    code, _, said = run("submit", "tiny", "--wait")
    assert code == 130 and f"python -m pipeline terminate {RUN}" in said
    assert f"POST /runs/{RUN}:terminate" not in kubeflow.words()


def without_cluster(retries: int | None = None) -> None:
    raise RuntimeError("no cluster: not in a pod")


def test_status_describes_a_run_or_a_schedule(
    kubeflow: Kubeflow, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("submit", "tiny", "--name", "mine")
    run("submit", "tiny", "--cron", "0 3 * * *")
    details = {"run_details": {"task_details": FAILED}}
    kubeflow.states = [{"state": "FAILED", "finished_at": "2026-11-22T10:00:09Z", **details}]
    monkeypatch.setattr(kube, "connect", without_cluster)
    code, out, _ = run("status", f"{kubeflow.url}/#/runs/details/{RUN}")
    assert code == 0 and out == (
        f"run   mine\nid    {RUN}\nstate FAILED, 2026-11-22 10:00:09 UTC\nlink  {kubeflow.url}/#/runs/details/{RUN}\n"
        "  FAILED     train-job: OOMKilled (exit 137)\n  SUCCEEDED  clean-up\n"
        "  job not shown: no cluster: not in a pod\n"
    )
    code, out, _ = run("status", "0000-rec-0")
    assert code == 0, _
    assert "when     0 0 3 * * *" in out
    # created in the web interface
    trigger = {"periodic_schedule": {"interval_second": "3600"}}
    kubeflow.kept["recurringruns"][0]["trigger"] = trigger
    code, out, _ = run("status", "0000-rec-0")
    assert code == 0 and "when     every 3600 s" in out
    code, out, said = run("status", "none")
    assert (code, out, said) == (1, "", f"pipeline: {kubeflow.url} has no run or schedule none\n")


@pytest.mark.parametrize(
    "link",
    [
        RUN,
        f"https://kubeflow.example.com/pipeline/#/runs/details/{RUN}?tab=1",
        f"https://kubeflow.example.com/_/pipeline/?ns=team#/runs/details/{RUN}/",
    ],
)
def test_a_link_contains_the_id_of_a_run(link: str) -> None:
    assert run_id_of(link) == RUN
