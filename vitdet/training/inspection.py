"""Checks of a training run's data against its config, before the detector is built."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vitdet.config import Config
from vitdet.config.suggestions import nearest
from vitdet.data import fingerprint
from vitdet.data.coco import CocoSplit
from vitdet.data.dataset import read_split
from vitdet.evaluation.evaluator import measured_metrics, read_validation

log = logging.getLogger(__name__)


def inspect_data(config: Config, split: CocoSplit) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the class names of the validation split and the fingerprints of both splits.

    Warns if the mask head needs outlines that a split lacks. Raises the errors of `check_metric`.
    """
    data = config.data
    validation = read_split(data, data.val_split)
    if config.model.mask.enabled and not split.outlines:
        effect = "the mask head is not trained; model.mask.enabled=false removes it"
        log.warning("%s: no object in %s has an outline: %s", data.root, data.train_split, effect)
    elif config.model.mask.enabled and not validation.outlines:
        effect = "evaluations measure box AP only"
        log.warning("%s: no object in %s has an outline: %s", data.root, data.val_split, effect)
    check_metric(config)
    prints = {
        "train": fingerprint.fingerprint(data, data.train_split, split.records),
        "val": fingerprint.fingerprint(data, data.val_split, validation.records),
    }
    return validation.class_names, prints


def check_metric(config: Config) -> None:
    """Raise ValueError if evaluations cannot measure AP or the metric in train.keep_best."""
    settings = config.train
    if not (settings.keep_best or settings.patience):
        read_validation(config.data, config.evaluate)
        return
    metric, measured = settings.keep_best or "box_ap", measured_metrics(config)
    if metric not in measured:
        cause = "train.keep_best" if settings.keep_best else "train.patience"
        raise ValueError(
            f"{cause}: evaluations on {config.data.root} do not measure {metric}, for "
            f"which no object in {config.data.val_split} counts; {nearest(metric, measured)}"
        )


def check_classes(config: Config, trained: Sequence[str], validated: Sequence[str]) -> None:
    """Raise ValueError if the splits' classes differ, or their number differs from the config."""
    data, expected = config.data, config.model.roi_heads.num_classes
    if len(trained) != expected:
        found = f"{len(trained)} class{'es' if len(trained) != 1 else ''}"
        raise ValueError(
            f"{data.root}: {data.train_split} has {found}, but "
            f"model.roi_heads.num_classes is {expected}; set it to {len(trained)}"
        )
    if tuple(validated) != tuple(trained):
        single = ", ".join(sorted(set(trained) ^ set(validated)))
        found = f"different classes (not in both: {single})" if single else "different class orders"
        raise ValueError(f"{data.root}: {data.train_split} and {data.val_split} have {found}")
