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
    table: dsl.Output[dsl.HTML],
) -> None:
    """End the MLflow parent run and clean up training jobs; in a local run, `job_kind` is "".

    Also create a table of all training runs, with the reasons if any did not succeed.
    """
    from components import afterwards, run_id
    from components.launcher.launch import clean_up_jobs
    from vitdet import stages

    with (
        afterwards(
            lambda: stages.end_parent_run(recipes, overrides, workspace, run_id(), status.state)
        ),
        afterwards(lambda: print(stages.compare_finished(workspace, run_id(), table.path))),
    ):
        succeeded = status.state in ("SUCCEEDED", "COMPLETE")
        deleted, left = clean_up_jobs(run_id(), job_kind, succeeded) if job_kind else ([], [])
        print(*(f"deleted job {job}" for job in deleted), *left, sep="\n")
