"""Steps `announce` and `compare`: create the MLflow parent run and the table of training runs."""

from kfp.dsl import HTML, Artifact, Input, Markdown, Output

from components.decorator import component


@component
def announce(settings: Input[Artifact], workspace: str) -> None:
    """Create the MLflow parent run. If MLflow does not respond, the step fails before training."""
    from components import run_id
    from vitdet import stages

    print(stages.start_parent_run(settings.path, workspace, run_id()))


@component
def compare(
    verdicts: Input[list[Artifact]],
    resolved: Input[Artifact],
    workspace: str,
    table: Output[HTML],
    links: Output[Markdown],
) -> None:
    """Create a table that compares all training runs.

    links: the table in Markdown with links to MLflow; the Kubeflow UI does not open links in HTML.
    """
    from components import run_id
    from vitdet import stages

    paths = [verdict.path for verdict in verdicts]
    print(stages.compare(paths, resolved.path, workspace, run_id(), table.path, links.path))
