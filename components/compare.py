"""Steps `announce` and `compare`: the parent run of all trainings in MLflow, and at the end their table."""

from kfp.dsl import Artifact, Input, Markdown, Output

from components.decorator import component


@component
def announce(settings: Input[Artifact], workspace: str) -> None:
    """Makes the parent run, before GPUs are asked for: without MLflow nothing could be registered in the end."""
    from components import run_id
    from vitdet import stages

    print(stages.start_parent_run(settings.path, workspace, run_id()))


@component
def compare(
    verdicts: Input[list[Artifact]],
    resolved: Input[Artifact],
    workspace: str,
    table: Output[Markdown],
) -> None:
    """One table of all recipes, which were evaluated on the same data with the same settings."""
    from components import run_id
    from vitdet import stages

    text = stages.compare(
        [verdict.path for verdict in verdicts], resolved.path, workspace, run_id(), table.path
    )
    print(text)
