"""Start and delete training jobs: what a pipeline step and `python -m pipeline terminate` call.

Four mechanisms prevent a job from outliving its run: the step deletes it on SIGTERM; the API server
deletes it together with the step's pod (ownerReference); `delete_jobs` deletes the jobs of a run;
the operator ends it after its deadline (a TrainJob on time). The training operator 1.9 checks the
deadline only when the job or one of its pods changes, and every 10 hours (its
work queue for delayed checks is a FakeWorkQueue: pytorchjob_controller.go), so a hanging job may
run that much longer. It deletes a finished PyTorchJob after its time to live; a TrainJob has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from components.launcher.client import (
    JobClient,
    Timeouts,
    connect,
    delete_job,
    list_jobs,
    owner_reference,
)
from components.launcher.follower import Follower
from components.launcher.status import retention
from components.launcher.templates import (
    KINDS,
    RECIPE,
    RUN,
    JobRequest,
    fill_template,
    job_name,
    label,
    mount_paths,
)

# "0" in the first pod of a step; not set by older servers (argocompiler/common.go)
RETRY_INDEX = "KFP_RETRY_INDEX"


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
) -> None:
    """Train in a job of `nodes` pods; block until it has succeeded.

    An existing job of the same run and recipe is followed, so that a step can be retried; if it has
    failed, the retried step fails immediately with the same message.

    Args:
        template: YAML of the job.
        kind: A key of KINDS.
        name: The recipe.
        task_config: The fields of kfp's dsl.TaskConfig.
        out: Called with each line of rank 0's log and of the job's progress.
        finished: Returns whether the training is complete; called if the job is gone or has failed.

    Raises:
        RuntimeError: The job fails, cannot start, is deleted, or its creation is forbidden.
        ValueError: The template does not fit the request.
    """
    job_kind = KINDS.get(kind.lower())
    if job_kind is None:
        raise ValueError(f"job kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    timeouts = timeouts or Timeouts()
    api, namespace = connect()
    request = JobRequest(
        name=job_name(run_id, name),
        namespace=namespace,
        labels={RUN: label(run_id), RECIPE: label(name)},
        image=image,
        args=args,
        nodes=nodes,
        pool=pool,
        task=task_config or {},
        owner=owner_reference(),
    )
    job = fill_template(template, job_kind, request)
    folders = [folder.rstrip("/") for folder in mount_paths(job_kind, job)]
    if folders and not any(
        f"{workspace.rstrip('/')}/".startswith(f"{folder}/") for folder in folders
    ):
        raise ValueError(
            f"the job's pods do not mount the workspace {workspace}; they mount {', '.join(folders)}"
        )
    client = JobClient(api, job_kind, request.name, namespace, out, timeouts)
    first_attempt = os.environ.get(RETRY_INDEX) == "0"
    Follower(client, job_kind, job, out, timeouts, finished, first_attempt).run()


def delete_jobs(run_id: str, namespace: str = "", own: str = "") -> tuple[list[str], list[str]]:
    """Delete the unfinished training jobs of a pipeline run.

    Args:
        namespace: "" is the current namespace.
        own: The kind of the run's jobs; "" if unknown.

    Returns:
        The names of the deleted jobs, and one line for each job that is not deleted: a finished job,
        with how long it and its pods' logs are kept, or a job that is already being deleted; and
        for each kind that may not be listed, e.g. if the account may use one operator only.

    Raises:
        PermissionError: Listing `own`, or every kind, or a deletion is forbidden.
        RuntimeError: The API server does not respond.
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
            left.append(f"{kind.plural} were not listed: {error}")
            continue
        for job in jobs:
            name = job["metadata"]["name"]
            if job["metadata"].get("deletionTimestamp"):
                left.append(f"{name}: is already being deleted")
            elif kept := retention(kind, job):
                left.append(f"{name}: {kept}")
            else:
                delete_job(api, kind, namespace, name)
                deleted.append(name)
    if own.lower() in forbidden or len(forbidden) == len(KINDS):
        refused = forbidden.get(own.lower()) or next(iter(forbidden.values()))
        raise PermissionError(
            f"{refused}; deleted: {', '.join(deleted)}" if deleted else str(refused)
        )
    return deleted, left
