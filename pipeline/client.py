"""What one asks of Kubeflow Pipelines: start a run or a schedule of runs, follow it, end it.

`pipeline.connection` has the requests and their errors, and says why kfp.Client does not make them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import kfp_server_api as api

from pipeline.connection import Refusal, inside
from pipeline.order import Order, Schedule, cron

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")  # kfp.Client waits on for the last
# What Argo adds around a pipeline's steps: groups of steps, drivers, pods; "(0)" is one attempt of a retried step
# (names: kubeflow/pipelines, backend/src/v2/compiler/argocompiler/dag.go).
ATTEMPT = re.compile(r"\(\d+\)$")
SHELL = re.compile(
    r"(root|executor|iteration.*|(for-loop|condition|condition-branches|exit-handler)-\d+.*)(-driver)?$"
)
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
Made = TypeVar("Made")


class Server:
    """The runs at one server. ui: the address that links lead to, else the API's own; `says` hears of progress.

    All methods raise `Refusal`.
    """

    def __init__(
        self, client: api.ApiClient, ui: str = "", says: Callable[[str], None] = lambda _: None
    ) -> None:
        self.runs, self.experiments = api.RunServiceApi(client), api.ExperimentServiceApi(client)
        self.recurring, self.health = (
            api.RecurringRunServiceApi(client),
            api.HealthzServiceApi(client),
        )
        self.transport, self.host, self.says = client.rest_client, client.configuration.host, says
        self.ui = ui.rstrip("/") or ("" if inside(self.host) else self.host)

    def link(self, run_id: str, kind: str = "runs") -> str:
        """Where a browser shows it; without the host where that serves the API alone."""
        return f"{self.ui}/#/{kind}/details/{run_id}"

    def users(self) -> bool:
        """Whether the server tells users apart: the plainest request, which finds out whether the API is there."""
        try:
            return bool(self.health.healthz_service_get_healthz().multi_user)
        except Refusal as refusal:
            if refusal.status != 404:
                raise
        raise Refusal(
            f"{self.host} has no API of Kubeflow Pipelines (404); with a whole Kubeflow the address ends in "
            "/pipeline",
            404,
        )

    def namespace(self, asked: str) -> str:
        """The namespace to name in requests: "" where the server has no users and refuses to be given one."""
        users = self.users()
        if users and not asked and POD_NAMESPACE.exists():
            return POD_NAMESPACE.read_text().strip()
        if users and not asked:
            raise Refusal(
                f"{self.host} has users: name your profile's namespace with --namespace", 0
            )
        return asked if users else ""

    def experiment(self, name: str, namespace: str) -> str:
        """The id of an experiment, which is made when it is new."""
        wanted = {
            "predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]
        }
        place = {"namespace": namespace} if namespace else {}

        def find() -> api.V2beta1Experiment | None:
            listed = self.experiments.experiment_service_list_experiments(
                filter=json.dumps(wanted), **place
            )
            return next(iter(listed.experiments or ()), None)

        def create() -> api.V2beta1Experiment:
            return self.experiments.experiment_service_create_experiment(
                experiment=api.V2beta1Experiment(display_name=name, **place)
            )

        return (find() or self.once(create, find)).experiment_id

    def start(self, order: Order, namespace: str = "", schedule: Schedule | None = None) -> str:
        """Starts a run, or a recurring run with a schedule, and gives its id."""
        experiment, mark = self.experiment(order.experiment, namespace), f"submission {uuid4().hex}"
        body = {
            "display_name": order.name,
            "description": mark,
            "experiment_id": experiment,
            "pipeline_spec": order.pipeline,
            "runtime_config": api.V2beta1RuntimeConfig(
                parameters=order.parameters, pipeline_root=order.root or None
            ),
            "service_account": order.account or None,
        }
        listing = {"experiment_id": experiment, "sort_by": "created_at desc", "page_size": 50}
        if schedule is None:
            return self.once(
                lambda: self.runs.run_service_create_run(run=api.V2beta1Run(**body)),
                lambda: marked(self.runs.run_service_list_runs(**listing).runs, mark),
            ).run_id
        when = api.V2beta1CronSchedule(cron=cron(schedule.expression))
        body |= {
            "mode": "ENABLE",
            "no_catchup": not schedule.catch_up,
            "max_concurrency": str(schedule.max_concurrency),
            "trigger": api.V2beta1Trigger(cron_schedule=when),
        }
        return self.once(
            lambda: self.recurring.recurring_run_service_create_recurring_run(
                recurring_run=api.V2beta1RecurringRun(**body)
            ),
            lambda: marked(
                self.recurring.recurring_run_service_list_recurring_runs(**listing).recurring_runs,
                mark,
            ),
        ).recurring_run_id

    def once(self, create: Callable[[], Made], find: Callable[[], Made | None]) -> Made:
        """What `create` makes. When it is not known whether the request had its effect, `find` looks first, so that a
        repetition does not train twice."""
        for attempt in range(self.transport.retries + 1):
            try:
                return create()
            except Refusal as refusal:
                doubtful = refusal.passing and refusal.reached
                if not doubtful and refusal.status != 409:
                    raise
                there, last = find(), refusal
            if there:
                return there
            if last.status in (0, 409):  # without an answer the server may still be at it
                break
            if attempt < self.transport.retries:
                self.transport.says(f"{last}; nothing was made, again")
                time.sleep(self.transport.backoff * 2**attempt)
        doubt = (
            "; nothing was made so far: look before you submit again" if last.status == 0 else ""
        )
        raise Refusal(f"{last}{doubt}", last.status)

    def find(self, some_id: str) -> api.V2beta1Run | api.V2beta1RecurringRun:
        """A run or a recurring run."""
        for look in (
            self.runs.run_service_get_run,
            self.recurring.recurring_run_service_get_recurring_run,
        ):
            try:
                return look(some_id)
            except Refusal as refusal:
                if refusal.status != 404:
                    raise
        self.users()  # perhaps there is nothing at all
        raise Refusal(f"{self.host} has no run or schedule {some_id}", 404)

    def place(self, run: api.V2beta1Run) -> str:
        """The namespace of a run's pods; a server without users has them beside itself."""
        experiment = self.experiments.experiment_service_get_experiment(
            experiment_id=run.experiment_id
        )
        return experiment.namespace or "kubeflow"

    def follow(self, run_id: str, every: float = 10.0, patience: float = 600.0) -> api.V2beta1Run:
        """Says each change of state until the run has ended; a server may be away for `patience` seconds."""
        seen, heard = {}, time.monotonic()
        while True:
            try:
                run = self.runs.run_service_get_run(run_id)
            except Refusal as refusal:
                if not refusal.passing or time.monotonic() - heard > patience:
                    raise Refusal(
                        f"{refusal}; the run goes on: python -m pipeline status {run_id}",
                        refusal.status,
                    ) from None
                self.says(f"{refusal}; the run goes on")
            else:
                heard = time.monotonic()
                for key, name, state in [("", "run", run.state), *steps(run)]:
                    if state and seen.get(key) != state:
                        self.says(f"{time.strftime('%H:%M:%S')} {name} {state}")
                        seen[key] = state
                if run.state in ENDED:
                    return run
            time.sleep(every)

    def over(self, run_id: str, every: float, seconds: float) -> bool:
        """Whether a run that is ending has ended within that time; a server may be away for as long."""
        start = time.monotonic()
        while True:
            try:
                if self.runs.run_service_get_run(run_id).state in ENDED:
                    return True
            except Refusal as refusal:
                if not refusal.passing:
                    raise
            if time.monotonic() - start >= seconds:
                return False
            time.sleep(every)

    def end(self, found: api.V2beta1Run | api.V2beta1RecurringRun) -> None:
        """Ends a run, if it has not ended; deletes a schedule."""
        if isinstance(found, api.V2beta1RecurringRun):
            self.recurring.recurring_run_service_delete_recurring_run(found.recurring_run_id)
        elif found.state not in (*ENDED, "CANCELING"):
            try:
                self.runs.run_service_terminate_run(found.run_id)
            except Refusal:
                state = self.runs.run_service_get_run(found.run_id).state
                if state not in (
                    *ENDED,
                    "CANCELING",
                ):  # it has ended in between, or the first request arrived
                    raise


def marked(listed: Sequence[Made] | None, mark: str) -> Made | None:
    """The one that a submission made."""
    return next((item for item in listed or () if item.description == mark), None)


def steps(run: api.V2beta1Run) -> list[tuple[str, str, str]]:
    """(id, name, state) of a run's steps, without what Argo adds."""
    tasks = run.run_details.task_details if run.run_details else None
    return [
        (task.task_id, task.display_name, task.state)
        for task in tasks or ()
        if not SHELL.match(task.display_name)
        and not ATTEMPT.search(task.display_name)
        and not task.display_name.endswith("-driver")
    ]


def failures(run: api.V2beta1Run) -> list[tuple[str, str]]:
    """(step, message) of the failed steps, the first first. Servers up to 2.17 give no messages: "".

    On older servers a run whose steps failed inside an ExitHandler ends as SUCCEEDED, since the exit handler did
    (kubeflow/pipelines #9577): ask this, not the run's state alone.
    """
    tasks = run.run_details.task_details if run.run_details else None
    failed = [
        task
        for task in tasks or ()
        if task.state == "FAILED" and not ATTEMPT.search(task.display_name)
    ]
    failed = [task for task in failed if not SHELL.match(task.display_name)] or failed
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
