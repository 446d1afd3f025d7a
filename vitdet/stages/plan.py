"""The training runs of a pipeline run: recipes x combinations of a sweep's values x seeds."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from vitdet.config import Config, flatten, load_config, override, save_config
from vitdet.config.digest import difference, digest
from vitdet.data.protocol import SETTINGS
from vitdet.files import write_json
from vitdet.stages.workspace import resolve_paths

SEED = "train.seed"
# Each training run is about 12 nodes of a Workflow, whose status Argo keeps in one object of 1 MiB.
MAX_TRAININGS = 64
# file next to the configs: the settings of each config that the user set
EXPLICIT = "explicit.json"
DATA = ("data.root", "data.train_split", "data.val_split", "data.max_images")
PLACE = ("tracking.uri", "tracking.experiment", "tracking.model_name")


def resolve_configs(
    recipes: Sequence[str],
    overrides: Sequence[str],
    workspace: str,
    folder: str,
    sweep: Sequence[str] = (),
    seeds: int = 1,
) -> list[str]:
    """Write folder/NAME.yaml for each training run and return the names.

    The configs have all settings except those that depend on the data. Raises the errors of
    `plan_trainings`.
    """
    planned = plan_trainings(recipes, overrides, workspace, sweep, seeds)
    for name, (config, _) in planned.items():
        save_config(config, Path(folder) / f"{name}.yaml")
    write_json(Path(folder) / EXPLICIT, {name: chosen for name, (_, chosen) in planned.items()})
    return list(planned)


def read_configs(folder: str | Path) -> dict[str, Config]:
    """Return the configs that `resolve_configs` or `prepare_data` wrote to a folder, by name."""
    return {path.stem: load_config(path) for path in sorted(Path(folder).glob("*.yaml"))}


def plan_trainings(
    recipes: Sequence[str],
    overrides: Sequence[str],
    workspace: str,
    sweep: Sequence[str] = (),
    seeds: int = 1,
) -> dict[str, tuple[Config, list[str]]]:
    """Return {name: (config, the settings that the user set)} of each training run.

    Each recipe is trained with each combination of values in `sweep`, strings such as
    `optim.lr=1e-4,2e-4`, and each of these with `seeds` consecutive seeds, starting with that of
    the config.

    Raises ValueError or FileNotFoundError for a wrong recipe, setting or sweep, for the same
    training run twice, for more than MAX_TRAININGS training runs, and for recipes with different
    data, evaluation settings or MLflow destinations, which cannot be compared in one table.
    """
    from vitdet.data.layout import SPLITS, explicit_settings

    if not recipes:
        raise ValueError("give at least one recipe")
    combinations = _combinations(sweep, overrides)
    if seeds > 1 and any(one.startswith(f"{SEED}=") for one in sweep):
        raise ValueError(f"the sweep already contains {SEED}; leave out the number of seeds")
    _check_count(len(recipes), [len(combinations)] if sweep else [], seeds)
    planned: dict[str, tuple[Config, list[str]]] = {}
    labels: dict[str, str] = {}
    for recipe, chosen in itertools.product(recipes, combinations):
        resolved = resolve_paths(load_config(recipe, [*overrides, *chosen]), Path(workspace))
        for seed in _seeds(resolved, seeds):
            config = override(resolved, seed)
            label = " ".join([recipe, *chosen, *seed])
            name = f"{Path(recipe).stem}-{digest(config)[:8]}"
            if name in planned:
                differing = "; ".join(difference(config, planned[name][0]))
                raise ValueError(
                    f"{label} is given twice with the same settings"
                    + (f" for training; only others differ ({differing})" if differing else "")
                    + ": there is nothing to compare"
                )
            explicit = sorted(explicit_settings(recipe, [*overrides, *chosen, *seed]))
            first = next(iter(planned), name)
            other, theirs = planned.get(first, (config, explicit))
            named = set(theirs) & set(explicit)
            unknown = [key for key in SPLITS if key not in named] if "data.root" in named else []
            check_comparable(other, config, labels.get(first, label), label, unknown)
            planned[name], labels[name] = (config, explicit), label
    return planned


def check_comparable(
    first: Config, other: Config, name: str, other_name: str, unknown: Collection[str] = ()
) -> None:
    """Check that two configs can be compared in one table. unknown: settings that are unresolved.

    Raises ValueError if they have different data, evaluation settings or MLflow destinations.
    """
    ours, theirs = flatten(first), flatten(other)
    differing = [
        f"{key} is {theirs[key]}, not {ours[key]}"
        for key in (*DATA, *SETTINGS, *PLACE)
        if ours[key] != theirs[key] and key not in unknown
    ]
    if differing:
        raise ValueError(
            f"{other_name} and {name} cannot be compared: in {other_name}, {'; '.join(differing)}; "
            "run them separately, or use the same settings for both"
        )


def _combinations(sweep: Sequence[str], overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each combination, [[]] without a sweep."""
    axes: dict[str, list[str]] = {}
    fixed = {one.partition("=")[0] for one in overrides}
    for text in sweep:
        key, _, listed = text.partition("=")
        values = re.split(r",(?![^\[]*\])", listed)  # not at commas inside brackets
        if not key or not all(values):
            raise ValueError(f"sweep {text!r}: expected SECTION.KEY=VALUE,VALUE,...")
        if key in axes or key in fixed:
            raise ValueError(f"sweep {text!r}: {key} is set twice; set it in one place")
        if repeated := next((one for one in values if values.count(one) > 1), ""):
            raise ValueError(f"sweep {text!r}: {repeated} is given twice")
        axes[key] = [f"{key}={value}" for value in values]
    _check_count(1, [len(values) for values in axes.values()], 1)
    return [list(chosen) for chosen in itertools.product(*axes.values())]


def _check_count(recipes: int, values: Sequence[int], seeds: int) -> None:
    if seeds < 1:
        raise ValueError(f"seeds: expected a number of at least 1, got {seeds}")
    count = recipes * math.prod(values) * seeds
    if count > MAX_TRAININGS:
        factors = " x ".join([f"{recipes} recipes", *map(str, values), f"{seeds} seeds"])
        raise ValueError(
            f"{count} training runs ({factors}), but a pipeline run has at most {MAX_TRAININGS}: "
            "submit several"
        )


def _seeds(config: Config, seeds: int) -> list[list[str]]:
    """Return the overrides that set each seed; a single seed is that of the config."""
    return [[f"{SEED}={config.train.seed + i}"] for i in range(seeds)] if seeds > 1 else [[]]
