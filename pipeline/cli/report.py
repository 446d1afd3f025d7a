"""Print a run for `status` and `terminate`: its state, its steps and its training jobs."""

from __future__ import annotations

from kfp_server_api import V2beta1Run

from pipeline.client import ENDED, Server, failed_steps, steps


def print_run(server: Server, run: V2beta1Run, namespace: str, remark: str = "") -> None:
    """Print a run, its steps, and its training jobs with their progress.

    Args:
        namespace: Namespace of the jobs; if empty, the namespace of the run's pods.
        remark: Text that is printed after the state.
    """
    failed = dict(failed_steps(run))
    ended = run.finished_at and run.state in ENDED
    time = f", {run.finished_at:%Y-%m-%d %H:%M:%S} UTC" if ended else ""
    hidden = "; at least one step has failed" if failed and run.state == "SUCCEEDED" else ""
    print(
        f"run   {run.display_name}\nid    {run.run_id}\nstate {run.state}{time}{hidden}{remark}\n"
        f"link  {server.link(run.run_id)}"
    )
    for _, name, state in steps(run):
        reason = f": {failed[name]}" if failed.get(name) else ""
        print(f"  {state or 'PENDING':<10} {name}{reason}")
    try:
        namespace = namespace or server.pod_namespace(run)
        lines = job_lines(run, namespace)
    except (ValueError, RuntimeError, OSError) as error:
        lines = [f"not shown: {' '.join(str(error).split())}"]
    for line in lines:
        print(f"  job {line}")


def job_lines(run: V2beta1Run, namespace: str) -> list[str]:
    """Return a line for each training job of a run.

    Raises PermissionError if listing jobs is forbidden, RuntimeError if the cluster does not
    respond, and ValueError if the run's job_kind is unknown.
    """
    from components.launcher.client import connect, list_jobs
    from components.launcher.progress import PROGRESS, describe
    from components.launcher.status import job_phase
    from components.launcher.templates import KINDS, RUN, label

    kind = KINDS.get(job_kind(run).lower())
    if kind is None:
        raise ValueError(f"the run's job_kind is {job_kind(run)!r}, expected {' or '.join(KINDS)}")
    api, _ = connect(retries=0)
    lines = []
    for job in list_jobs(api, kind, namespace, f"{RUN}={label(run.run_id)}"):
        phase, message = job_phase(kind, job)
        progress = describe((job["metadata"].get("annotations") or {}).get(PROGRESS, ""))
        parts = [phase or "pending", progress, message if phase == "failed" else ""]
        words = [" ".join(part.split()) for part in parts if part]
        lines.append(f"{job['metadata']['name']}: {', '.join(words)}")
    return lines


def job_kind(run: V2beta1Run) -> str:
    """Return a run's job_kind: the run's parameter, or the pipeline's default."""
    parameters = (run.runtime_config and run.runtime_config.parameters) or {}
    spec = run.pipeline_spec or {}
    inputs = spec.get("pipeline_spec", spec).get("root", {}).get("inputDefinitions", {})
    default = inputs.get("parameters", {}).get("job_kind", {}).get("defaultValue")
    return parameters.get("job_kind") or default or "pytorchjob"
