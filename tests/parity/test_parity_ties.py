"""Entries whose scores tie within the noise are compared as sets, without hiding errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.parity import compare_detector, compare_fork
from tests.parity.case import load
from tests.parity.conftest import link, read, write
from tests.parity.report import Report
from tests.parity.test_parity import COCO, computed
from tests.parity.test_parity_fork import CASE as FORK
from tests.parity.test_parity_fork import computed as fork_computed
from tests.parity.ties import groups, matching, order_within_ties

TOLERANCE = {"boxes": 1e-3, "scores": 1e-5, "classes": 0.0}
SCORES = [0.9, 0.5, 0.5 + 8e-6, 0.5 - 1e-5, 0.3]  # the middle three tie


def entries(scores=SCORES):
    rng = np.random.default_rng(0)
    return {
        "boxes": rng.uniform(0, 100, (len(scores), 4)),
        "scores": np.array(scores),
        "classes": np.arange(len(scores)),
    }


def rows(columns, order):
    return {name: np.asarray(column)[list(order)] for name, column in columns.items()}


def failures(ours, theirs):
    """Return the number of failures of a comparison after the alignment, and its lines."""
    report = Report("ties")
    order = order_within_ties("list", ours, theirs, TOLERANCE, "scores", report)
    for name, absolute in TOLERANCE.items():
        report.close(name, ours[name][order], theirs[name], absolute)
    return report.failures, report.lines


def test_another_order_within_a_tie_passes_and_is_printed():
    theirs = entries()
    count, lines = failures(rows(theirs, [0, 3, 1, 2, 4]), theirs)
    assert count == 0
    assert lines[0] == "  info  list order: 3 entries that tie are in another order"
    assert failures(theirs, theirs)[1][0].startswith("  ok")


@pytest.mark.parametrize("seed", range(5))
def test_entries_with_tolerated_noise_pass_in_any_order_within_a_tie(seed):
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.choice(np.arange(20) * 1e-2, 60) + rng.uniform(-4e-6, 4e-6, 60))[::-1]
    theirs = entries(scores)
    ours = {
        "boxes": theirs["boxes"] + rng.uniform(-9e-4, 9e-4, (60, 4)),
        "scores": scores + rng.uniform(-9e-6, 9e-6, 60),
        "classes": theirs["classes"],
    }
    ours = rows(ours, np.argsort(-ours["scores"], kind="stable"))
    assert failures(ours, theirs)[0] == 0


@pytest.mark.parametrize(
    "order", [[1, 0, 2, 3, 4], [0, 1, 2, 4, 3], [4, 1, 2, 3, 0], [0, 1, 1, 2, 4]]
)
def test_another_order_outside_of_ties_and_a_duplicate_are_detected(order):
    """The last case replaces an entry of a tie by a duplicate of another entry."""
    theirs = entries()
    assert failures(rows(theirs, order), theirs)[0] > 0


@pytest.mark.parametrize("column", ["boxes", "scores", "classes"])
@pytest.mark.parametrize("entry", [0, 1, 2, 3])
def test_a_change_above_the_tolerance_is_detected_within_a_tie(column, entry):
    theirs = entries()
    ours = rows(theirs, [0, 2, 3, 1, 4])
    step = {"boxes": 2e-3, "scores": 3e-5, "classes": 1}[column]
    ours[column][entry] += step if entry != 2 else -step
    assert failures(ours, theirs)[0] > 0


def test_swapped_boxes_or_classes_of_two_entries_are_detected():
    for column in ("boxes", "classes"):
        theirs = entries(np.array([0.9, 0.5, 0.3]))
        ours = theirs | {column: theirs[column][[1, 0, 2]]}
        assert failures(ours, theirs)[0] > 0
        tied = entries(np.array([0.5, 0.5, 0.5]))  # all three tie, and each box has its own class
        ours = tied | {column: tied[column][[1, 0, 2]]}
        assert failures(ours, tied)[0] > 0


def test_nan_matches_nothing():
    theirs = entries()
    for column in ("boxes", "scores"):
        ours = rows(theirs, [0, 2, 1, 3, 4])
        ours[column][1] = np.nan
        assert failures(ours, theirs)[0] > 0


def test_any_entry_of_a_tie_may_end_a_truncated_list():
    """results.json stores only the first entries; our list is complete."""
    ours, report = entries([0.9, 0.5, 0.5, 0.5, 0.3]), Report("ties")
    theirs = rows(ours, [0, 3, 1])
    order = order_within_ties("list", ours, theirs, TOLERANCE, "scores", report)
    assert order.tolist() == [0, 3, 1, 2, 4]
    outside = rows(ours, [0, 1, 4])
    order = order_within_ties("list", ours, outside, TOLERANCE, "scores", report)
    assert order.tolist() == [0, 1, 2, 3, 4]


def test_other_lengths_and_missing_columns_keep_the_order():
    ours, report = entries(), Report("ties")
    longer = rows(ours, [0, 2, 1, 3, 4, 4])
    without = {name: ours[name][::-1] for name in ("boxes", "classes")}
    uneven = ours | {"boxes": ours["boxes"][:3]}
    for theirs in (longer, without, uneven, {}):
        order = order_within_ties("list", ours, theirs, TOLERANCE, "scores", report)
        assert order.tolist() == [0, 1, 2, 3, 4]
    assert not report.lines


def test_groups_are_runs_of_close_neighbors():
    assert groups(np.array([3.0, 2.0, 1.9, 1.8, 1.0]), 0.15) == [(0, 1), (1, 4), (4, 5)]
    assert groups(np.array([1.0]), 0.1) == [(0, 1)] and groups(np.array([]), 0.1) == []
    assert groups(np.array([1.0, np.nan, 1.0]), 0.1) == [(0, 1), (1, 2), (2, 3)]


def test_a_matching_is_found_exactly_if_one_exists():
    fits = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    assert matching(fits) == [1, 0, 2]
    assert matching(np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0]], bool)) is None
    rng = np.random.default_rng(0)
    for _ in range(200):
        fits = rng.random((6, 7)) < 0.3
        best = matching(fits)
        assert (best is not None) == possible(fits)
        if best is not None:
            assert len(set(best)) == 6 and fits[np.arange(6), best].all()


def possible(fits):
    """Return whether a perfect matching exists, by Hall's theorem."""
    return all(
        fits[[i for i in range(len(fits)) if chosen >> i & 1]].any(axis=0).sum()
        >= chosen.bit_count()
        for chosen in range(1, 1 << len(fits))
    )


@pytest.fixture
def tied(tmp_path):
    """Return a detector case in which detections 4 and 5, and proposals 7 and 8, of image 0 tie exactly.

    It is (computed results, folder, change); `change(file, {array: edit})` writes changed arrays.
    """
    folder = tmp_path / "maskrcnn_coco"
    folder.mkdir()
    link(folder, COCO, *(path.name for path in COCO.iterdir()))
    found = computed("maskrcnn_coco")
    first = found.detections[0]
    scores, logits = first.scores.clone(), found.proposals["eval"][0].logits.clone()
    scores[5], logits[8] = scores[4], logits[7]
    proposals = found.proposals["eval"][0]._replace(logits=logits)
    found = replace(
        found,
        detections=[replace(first, scores=scores), *found.detections[1:]],
        proposals=found.proposals | {"eval": [proposals, *found.proposals["eval"][1:]]},
    )

    def change(file, edits):
        content = load(folder / file)
        for name, edit in edits.items():
            content[name] = edit(content[name])
        (folder / file).unlink()
        write(folder / file, content)

    score = lambda a: np.concatenate([a[:5], a[4:5], a[6:]])  # noqa: E731
    change("detections.npz", {"scores0": score, "post_scores0": score})
    change("rpn.npz", {"eval_proposal_logits0": lambda a: np.concatenate([a[:8], a[7:8], a[9:]])})
    results = json.loads((folder / "results.json").read_text())
    results[5]["score"] = results[4]["score"]
    (folder / "results.json").unlink()
    write(folder / "results.json", results)
    return found, folder, change


def swap(i, j):
    """Return an edit that swaps two rows."""

    def edit(array):
        array = np.array(array)
        array[[i, j]] = array[[j, i]]
        return array

    return edit


def counted(found, folder):
    report = Report("tied")
    compare_detector.compare(folder, found, report)
    return report.failures


DETECTIONS = [
    f"{name}0"
    for name in ("boxes", "scores", "classes", "post_boxes", "post_scores", "post_classes")
] + ["mask_probs_first20_0", "mask_probs_mean0"]


def test_tied_detections_may_be_in_another_order(tied):
    found, folder, change = tied
    assert counted(found, folder) == 0
    change("detections.npz", dict.fromkeys(DETECTIONS, swap(4, 5)))
    assert counted(found, folder) == 0
    results = json.loads((folder / "results.json").read_text())
    results[4], results[5] = results[5], results[4]
    write(folder / "results.json", results)
    assert counted(found, folder) == 0


def test_tied_proposals_may_be_reordered_together_with_their_rows_of_the_stages(tied):
    found, folder, change = tied
    change("rpn.npz", {"eval_proposals0": swap(7, 8), "eval_proposal_logits0": swap(7, 8)})
    assert counted(found, folder) == 2  # logits and deltas of the stage are still in our order
    change("detections.npz", {"cls_logits_stage0": swap(7, 8), "box_deltas_stage0": swap(7, 8)})
    assert counted(found, folder) == 0


@pytest.mark.parametrize("array", DETECTIONS)
def test_a_single_array_in_another_order_is_detected(tied, array):
    found, folder, change = tied
    content = load(folder / "detections.npz")[array]
    change("detections.npz", {array: swap(4, 5)})
    same = np.allclose(content[4], content[5], rtol=0, atol=1e-5)
    assert (counted(found, folder) > 0) != same


@pytest.mark.parametrize("rows", [(2, 3), (5, 6), (0, 10)])
def test_detections_without_ties_must_be_in_order(tied, rows):
    found, folder, change = tied
    change("detections.npz", dict.fromkeys(DETECTIONS, swap(*rows)))
    assert counted(found, folder) > 0


def test_a_moved_box_and_a_duplicate_in_a_tie_are_detected(tied):
    found, folder, change = tied
    original = (folder / "detections.npz").read_bytes()

    def moved(array):
        return np.array(array) + (np.arange(len(array)) == 5)[:, None] * 0.01

    change("detections.npz", {"boxes0": moved})
    assert counted(found, folder) > 0
    (folder / "detections.npz").write_bytes(original)
    double = lambda a: np.concatenate([a[:5], a[4:5], a[6:]])  # noqa: E731
    change("detections.npz", dict.fromkeys(DETECTIONS, double))
    assert counted(found, folder) > 0


@pytest.fixture
def fork(tmp_path):
    """Like `tied` for the fork's case: proposals 3 and 4, and detections 6 and 7, tie."""
    found = fork_computed()
    arrays = {name: tensor.clone() for name, tensor in found.arrays.items()}
    arrays["proposals"][4, 4] = arrays["proposals"][3, 4]
    arrays["det_scores"][7] = arrays["det_scores"][6]
    stored = load(FORK / "io.npz")
    stored["proposals"][4, 4] = stored["proposals"][3, 4]
    stored["det_scores"][7] = stored["det_scores"][6]
    link(tmp_path, FORK, *(path.name for path in FORK.iterdir() if path.name != "io.npz"))

    def count(names=(), order=None, masks=False):
        if order:
            for name in names:
                stored[name] = swap(*order)(stored[name])
        write(tmp_path / "io.npz", stored)
        if masks:
            codes, config = (read(FORK / name) for name in ("masks_rle.json", "config.json"))
            for values in (codes, config["mask_areas"]):
                values[6], values[7] = values[7], values[6]
            for name, content in (("masks_rle.json", codes), ("config.json", config)):
                (tmp_path / name).unlink()
                write(tmp_path / name, content)
        report = Report("fork")
        compare_fork.compare(tmp_path, replace(found, arrays=arrays), report)
        return report.failures

    return count


def test_the_forks_ties_may_be_in_another_order(fork):
    assert fork() == 0
    assert fork(["proposals", "roi_cls_score", "roi_bbox_pred"], (3, 4)) == 0
    detections = ["det_boxes", "det_scores", "det_labels", "det_mask_logits"]
    assert fork(detections, (6, 7), masks=True) == 0


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["proposals"], (3, 4)),
        (["proposals", "roi_cls_score", "roi_bbox_pred"], (3, 40)),
        (["det_boxes"], (6, 7)),
        (["det_boxes", "det_scores", "det_labels", "det_mask_logits"], (6, 20)),
    ],
)
def test_the_forks_other_orders_are_detected(fork, names, order):
    assert fork(names, order) > 0


def test_torch_and_numpy_columns_are_equivalent():
    theirs, report = entries(), Report("ties")
    ours = {n: torch.from_numpy(a.copy()) for n, a in rows(theirs, [0, 2, 1, 3, 4]).items()}
    order = order_within_ties("list", ours, theirs, TOLERANCE, "scores", report)
    assert order.tolist() == [0, 2, 1, 3, 4]
