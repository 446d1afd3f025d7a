"""The trainings of a sweep: every combination of values of some settings, each with several seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from vitdet.config import Config, flatten, override
from vitdet.digest import training_settings

SEED = "train.seed"
# Each training is about 12 nodes of a Workflow, whose status Argo keeps in one object of 1 MiB.
MAX_TRAININGS = 64


def combinations(sweep: Sequence[str], overrides: Sequence[str] = ()) -> list[list[str]]:
    """Return the overrides of each combination, [[]] without a sweep.

    sweep: texts as `optim.lr=1e-4,2e-4`; a comma inside brackets belongs to a value. Raises ValueError
    for a text of another form, a setting that is given twice or also in `overrides`, a repeated value
    and more than MAX_TRAININGS combinations.
    """
    axes: dict[str, list[str]] = {}
    fixed = {one.partition("=")[0] for one in overrides}
    for text in sweep:
        key, _, listed = text.partition("=")
        values = re.split(r",(?![^\[]*\])", listed)
        if not key or not all(values):
            raise ValueError(f"sweep {text!r}: expected SECTION.KEY=VALUE,VALUE,...")
        if key in axes or key in fixed:
            raise ValueError(f"sweep {text!r}: {key} is set twice; set it in one place")
        if repeated := next((one for one in values if values.count(one) > 1), ""):
            raise ValueError(f"sweep {text!r}: {repeated} is given twice")
        axes[key] = [f"{key}={value}" for value in values]
    check_count(1, [len(values) for values in axes.values()], 1)
    return [list(chosen) for chosen in itertools.product(*axes.values())]


def check_count(recipes: int, values: Sequence[int], seeds: int) -> None:
    """Raise ValueError if seeds are fewer than 1 or the trainings more than MAX_TRAININGS."""
    if seeds < 1:
        raise ValueError(f"seeds: expected a number of at least 1, got {seeds}")
    count = recipes * seeds
    for one in values:
        count *= one
    if count > MAX_TRAININGS:
        factors = " x ".join([f"{recipes} recipes", *map(str, values), f"{seeds} seeds"])
        raise ValueError(
            f"{count} trainings ({factors}), but a run has at most {MAX_TRAININGS}: submit several runs"
        )


def with_seeds(config: Config, seeds: int) -> list[tuple[Config, list[str]]]:
    """Return the config with `seeds` seeds from its own upwards, each with the override that sets it."""
    chosen = [[f"{SEED}={config.train.seed + i}"] for i in range(seeds)] if seeds > 1 else [[]]
    return [(override(config, one), one) for one in chosen]


def varied_settings(configs: Sequence[Config]) -> list[dict[str, str]]:
    """Return of each config the settings that affect the training and are not the same in all."""
    every = [training_settings(config) for config in configs]
    keys = [key for key in every[0] if len({one[key] for one in every}) > 1]
    return [{key: str(flatten(config)[key]) for key in keys} for config in configs]
