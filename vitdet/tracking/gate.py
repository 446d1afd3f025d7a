"""The gate: decides from two evaluations on the same data whether a detector replaces the champion.

Metrics are compared with four significant digits, the precision of the tags in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vitdet.config import GateConfig
from vitdet.evaluation.bootstrap import METRICS, MIN_IMAGES, WeightedAP, bootstrap
from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.matches import Matches


@dataclass(frozen=True)
class Evaluation:
    """An evaluation. metrics: by name, AP in percent. matches: by kind ("bbox", "segm").

    matches are empty if they were not stored; remedy: what to do in this case if the gate needs
    them.
    """

    metrics: Mapping[str, float | None]
    matches: Mapping[str, Matches] = field(default_factory=dict)
    remedy: str = "run `vitdet evaluate --plots FOLDER` and register with --plots FOLDER"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate replaces the champion, and why, in one line."""

    passed: bool
    reason: str


class RejectedError(ValueError):
    """The gate rejected a version, which remains registered.

    registered: its name, version and alias.
    """

    def __init__(self, message: str, registered: Mapping[str, str]) -> None:
        super().__init__(message)
        self.registered = registered


def label(gate: GateConfig) -> str:
    """Return the name of the metric in messages, as in `box AP50`."""
    return gate.metric.replace("_ap", " AP")


def compares_matches(gate: GateConfig) -> bool:
    """Whether the gate needs the per-image matches of the champion, too."""
    return gate.confidence > 0 or gate.max_class_loss < 100


def missing(gate: GateConfig, champion: Evaluation) -> str:
    """Return what the gate needs and this evaluation of the champion lacks; "" if nothing."""
    if champion.metrics.get(gate.metric) is None:
        return "AP"
    return "per-image matches" if compares_matches(gate) and not _matches(gate, champion) else ""


def flaw(gate: GateConfig, candidate: Evaluation) -> str:
    """Return why a candidate is rejected regardless of the champion; "" if it is not."""
    value, name = candidate.metrics.get(gate.metric), label(gate)
    if value is None or not 0 <= value <= 100:
        return f"{name} is {value}: cannot be compared"
    if gate.min_class_ap == 0 and not compares_matches(gate):
        return ""
    matches = _matches(gate, candidate)
    if matches is None:
        return (
            f"{name} {value:.4g}: gate.min_class_ap, gate.max_class_loss and gate.confidence need "
            f"the per-image matches; {candidate.remedy}"
        )
    values = _class_values(gate, matches)
    if below := {one: ap for one, ap in values.items() if ap < gate.min_class_ap}:
        worst = min(below, key=below.__getitem__)
        return (
            f"{name} {value:.4g}: class {worst!r} has {below[worst]:.4g}, gate.min_class_ap is "
            f"{gate.min_class_ap:g}{_others(below)}"
        )
    return ""


def compare(
    gate: GateConfig, candidate: Evaluation, champion: Evaluation, champion_name: str
) -> Verdict:
    """Compare a candidate without a `flaw` with a champion of which nothing is `missing`."""
    value, before = candidate.metrics[gate.metric], champion.metrics[gate.metric]
    assert value is not None and before is not None
    gain = round(float(f"{value:.4g}") - float(f"{before:.4g}"), 9)
    passed = gain > gate.min_gain
    relation = "above" if passed else "no better than"
    if not passed and gain > 0:
        less = "no more than" if gain == gate.min_gain else "less than"
        relation = f"{less} gate.min_gain ({gate.min_gain:g}) above"
    reason = f"{label(gate)} {value:.4g}, {relation} the {before:.4g} of {champion_name}"
    if not passed or not compares_matches(gate):
        return Verdict(passed, reason)
    ours, theirs = _matches(gate, candidate), _matches(gate, champion)
    assert ours is not None and theirs is not None
    known = _class_values(gate, theirs)
    losses = {
        one: known[one] - ap
        for one, ap in _class_values(gate, ours).items()
        if known.get(one, 0.0) - ap > gate.max_class_loss
    }
    if losses:
        worst = max(losses, key=losses.__getitem__)
        return Verdict(
            False,
            f"{reason}, but class {worst!r} lost {losses[worst]:.4g}, but gate.max_class_loss is "
            f"{gate.max_class_loss:g}{_others(losses)}",
        )
    if not gate.confidence:
        return Verdict(True, reason)
    try:  # the gain with its paired bootstrap interval, as `vitdet compare` computes it
        first, second = bootstrap([ours, theirs])
        found = first.difference(second, _metric(gate), confidence=gate.confidence)
    except ValueError as error:
        return Verdict(False, f"{reason}, but it cannot be compared: {error}")
    if found is None or found.is_significant is None:
        return Verdict(
            False,
            f"{reason}, but gate.confidence needs {MIN_IMAGES} images with objects, and the "
            f"validation data has {found.images if found else 0}",
        )
    certain = found.low > gate.min_gain
    return Verdict(
        certain,
        f"{reason}, {'and' if certain else 'but'} the lower bound of the gain at "
        f"{gate.confidence:.4g} confidence is {found.low:+.3g}, "
        f"{'above' if certain else 'not above'} {gate.min_gain:g}",
    )


def _matches(gate: GateConfig, evaluation: Evaluation) -> Matches | None:
    prefix = gate.metric.partition("_")[0]
    return next((one for kind, one in evaluation.matches.items() if NAMES[kind] == prefix), None)


def _metric(gate: GateConfig) -> str:
    return gate.metric.partition("_")[2]


def _class_values(gate: GateConfig, matches: Matches) -> dict[str, float]:
    """The metric of each class that has objects."""
    values = WeightedAP(matches)(np.ones(len(matches.image_ids), np.int32))
    row = values[METRICS.index(_metric(gate)), 1:].tolist()
    named = zip(matches.class_names, row, strict=True)
    return {name: value for name, value in named if not np.isnan(value)}


def _others(classes: Mapping[str, float]) -> str:
    return f" ({len(classes) - 1} more classes as well)" if len(classes) > 1 else ""
