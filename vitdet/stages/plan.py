"""The training runs of a pipeline run: all combinations of recipes, sweep values and seeds."""

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
# A training run adds about 12 nodes to the Workflow, whose size Argo limits to 1 MiB.
MAX_TRAININGS = 64
EXPLICIT = "explicit.json"  # file next to the configs: {name: names of settings that the user set}
DATA = ("data.root", "data.train_split", "data.val_split", "data.max_images")
TRACKING = ("tracking.uri", "tracking.experiment", "tracking.model_name")


def resolve_configs(
    recipes: Sequence[str],
    overrides: Sequence[str],
    workspace: str,
    folder: str,
    sweep: Sequence[str] = (),
    seeds: int = 1,
) -> list[str]:
    """Write FOLDER/NAME.yaml for each training run and return the names.

    Settings that depend on the data are not resolved yet. Raises the errors of `plan_trainings`.
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
    """Return {name: (config, names of the settings that the user set)} for all training runs.

    sweep: strings such as `optim.lr=1e-4,2e-4`; each recipe is trained with each combination of
    these values. seeds: each combination is trained with this many consecutive seeds, starting with
    the seed in its config.

    Raises ValueError or FileNotFoundError for an invalid recipe, setting or sweep, for two
    training runs with equal training settings, for more than MAX_TRAININGS training runs, and for
    training runs that cannot be compared (see `check_comparable`).
    """
    from vitdet.data.layout import SPLITS, explicit_settings

    if not recipes:
        raise ValueError("expected at least one recipe, got none")
    axes = _axes(sweep, overrides)
    if seeds > 1 and any(text.startswith(f"{SEED}=") for text in sweep):
        raise ValueError(f"got seeds={seeds} and a sweep of {SEED}; set only one of them")
    _check_count(len(recipes), math.prod(map(len, axes)), seeds)
    planned: dict[str, tuple[Config, list[str]]] = {}
    labels: dict[str, str] = {}
    for recipe, *chosen in itertools.product(recipes, *axes):
        resolved = resolve_paths(load_config(recipe, [*overrides, *chosen]), Path(workspace))
        for seed in _seeds(resolved, seeds):
            config = override(resolved, seed)
            label = " ".join([recipe, *chosen, *seed])
            name = f"{Path(recipe).stem}-{digest(config)[:8]}"
            if name in planned:
                differing = "; ".join(difference(config, planned[name][0]))
                others = f", although other settings differ ({differing})" if differing else ""
                raise ValueError(
                    f"{label} is given twice with the same training settings{others}; "
                    "specify each training run once"
                )
            explicit = sorted(explicit_settings(recipe, [*overrides, *chosen, *seed]))
            first = next(iter(planned), name)
            other, theirs = planned.get(first, (config, explicit))
            common = set(theirs) & set(explicit)
            unresolved = [key for key in SPLITS if "data.root" in common and key not in common]
            check_comparable(other, config, labels.get(first, label), label, unresolved)
            planned[name], labels[name] = (config, explicit), label
    return planned


def check_comparable(
    first: Config, other: Config, name: str, other_name: str, unresolved: Collection[str] = ()
) -> None:
    """Raise ValueError if two training runs cannot be compared in one table.

    The settings in DATA, SETTINGS and TRACKING must be equal, but `unresolved` settings may differ.
    """
    ours, theirs = flatten(first), flatten(other)
    differing = [
        f"{key} is {theirs[key]}, not {ours[key]}"
        for key in (*DATA, *SETTINGS, *TRACKING)
        if ours[key] != theirs[key] and key not in unresolved
    ]
    if differing:
        raise ValueError(
            f"{other_name} and {name} cannot be compared: in {other_name}, {'; '.join(differing)}; "
            "run them separately, or use the same settings for both"
        )


def _axes(sweep: Sequence[str], overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides for the values of each swept setting; [] without a sweep."""
    axes: dict[str, list[str]] = {}
    fixed = {text.partition("=")[0] for text in overrides}
    for text in sweep:
        key, _, listed = text.partition("=")
        values = re.split(r",(?![^\[]*\])", listed)  # commas outside brackets
        if not key or not all(values):
            raise ValueError(f"sweep {text!r}: expected SECTION.KEY=VALUE,VALUE,...")
        if key in axes or key in fixed:
            raise ValueError(f"sweep {text!r}: {key} is set twice; set it only once")
        if repeated := next((value for value in values if values.count(value) > 1), ""):
            raise ValueError(f"sweep {text!r}: {repeated} is repeated; list each value once")
        axes[key] = [f"{key}={value}" for value in values]
    return list(axes.values())


def _check_count(recipes: int, combinations: int, seeds: int) -> None:
    if seeds < 1:
        raise ValueError(f"seeds: expected a number of at least 1, got {seeds}")
    count = recipes * combinations * seeds
    if count > MAX_TRAININGS:
        factors = f"recipes x combinations x seeds: {recipes} x {combinations} x {seeds}"
        raise ValueError(
            f"got {count} training runs ({factors}), expected at most {MAX_TRAININGS}; submit "
            "several pipeline runs"
        )


def _seeds(config: Config, seeds: int) -> list[list[str]]:
    """Return the overrides for each seed; [[]] if only the config's seed is used."""
    return [[f"{SEED}={config.train.seed + i}"] for i in range(seeds)] if seeds > 1 else [[]]
