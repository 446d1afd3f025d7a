"""Client of Kubeflow Pipelines: start, follow and terminate runs; create and delete schedules.

`pipeline.connection` sends the requests, translates their errors, and explains why kfp.Client is
not used.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import kfp_server_api as api

from pipeline.connection import ServerError, in_cluster_address
from pipeline.request import RunRequest, Schedule, kubeflow_cron
from pipeline.versions import Version, server_version

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")  # unlike kfp.Client, includes CANCELED
RECURRING = "recurringrun"  # path segment in the web interface's link to a schedule
ATTEMPT = re.compile(r"\(\d+\)$")  # Argo's suffix for an attempt of a retried step
# Argo's tasks that are not steps: groups of steps, drivers and executors (kubeflow/pipelines,
# backend/src/v2/compiler/argocompiler/dag.go)
ARGO_TASK = re.compile(
    r"(root|executor|iteration.*|(for-loop|condition|condition-branches|exit-handler)-\d+.*)(-driver)?$"
)
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
Created = TypeVar("Created")


class Server:
    """Runs and schedules of a Kubeflow Pipelines server. Failed requests raise ServerError.

    Args:
        ui: Base URL for links; by default the API's URL, or "" for a service in the cluster.
        report: Called with progress messages.
    """

    def __init__(
        self, client: api.ApiClient, ui: str = "", report: Callable[[str], None] = lambda _: None
    ) -> None:
        self.runs, self.experiments = api.RunServiceApi(client), api.ExperimentServiceApi(client)
        self.recurring = api.RecurringRunServiceApi(client)
        self.client, self.transport = client, client.rest_client
        self.host = client.configuration.host
        self.report = report
        self.ui = ui.rstrip("/") or ("" if in_cluster_address(self.host) else self.host)

    def link(self, run_id: str, kind: str = "runs") -> str:
        """Return the web interface's link to a run or schedule; without a host if `ui` is empty."""
        return f"{self.ui}/#/{kind}/details/{run_id}"

    @cached_property
    def health(self) -> dict:
        """Return the health response; raise ServerError if the host does not serve the API.

        The response class of kfp_server_api has no field for the version, so the JSON is returned.
        """
        try:
            api.HealthzServiceApi(self.client).healthz_service_get_healthz()
        except ServerError as error:
            if error.status != 404:
                raise
        else:
            health = json.loads(self.client.last_response.data or "{}")
            if health.get("apiServerReady") is False:  # the web interface sets this field
                raise ServerError(f"{self.host}: the API server does not respond", 503)
            return health
        raise ServerError(
            f"{self.host} is not the Kubeflow Pipelines API (404); in a full Kubeflow deployment "
            "the URL ends in /pipeline",
            404,
        )

    def version(self) -> tuple[Version, str]:
        """Return the server's version and a remark (see `server_version`)."""
        return server_version(self.health)

    def namespace(self, asked: str) -> str:
        """Return the namespace for requests; "" for single-user servers, which reject any name."""
        multi_user = bool(self.health.get("multi_user"))
        if multi_user and not asked and POD_NAMESPACE.exists():
            return POD_NAMESPACE.read_text().strip()
        if multi_user and not asked:
            raise ServerError(
                f"{self.host} is multi-user; pass your profile's namespace with --namespace", 0
            )
        return asked if multi_user else ""

    def experiment(self, name: str, namespace: str) -> str:
        """Return the ID of an experiment; create it if it does not exist."""
        by_name = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        scope = {"namespace": namespace} if namespace else {}

        def find() -> api.V2beta1Experiment | None:
            listed = self.experiments.experiment_service_list_experiments(
                filter=json.dumps({"predicates": [by_name]}), **scope
            )
            return next(iter(listed.experiments or ()), None)

        def create() -> api.V2beta1Experiment:
            return self.experiments.experiment_service_create_experiment(
                experiment=api.V2beta1Experiment(display_name=name, **scope)
            )

        return (find() or self.create_once(create, find)).experiment_id

    def start(
        self, request: RunRequest, namespace: str = "", schedule: Schedule | None = None
    ) -> str:
        """Start a run, or a recurring run if a schedule is given, and return its ID."""
        experiment = self.experiment(request.experiment, namespace)
        marker = f"submission {uuid4().hex}"
        body = {
            "display_name": request.name,
            "description": marker,
            "experiment_id": experiment,
            "pipeline_spec": request.pipeline,
            "runtime_config": api.V2beta1RuntimeConfig(
                parameters=request.parameters, pipeline_root=request.root or None
            ),
            "service_account": request.account or None,
        }
        listing = {"experiment_id": experiment, "sort_by": "created_at desc", "page_size": 50}
        if schedule is None:
            return self.create_once(
                lambda: self.runs.run_service_create_run(run=api.V2beta1Run(**body)),
                lambda: find_marked(self.runs.run_service_list_runs(**listing).runs, marker),
            ).run_id
        when = api.V2beta1CronSchedule(cron=kubeflow_cron(schedule.expression))
        body |= {
            "mode": "ENABLE",
            "no_catchup": not schedule.catch_up,
            "max_concurrency": str(schedule.max_concurrency),
            "trigger": api.V2beta1Trigger(cron_schedule=when),
        }
        return self.create_once(
            lambda: self.recurring.recurring_run_service_create_recurring_run(
                recurring_run=api.V2beta1RecurringRun(**body)
            ),
            lambda: find_marked(
                self.recurring.recurring_run_service_list_recurring_runs(**listing).recurring_runs,
                marker,
            ),
        ).recurring_run_id

    def create_once(
        self, create: Callable[[], Created], find: Callable[[], Created | None]
    ) -> Created:
        """Call `create`, with retries after transient HTTP errors, and return its result.

        If a request may have taken effect, `find` looks for the created object before a retry, so
        that nothing is created twice.
        """
        for attempt in range(self.transport.retries + 1):
            try:
                return create()
            except ServerError as error:
                doubtful = error.transient and error.sent
                if not doubtful and error.status != 409:
                    raise
                existing, last = find(), error
            if existing:
                return existing
            if last.status in (0, 409):  # 0: no response; the request may still be in progress
                break
            if attempt < self.transport.retries:
                self.transport.report(f"{last}; nothing was created, retrying")
                time.sleep(self.transport.backoff * 2**attempt)
        doubt = "; nothing has been created so far: check before you submit again"
        if last.status:
            doubt = ""
        raise ServerError(f"{last}{doubt}", last.status)

    def find(self, some_id: str) -> api.V2beta1Run | api.V2beta1RecurringRun:
        """Return the run or recurring run with this ID."""
        requests = (
            self.runs.run_service_get_run,
            self.recurring.recurring_run_service_get_recurring_run,
        )
        for get in requests:
            try:
                return get(some_id)
            except ServerError as error:
                if error.status != 404:
                    raise
        _ = self.health  # raises ServerError if the host does not serve the API
        raise ServerError(f"{self.host} has no run or schedule {some_id}", 404)

    def pod_namespace(self, run: api.V2beta1Run) -> str:
        """Return the namespace of a run's pods; `kubeflow` is assumed on a single-user server."""
        experiment = self.experiments.experiment_service_get_experiment(
            experiment_id=run.experiment_id
        )
        return experiment.namespace or "kubeflow"

    def follow(self, run_id: str, every: float = 10.0, tolerance: float = 600.0) -> api.V2beta1Run:
        """Report state changes until the run has ended, and return the run.

        every: seconds between two requests. tolerance: seconds for which the server may be
        unavailable or reject credentials from a file, before ServerError is raised.
        """
        reported: dict[str, str] = {}
        last_answer = time.monotonic()
        while True:
            try:
                run = self.runs.run_service_get_run(run_id)
            except ServerError as error:
                if not self.may_recover(error) or time.monotonic() - last_answer > tolerance:
                    raise ServerError(
                        f"{error}; for the run's state, see `python -m pipeline status {run_id}`",
                        error.status,
                    ) from None
                self.report(f"{error}; the run continues")
            else:
                last_answer = time.monotonic()
                for key, name, state in [("", "run", run.state), *steps(run)]:
                    if state and reported.get(key) != state:
                        self.report(f"{time.strftime('%H:%M:%S')} {name} {state}")
                        reported[key] = state
                if run.state in ENDED:
                    return run
            time.sleep(every)

    def may_recover(self, error: ServerError) -> bool:
        """Return whether the same request may succeed later."""
        return error.transient or (error.status == 401 and self.transport.renewed)

    def wait_until_ended(self, run_id: str, every: float, seconds: float) -> bool:
        """Return whether a run ends within `seconds`; ignore a temporarily unavailable server."""
        start = time.monotonic()
        while True:
            try:
                if self.runs.run_service_get_run(run_id).state in ENDED:
                    return True
            except ServerError as error:
                if not self.may_recover(error):
                    raise
            if time.monotonic() - start >= seconds:
                return False
            time.sleep(every)

    def terminate(self, found: api.V2beta1Run | api.V2beta1RecurringRun) -> None:
        """Terminate a run unless it has ended, or delete a schedule."""
        if isinstance(found, api.V2beta1RecurringRun):
            self.recurring.recurring_run_service_delete_recurring_run(found.recurring_run_id)
        elif found.state not in (*ENDED, "CANCELING"):
            try:
                self.runs.run_service_terminate_run(found.run_id)
            except ServerError:
                state = self.runs.run_service_get_run(found.run_id).state
                # the run may have ended, or an earlier attempt of the request may have succeeded
                if state not in (*ENDED, "CANCELING"):
                    raise


def find_marked(listed: Sequence[Any] | None, marker: str) -> Any | None:
    """Return the run or schedule with this marker as its description, or None."""
    return next((item for item in listed or () if item.description == marker), None)


def steps(run: api.V2beta1Run) -> list[tuple[str, str, str]]:
    """Return (id, name, state) of a run's steps, without the tasks that Argo adds."""
    tasks = run.run_details.task_details if run.run_details else None
    return [
        (task.task_id, task.display_name, task.state)
        for task in tasks or ()
        if not ARGO_TASK.match(task.display_name)
        and not ATTEMPT.search(task.display_name)
        and not task.display_name.endswith("-driver")
    ]


def failed_steps(run: api.V2beta1Run) -> list[tuple[str, str]]:
    """Return (step, message) of the failed steps, ordered by end time.

    Servers up to 2.17 return no messages. On servers affected by kubeflow/pipelines #9577, a run
    whose steps failed inside an ExitHandler ends as SUCCEEDED if the exit handler succeeds.
    """
    tasks = run.run_details.task_details if run.run_details else None
    failed = [
        task
        for task in tasks or ()
        if task.state == "FAILED" and not ATTEMPT.search(task.display_name)
    ]
    failed = [task for task in failed if not ARGO_TASK.match(task.display_name)] or failed
    failed.sort(key=lambda task: (task.end_time is None, str(task.end_time)))
    named: dict[str, str] = {}
    for task in failed:
        errors = [task.error, *(status.error for status in task.state_history or ())]
        message = next((error.message for error in errors if error and error.message), "")
        name = task.display_name.removesuffix("-driver")
        named[name] = named.get(name) or message
    if not named and run.error and run.error.message:
        named["run"] = run.error.message
    return [(name, " ".join(message.split())) for name, message in named.items()]
