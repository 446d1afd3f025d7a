"""Differences between two configs, and digests that name training runs."""

from __future__ import annotations

import hashlib
import json
from functools import reduce

from vitdet.config.load import flatten, to_dict
from vitdet.config.schema import Config
from vitdet.config.sections import list_settings

# settings added after version 0.1
LATER = (
    "model.mask.enabled",
    "data.max_pixels",
    "optim.scale_lr",
    "optim.lr_batch_size",
    "train.accumulate",
    "train.activation_checkpointing",
    "train.compile",
    "evaluate.precision",
    "evaluate.compile",
    "data.bit_depth",
    "data.keep_empty",
    "evaluate.max_images",
    "train.keep_best",
    "train.patience",
    "gate.metric",
    "gate.min_gain",
    "gate.min_class_ap",
    "gate.max_class_loss",
    "gate.confidence",
)


def difference(ours: Config, theirs: Config, *, affecting_weights: bool | None = None) -> list[str]:
    """Return a string such as `optim.lr: 0.0001, not 0.0002` for each setting that differs.

    affecting_weights: compare only the settings that affect the trained weights (True), only those
    that do not (False), or all settings (None).
    """
    left, right, settings = flatten(ours), flatten(theirs), list_settings(ours)
    wanted = [k for k in left if affecting_weights is None or settings[k][1] != affecting_weights]
    return [f"{key}: {left[key]}, not {right[key]}" for key in wanted if left[key] != right[key]]


def training_settings(config: Config) -> dict[str, bool | int | float | str]:
    """Return the settings in `flatten(config)` that affect the trained weights."""
    settings = list_settings(config)
    return {key: value for key, value in flatten(config).items() if not settings[key][1]}


def digest(config: Config) -> str:
    """Return 12 hexadecimal digits that name a training run.

    Covers only settings that affect the trained weights and differ from their defaults, so that new
    settings do not change the names of existing runs.
    """
    defaults, settings = flatten(type(config)()), training_settings(config)
    changed = {key: value for key, value in settings.items() if value != defaults[key]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def legacy_digest(config: Config) -> str | None:
    """Return the config digest that version 0.1 used in folder names.

    Returns None if a setting in `LATER` affects the weights and differs from its default.
    """
    tree, settings, defaults = to_dict(config), list_settings(config), list_settings(type(config)())
    for key in LATER:
        *parents, leaf = key.split(".")
        del reduce(dict.__getitem__, parents, tree)[leaf]
    tree = {name: section for name, section in tree.items() if section}
    found = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
    changed = [key for key in LATER if settings[key] != defaults[key] and not settings[key][1]]
    return None if changed else found
