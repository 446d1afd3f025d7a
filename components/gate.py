"""Step `gate`: does the detector beat the champion of the model registry?"""

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
    """'passed' or 'stopped', by box AP on the same data. The first model passes, a tie does not."""
    from vitdet import workspace as steps

    passed, reason = steps.judge(figures.path, resolved.path, name, workspace, verdict.path)
    print(f"{name}: {reason}")
    return "passed" if passed else "stopped"
