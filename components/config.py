"""Step `configs`: resolves and validates the configs of the recipes."""

from kfp.dsl import Artifact, Output

from components.decorator import component


@component
def configs(
    recipes: list[str],
    overrides: list[str],
    sweep: list[str],
    seeds: int,
    workspace: str,
    settings: Output[Artifact],
) -> list[str]:
    """Resolve all settings that do not depend on the data; return the training runs' names."""
    from vitdet import stages

    names = stages.resolve_configs(recipes, overrides, workspace, settings.path, sweep, seeds)
    print("\n".join(names))
    return names
