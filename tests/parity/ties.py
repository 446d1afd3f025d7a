"""Assign our proposals or detections to the stored ones if scores tie within the noise.

Two scores that each have an error of up to the tolerance can be swapped if they differ by at most
twice the tolerance. Therefore the stored entries, in order, are split into groups: an entry is in the
group of its predecessor if their scores differ by at most twice the tolerance. Groups are compared in
order. Within a group any order is accepted: each stored entry must match one of ours, and each of ours
at most one stored entry (a perfect matching). A pair matches if every column (boxes, scores, classes)
agrees within its tolerance. Without such a matching the order is not changed, so that the comparison
that follows reports the difference.

Thus a moved box, a duplicate, a missing entry, another class or a score that changed by more than its
tolerance is still detected; only the order of entries that rounding may swap is not compared. The
members of a list are compared strictly: if its last entry is part of a tie, only entries of ours in
the same tie may replace it (`results.json` stores the first 40).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from tests.parity.report import Report

Columns = Mapping[str, np.ndarray | Tensor | list]


def order_within_ties(
    name: str,
    ours: Columns,
    theirs: Columns,
    tolerance: Mapping[str, float],
    scores: str,
    report: Report,
) -> np.ndarray:
    """Return the permutation that brings our tied entries into the order of the stored ones.

    `ours` and `theirs` map the names of columns to arrays with one row per entry. Columns that are
    not stored are ignored; without stored scores, or if shapes do not fit, the order is unchanged.
    """
    used = [column for column in tolerance if column in theirs]
    mine = {column: np.asarray(ours[column], np.float64) for column in used}
    wanted = {column: np.asarray(theirs[column], np.float64) for column in used}
    count = len(ours[scores])
    order = np.arange(count)
    if scores not in used or not all(
        len(wanted[c]) == len(wanted[scores]) <= count and wanted[c].shape[1:] == mine[c].shape[1:]
        for c in used
    ):
        return order
    noise = 2 * tolerance[scores]
    for start, stop in groups(wanted[scores], noise):
        end = stop
        if stop == len(wanted[scores]):  # the rest of a tie that the stored list truncates
            while end < count and abs(mine[scores][end] - mine[scores][end - 1]) <= noise:
                end += 1
        fits = np.ones((stop - start, end - start), bool)
        for column in used:
            a, b = wanted[column][start:stop, None], mine[column][None, start:end]
            error = np.abs(a - b).reshape(stop - start, end - start, -1)
            fits &= (error <= tolerance[column]).all(axis=2)  # NaN matches nothing
        if fits.diagonal().all():
            continue
        pairs = matching(fits)
        if pairs is not None:
            left = sorted(set(range(end - start)) - set(pairs))
            order[start:end] = start + np.array([*pairs, *left])
    moved = int((order != np.arange(count)).sum())
    if moved:
        report.inform(f"{name} order", f"{moved} entries that tie are in another order")
    return order


def groups(scores: np.ndarray, noise: float) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) of scores that differ by at most `noise` from their predecessor."""
    cuts = np.flatnonzero(~(np.abs(np.diff(scores)) <= noise)) + 1
    edges = [0, *cuts.tolist(), len(scores)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def matching(fits: np.ndarray) -> list[int] | None:
    """Return a distinct column of `fits` (rows, columns) for every row; None if there is no such matching.

    Augmenting paths (Kuhn): a row is assigned a free column, or one whose row can be reassigned.
    """
    row_of: dict[int, int] = {}
    column_of: dict[int, int] = {}
    for row in range(len(fits)):
        came_from: dict[int, int] = {}
        queue, free = [row], None
        while queue and free is None:
            current = queue.pop(0)
            for column in np.flatnonzero(fits[current]).tolist():
                if column not in came_from:
                    came_from[column] = current
                    if column not in row_of:
                        free = column
                        break
                    queue.append(row_of[column])
        if free is None:
            return None
        while free is not None:  # swap along the path
            current = came_from[free]
            previous = column_of.get(current)
            row_of[free], column_of[current] = current, free
            free = previous
    return [column_of[row] for row in range(len(fits))]
