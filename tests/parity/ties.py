"""Which of our proposals or detections belongs to which stored one, where scores tie within the noise.

The rule: two scores that may each be off by the tolerance can change places when they are at most
twice the tolerance apart. So stored entries, in their order, are split into groups: an entry belongs
to the group of the one before it if their scores differ by at most twice the tolerance. Groups are
compared in order. Within a group the order is free: each stored entry must be one of ours and each of
ours at most one stored entry (a perfect matching), and a pair must agree in every column (boxes,
scores, classes) within the tolerance of that column. Without such a matching the order stays as it
is, so that the comparison that follows reports what differs.

So a box that moved, a duplicate, a missing entry, another class or a score that changed by more than
its tolerance is still found; only the order of entries that rounding may exchange is not compared.
The members of a list are compared strictly: where the last place itself is a tie, only entries of
ours that were cut off in that tie may take it (`results.json` stores the first 40).
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
    """A permutation of our entries that brings those that tie into the order of the stored ones.

    `ours` and `theirs` map the names of columns to arrays with one row per entry. Columns that are
    not stored are not used; without stored scores, or with other numbers of rows, the order stays.
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
        if stop == len(wanted[scores]):  # the rest of a tie that the stored list cuts
            while end < count and abs(mine[scores][end] - mine[scores][end - 1]) <= noise:
                end += 1
        fits = np.ones((stop - start, end - start), bool)
        for column in used:
            a, b = wanted[column][start:stop, None], mine[column][None, start:end]
            error = np.abs(a - b).reshape(stop - start, end - start, -1)
            fits &= (error <= tolerance[column]).all(axis=2)  # NaN fits nothing
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
    """Ranges (start, stop) of consecutive scores that differ by at most `noise` from the previous one."""
    cuts = np.flatnonzero(~(np.abs(np.diff(scores)) <= noise)) + 1
    edges = [0, *cuts.tolist(), len(scores)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def matching(fits: np.ndarray) -> list[int] | None:
    """A column of `fits` (rows, columns) for every row, none used twice; None if there is none.

    Augmenting paths (Kuhn): a row takes a free column, or one whose row can take another.
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
        while free is not None:  # exchange along the path
            current = came_from[free]
            previous = column_of.get(current)
            row_of[free], column_of[current] = current, free
            free = previous
    return [column_of[row] for row in range(len(fits))]
