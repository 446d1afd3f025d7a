"""Start and delete training jobs, for pipeline steps and `python -m pipeline terminate`.

A job belongs to its pipeline run, not to the step's pod, which may be evicted or lost. Kubernetes
deletes the job together with the run's Workflow (ownerReference). A step that is stopped because
the run is ending deletes its job; `delete_jobs` deletes all unfinished jobs of a run.

The operator ends a job at its deadline. A hanging PyTorchJob may run up to 10 hours longer: the
training operator 1.9 checks the deadline only every 10 hours and when the job or one of its pods
changes (pytorchjob_controller.go, FakeWorkQueue).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from components.launcher.client import (
    JobClient,
    Timeouts,
    connect,
    delete_job,
    list_jobs,
    release_job,
)
from components.launcher.follower import Follower
from components.launcher.status import annotations_of, deadline, job_phase, retention
from components.launcher.step import Step
from components.launcher.templates import (
    FAILURE,
    KINDS,
    RECIPE,
    RUN,
    STARTED,
    JobRequest,
    Kind,
    fill_template,
    job_name,
    label,
    mount_paths,
    process_counts,
)
from components.launcher.workflow import without_run

# Returns "" to delete a job, or one line with the reason to keep it
Keep = Callable[[Kind, dict], str]


def launch(
    *,
    template: str,
    kind: str,
    run_id: str,
    name: str,
    args: list[str],
    nodes: int,
    pool: str,
    image: str,
    workspace: str,
    task_config: dict | None,
    out: Callable[[str], None] = print,
    timeouts: Timeouts | None = None,
    finished: Callable[[], bool] = lambda: False,
    check_processes: Callable[[int], None] = lambda count: None,
    keep_logs: Callable[[dict[str, str]], None] = lambda files: None,
) -> None:
    """Train in a job of `nodes` pods; block until it has succeeded.

    An existing job with this `run_id` and `name` is followed. If that job has failed, the step's
    first attempt after a retry of the run recreates it; other attempts fail with its message.

    Args:
        template: YAML of the job.
        kind: A key of KINDS.
        name: The name of the training run.
        task_config: The fields of kfp's dsl.TaskConfig.
        out: Called with each line of rank 0's log, and with messages about the job.
        finished: Returns whether training is complete; called if the job is gone or has failed.
        check_processes: Raises ValueError if this number of processes is not supported.
        keep_logs: Called at the end with a dictionary: file name -> last lines of a rank or pod.

    Raises:
        RuntimeError: The job fails, cannot start or is deleted, or an API request fails.
        ValueError: The kind is unknown, or the template does not fit the other arguments.
    """
    job_kind = KINDS.get(kind.lower())
    if job_kind is None:
        raise ValueError(f"job kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    timeouts = timeouts or Timeouts()
    api, namespace = connect(retries=0)
    client = JobClient(api, job_kind, job_name(run_id, name), namespace, out, timeouts)
    step = Step(client)
    request = JobRequest(
        name=client.name,
        namespace=namespace,
        labels={RUN: label(run_id), RECIPE: label(name)},
        image=image,
        args=args,
        nodes=nodes,
        pool=pool,
        task=task_config or {},
        owner=step.owner,
    )
    job = fill_template(template, job_kind, request)
    for count in process_counts(job_kind, job):
        check_processes(count)
    folders = mount_paths(job_kind, job)
    if folders and not any(Path(workspace).is_relative_to(folder) for folder in folders):
        mounted = ", ".join(folders)
        raise ValueError(
            f"the job's pods do not mount the workspace {workspace}; they mount {mounted}"
        )
    follow = (finished, step.end_reason, step.first_attempt, keep_logs)
    Follower(client, job_kind, job, out, timeouts, *follow).run()


def clean_up_jobs(run_id: str, own: str, succeeded: bool) -> tuple[list[str], list[str]]:
    """Delete a run's unfinished jobs from its exit handler; returns the same as `delete_jobs`.

    A job that is still training after a failed run, e.g. because its step was evicted too often, is
    left running, so that a retry of the run can follow it. The job's owner reference to the
    Workflow is removed, as deleting the Workflow would delete the job. All other unfinished jobs
    are deleted. Raises RuntimeError if it is unknown whether a user ended the run, so that no job
    is deleted by mistake; the step is then retried.
    """
    api, namespace = connect()
    step = Step(JobClient(api, KINDS["pytorchjob"], "", namespace, print, Timeouts()))
    ended = succeeded or step.run_ended()

    def keep(kind: Kind, job: dict) -> str:
        name, annotations = job["metadata"]["name"], annotations_of(job)
        if ended or FAILURE in annotations or STARTED not in annotations:
            return ""
        release_job(api, kind, namespace, name, without_run(job))
        phase = job_phase(kind, job)[0] or "created"
        limit = f"at its deadline ({deadline(job)}) or" if deadline(job) else "only"
        return (
            f"{name} ({phase}) is kept. Retrying the run follows the job again; otherwise the job "
            f"ends {limit} with `python -m pipeline terminate {run_id}`"
        )

    return delete_jobs(run_id, own=own, keep=keep)


def delete_jobs(
    run_id: str, namespace: str = "", own: str = "", keep: Keep = lambda kind, job: ""
) -> tuple[list[str], list[str]]:
    """Delete the unfinished training jobs of a pipeline run.

    Args:
        namespace: The jobs' namespace; "" for the current namespace.
        own: The job_kind of the run, a key of KINDS; "" if unknown.
        keep: Called for each unfinished job; returns "" to delete it, else why it is kept.

    Returns:
        The names of the deleted jobs, and messages: one for each job that was not deleted, and one
        for each kind whose jobs could not be listed. The message about a finished job states how
        long the job and its pods' logs are kept.

    Raises:
        PermissionError: Listing the jobs of `own` or of all kinds, or deleting a job, is forbidden.
        RuntimeError: The API server does not respond or rejects a request.
    """
    api, current = connect()
    namespace = namespace or current
    deleted: list[str] = []
    left: list[str] = []
    forbidden: dict[str, PermissionError] = {}
    for word, kind in KINDS.items():
        try:
            jobs = list_jobs(api, kind, namespace, f"{RUN}={label(run_id)}")
        except PermissionError as error:
            forbidden[word] = error
            left.append(f"{kind.plural} could not be listed: {error}")
            continue
        for job in jobs:
            name = job["metadata"]["name"]
            if job["metadata"].get("deletionTimestamp"):
                left.append(f"{name}: already being deleted")
            elif kept := retention(kind, job):
                left.append(f"{name}: {kept}")
            elif kept := keep(kind, job):
                left.append(kept)
            else:
                delete_job(api, kind, namespace, name)
                deleted.append(name)
    if own.lower() in forbidden or len(forbidden) == len(KINDS):
        refused = forbidden.get(own.lower()) or next(iter(forbidden.values()))
        raise PermissionError(
            f"{refused}; jobs deleted before this error: {', '.join(deleted)}"
            if deleted
            else str(refused)
        )
    return deleted, left
