"""The gate's decision, and the history of champions."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from vitdet.config import GateConfig
from vitdet.evaluation.bootstrap import WeightedAP, bootstrap
from vitdet.evaluation.matches import IOUS, Matches
from vitdet.tracking.evaluations import recorded_evaluation
from vitdet.tracking.gate import Evaluation, Verdict, compare, flaw
from vitdet.tracking.history import (
    FORCED,
    PROMOTED,
    ROLLED_BACK,
    Event,
    predecessors,
    rivals,
    rolled_back,
)

NAME = "the champion, version 3"


def evaluation(found: dict[str, list[bool]]) -> Evaluation:
    """Return an evaluation with an object and a detection per class and image; `found` has the hits."""
    rows = [
        (image, place, hit)
        for place, hits in enumerate(found.values())
        for image, hit in enumerate(hits)
    ]
    image, category, hit = (np.array(column) for column in zip(*rows, strict=True))
    matched = np.repeat(hit[:, None], len(IOUS), 1)
    matches = Matches(
        kind="bbox",
        image_ids=np.unique(image),
        category_ids=np.arange(len(found)),
        class_names=tuple(found),
        image=image,
        category=category,
        score=np.where(hit, 0.9, 0.1),
        matched=matched,
        ignored=np.zeros_like(matched),
        found=np.where(hit, np.arange(len(rows)), -1),
        object_image=image,
        object_category=category,
    )
    mean, *aps = WeightedAP(matches)(np.ones(len(matches.image_ids), int))[0]
    assert not np.isnan(aps).any()
    return Evaluation({"box_ap": float(mean)}, {"bbox": matches})


def hits(count: int, of: int = 60) -> list[bool]:
    return [place < count for place in range(of)]


def decide(gate: GateConfig, candidate: Evaluation, champion: Evaluation) -> Verdict:
    reason = flaw(gate, candidate)
    return Verdict(False, reason) if reason else compare(gate, candidate, champion, NAME)


@pytest.mark.parametrize(
    ("ap", "least", "passed", "reason"),
    [
        (41.0, 0.0, True, "box AP 41, above the 40 of the champion, version 3"),
        (40.0, 0.0, False, "box AP 40, no better than the 40 of"),
        (40.5, 0.5, False, "box AP 40.5, no more than gate.min_gain (0.5) above the 40 of"),
        (40.51, 0.5, True, "box AP 40.51, above the 40 of"),
        (40.2, 0.5, False, "box AP 40.2, less than gate.min_gain (0.5) above the 40 of"),
        (float("nan"), 0.0, False, "box AP is nan, which cannot be compared"),
    ],
)
def test_the_gain_must_exceed_the_minimum(
    ap: float, least: float, passed: bool, reason: str
) -> None:
    ours, theirs = (Evaluation({"box_ap": value}) for value in (ap, 40.0))
    found = decide(GateConfig(min_gain=least), ours, theirs)
    assert found.passed is passed and found.reason.startswith(reason)


def test_another_metric_alone_decides() -> None:
    better = Evaluation({"box_ap": 10.0, "mask_ap50": 41.0})
    worse = Evaluation({"box_ap": 90.0, "mask_ap50": 40.0})
    found = decide(GateConfig(metric="mask_ap50"), better, worse)
    assert found == Verdict(True, f"mask AP50 41, above the 40 of {NAME}")


def test_the_remedy_for_missing_files_of_a_pipeline_step_is_stated(
    tmp_path: Path,
) -> None:
    record = {"metrics": {"box_ap": 50.0}, "plots": str(tmp_path / "removed")}
    reason = flaw(GateConfig(confidence=0.95), recorded_evaluation(record))
    assert "removed after the pipeline step `evaluate`; submit the pipeline again" in reason
    assert "--plots" not in reason


def test_classes_must_not_fall_below_the_minimum_or_lose_too_much() -> None:
    before = evaluation({"disc": hits(30), "ring": hits(30)})
    after = evaluation({"disc": hits(55), "ring": hits(20)})
    assert decide(GateConfig(), after, before).passed
    floor = decide(GateConfig(min_class_ap=40.0), after, before)
    assert not floor.passed and "class 'ring' has box AP 33" in floor.reason
    loss = decide(GateConfig(max_class_loss=10.0), after, before)
    assert not loss.passed and "class 'ring' lost 16" in loss.reason
    assert decide(GateConfig(min_class_ap=30.0, max_class_loss=20.0), after, before).passed
    assert "per-image matches" in flaw(GateConfig(min_class_ap=1.0), Evaluation({"box_ap": 50.0}))


def test_a_gain_within_the_noise_does_not_pass_with_confidence() -> None:
    gate, before = GateConfig(confidence=0.95), evaluation({"disc": hits(30)})
    lucky, better = evaluation({"disc": hits(31)}), evaluation({"disc": hits(45)})
    assert decide(GateConfig(), lucky, before).passed
    found = decide(gate, lucky, before)
    assert not found.passed and "but the lower bound of the gain at 0.95" in found.reason
    found = decide(gate, better, before)
    assert found.passed and "and the lower bound of the gain at 0.95 conf" in found.reason
    assert not decide(replace(gate, min_gain=20.0), better, before).passed
    other = evaluation({"disc": hits(30, 50)})
    found = decide(gate, better, other)
    assert not found.passed and "cannot be compared: the results are from different" in found.reason


def test_confidence_ignores_resamples_without_objects_and_needs_ten_images() -> None:
    def among_empty(images: int, found: int) -> Evaluation:
        full = evaluation({"disc": hits(found, images)})
        matches = {"bbox": replace(full.matches["bbox"], image_ids=np.arange(1000))}
        return Evaluation(full.metrics, matches)

    gate = GateConfig(confidence=0.95)
    assert decide(gate, among_empty(10, 10), among_empty(10, 1)).passed
    found = decide(gate, among_empty(9, 9), among_empty(9, 1))
    reason = "needs at least 10 images with objects, and the validation data has 9"
    assert not found.passed and reason in found.reason


def test_the_gate_and_a_comparison_have_the_same_interval() -> None:
    before, after = evaluation({"disc": hits(8, 20)}), evaluation({"disc": hits(12, 20)})
    theirs, ours = bootstrap([before.matches["bbox"], after.matches["bbox"]])
    found = decide(GateConfig(confidence=0.95), after, before)
    assert f" confidence is {ours.difference(theirs).low:+.3g}, " in found.reason


def record(*rows: tuple[str, str, str]) -> list[Event]:
    return [
        Event(f"{place:03d}", version, action, before, "")
        for place, (action, before, version) in enumerate(rows)
    ]


def test_rollbacks_undo_promotions_one_at_a_time() -> None:
    first = [(PROMOTED, "", "1"), (PROMOTED, "1", "2"), (FORCED, "2", "5")]
    assert predecessors(record(*first), "5") == ["2", "1"]
    back = [*first, (ROLLED_BACK, "5", "2")]
    assert predecessors(record(*back), "2") == ["1"]
    assert predecessors(record(*back, (ROLLED_BACK, "2", "1")), "1") == []
    assert predecessors(record(*back, (PROMOTED, "2", "5")), "5") == ["2", "1"]
    # the champion of an earlier version of the package, and an alias moved in the MLflow UI
    assert predecessors(record((PROMOTED, "7", "8")), "8") == ["7"]
    assert predecessors(record(*first), "9") == ["5", "2", "1"]
    assert predecessors([], "9") == []
    by_hand = [(PROMOTED, "7", "8"), (PROMOTED, "8", "9"), (ROLLED_BACK, "9", "8")]
    assert predecessors(record(*by_hand), "8") == ["7"]
    assert predecessors(record(*by_hand, (ROLLED_BACK, "8", "7")), "7") == []
    assert predecessors(record((PROMOTED, "", "1"), (PROMOTED, "2", "3")), "3") == ["2", "1"]


def test_events_are_ordered_by_links_and_not_by_clocks() -> None:
    late, early, *_ = record((PROMOTED, "1", "2"), (PROMOTED, "", "1"))
    recorded = [late, early, Event("0", "3", PROMOTED, "2", ""), Event("9", "4", PROMOTED, "1", "")]
    assert predecessors(recorded, "3") == ["2", "1"]


def test_a_version_is_rolled_back_if_its_last_event_is_a_rollback_from_it() -> None:
    back = [(PROMOTED, "", "1"), (PROMOTED, "1", "2"), (ROLLED_BACK, "2", "1")]
    assert rolled_back(record(*back), "2") == record(*back)[2]
    assert rolled_back(record(*back), "1") is None and rolled_back(record(*back), "3") is None
    assert rolled_back(record(*back, (FORCED, "1", "2")), "2") is None


def test_rivals_are_valid_promotions_at_about_the_same_time() -> None:
    start = datetime.fromisoformat("2026-01-01T12:00:00+00:00")

    def event(minutes: float, version: str, action: str, before: str) -> Event:
        return Event((start + timedelta(minutes=minutes)).isoformat(), version, action, before, "")

    own = event(0, "3", PROMOTED, "1")
    near, early = event(1, "4", PROMOTED, "1"), event(-11, "2", PROMOTED, "1")
    assert rivals([early, own, near], own) == [near]
    undone = event(2, "1", ROLLED_BACK, "4")
    assert rivals([early, own, near, undone], own) == [undone]
