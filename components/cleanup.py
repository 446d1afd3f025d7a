"""Step `clean_up`: the exit handler."""

from kfp import dsl

from components.decorator import component


@component
def clean_up(
    recipes: list[str],
    overrides: list[str],
    workspace: str,
    job_kind: str,
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Delete the unfinished jobs of this run (job_kind "": none) and end its MLflow parent run."""
    from components import afterwards, run_id
    from components.launcher.launch import delete_jobs
    from vitdet import stages

    with afterwards(
        lambda: stages.end_parent_run(recipes, overrides, workspace, run_id(), status.state)
    ):
        deleted, left = delete_jobs(run_id(), own=job_kind) if job_kind else ([], [])
        print(*(f"deleted job {job}" for job in deleted), *left, sep="\n")
