"""Step `gate`: compares the detector with the champion in the model registry."""

from kfp.dsl import Artifact, Input, Metrics, Output

from components.decorator import component


@component
def gate(
    figures: Input[Metrics],
    name: str,
    resolved: Input[Artifact],
    workspace: str,
    verdict: Output[Artifact],
) -> str:
    """Compare the detector with the champion on the same data; return "passed" or "stopped"."""
    from components import run_id
    from vitdet import stages

    passed, reason = stages.gate(
        figures.path, resolved.path, name, workspace, run_id(), verdict.path
    )
    print(f"{name}: {reason}")
    return "passed" if passed else "stopped"
