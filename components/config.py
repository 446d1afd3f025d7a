"""Step `configs`: recipes and overrides become resolved configs, or the run ends here."""

from kfp.dsl import Artifact, Output

from components.decorator import component


@component
def configs(
    recipes: list[str], overrides: list[str], workspace: str, resolved: Output[Artifact]
) -> list[str]:
    """Resolves the recipes; refuses, in one line, what is wrong or cannot be compared. Gives the experiments' names."""
    from vitdet.workspace import resolve_configs

    names = resolve_configs(recipes, overrides, workspace, resolved.path)
    print("\n".join(names))
    return names
