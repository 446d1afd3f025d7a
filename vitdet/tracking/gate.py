"""The gate: compares two evaluations on the same data to decide whether to replace the champion.

The compared AP is rounded to four significant digits, as in the registry's tags.
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
    """Metrics by name (AP in percent), and per-image matches by IoU type ("bbox", "segm").

    `remedy` is the advice to the user if the gate needs matches and `matches` is empty.
    """

    metrics: Mapping[str, float | None]
    matches: Mapping[str, Matches] = field(default_factory=dict)
    remedy: str = "run `vitdet evaluate --plots FOLDER` and register with --plots FOLDER"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate replaces the champion, and the reason in one line."""

    passed: bool
    reason: str


class RejectedError(ValueError):
    """The gate rejected a version, which remains registered.

    The attribute `registered` contains the model's name, the version and the alias.
    """

    def __init__(self, message: str, registered: Mapping[str, str]) -> None:
        super().__init__(message)
        self.registered = registered


def label(gate: GateConfig) -> str:
    """Return the name of the gate's metric for messages, e.g. `box AP50`."""
    return gate.metric.replace("_ap", " AP")


def compares_matches(gate: GateConfig) -> bool:
    """Return whether the gate needs the champion's per-image matches, not only the metric."""
    return gate.confidence > 0 or gate.max_class_loss < 100


def missing(gate: GateConfig, champion: Evaluation) -> str:
    """Return what the gate needs but the champion's evaluation lacks; "" if it is complete."""
    if champion.metrics.get(gate.metric) is None:
        return "AP"
    return "per-image matches" if compares_matches(gate) and not _matches(gate, champion) else ""


def flaw(gate: GateConfig, candidate: Evaluation) -> str:
    """Return why a candidate is rejected regardless of the champion; "" if there is no reason."""
    value, name = candidate.metrics.get(gate.metric), label(gate)
    if value is None or not 0 <= value <= 100:
        return f"{name} is {value}, which cannot be compared"
    if gate.min_class_ap == 0 and not compares_matches(gate):
        return ""
    matches = _matches(gate, candidate)
    if matches is None:
        return (
            f"{name} {value:.4g}: gate.min_class_ap, gate.max_class_loss and gate.confidence need "
            f"the per-image matches; {candidate.remedy}"
        )
    values = _class_values(gate, matches)
    if below := {key: ap for key, ap in values.items() if ap < gate.min_class_ap}:
        worst = min(below, key=below.__getitem__)
        return (
            f"{name} {value:.4g}: class {worst!r}{_rank(below)} has {name} {below[worst]:.4g}, "
            f"less than gate.min_class_ap ({gate.min_class_ap:g})"
        )
    return ""


def compare(
    gate: GateConfig, candidate: Evaluation, champion: Evaluation, champion_name: str
) -> Verdict:
    """Compare a candidate with the champion. Requires that `flaw` and `missing` returned ""."""
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
        name: known[name] - ap
        for name, ap in _class_values(gate, ours).items()
        if known.get(name, 0.0) - ap > gate.max_class_loss
    }
    if losses:
        worst = max(losses, key=losses.__getitem__)
        return Verdict(
            False,
            f"{reason}, but class {worst!r}{_rank(losses)} lost {losses[worst]:.4g} points "
            f"of {label(gate)}, more than gate.max_class_loss ({gate.max_class_loss:g})",
        )
    if not gate.confidence:
        return Verdict(True, reason)
    try:  # the gain with its paired bootstrap interval, as `vitdet compare` computes it
        first, second = bootstrap([ours, theirs])
        found = first.difference(second, _metric(gate), confidence=gate.confidence)
    except ValueError as error:
        return Verdict(False, f"{reason}, but the matches cannot be compared: {error}")
    if found is None or found.is_significant is None:
        return Verdict(
            False,
            f"{reason}, but gate.confidence needs at least {MIN_IMAGES} images with objects, "
            f"and the validation data has {found.images if found else 0}",
        )
    certain = found.low > gate.min_gain
    return Verdict(
        certain,
        f"{reason}, {'and' if certain else 'but'} the lower bound of the gain at "
        f"{gate.confidence:.4g} confidence is {found.low:+.3g}, "
        f"{'above' if certain else 'not above'} {gate.min_gain:g}",
    )


def _matches(gate: GateConfig, evaluation: Evaluation) -> Matches | None:
    by_name = {NAMES[kind]: matches for kind, matches in evaluation.matches.items()}
    return by_name.get(gate.metric.partition("_")[0])


def _metric(gate: GateConfig) -> str:
    return gate.metric.partition("_")[2]


def _class_values(gate: GateConfig, matches: Matches) -> dict[str, float]:
    """Return {class name: value of gate.metric} for the classes that have objects."""
    values = WeightedAP(matches)(np.ones(len(matches.image_ids), np.int32))
    row = values[METRICS.index(_metric(gate)), 1:].tolist()
    named = zip(matches.class_names, row, strict=True)
    return {name: value for name, value in named if not np.isnan(value)}


def _rank(classes: Mapping[str, float]) -> str:
    return f" (the worst of {len(classes)} such classes)" if len(classes) > 1 else ""
