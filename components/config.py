"""Step `configs`: recipes and overrides become configs, or the run ends here."""

from kfp.dsl import Artifact, Output

from components.decorator import component


@component
def configs(
    recipes: list[str], overrides: list[str], workspace: str, settings: Output[Artifact]
) -> list[str]:
    """Resolve the recipes but for what depends on the data; returns the names of the trainings.

    Settings that are wrong and recipes that cannot be compared are refused in one line.
    """
    from vitdet import stages

    names = stages.resolve_configs(recipes, overrides, workspace, settings.path)
    print("\n".join(names))
    return names
