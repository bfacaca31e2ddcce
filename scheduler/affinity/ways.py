"""Three ways to share out ready tokens to steps so that tokens with the same missing experts meet.

Each returns a schedule of all rows, whose first step has the rows that are due. All steps but the last are full.
R: rows, M: experts that are missing and needed by a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .ready import Integers, Ready, Schedule, Step, cut

ROUNDS = 10
"""Of the re-split, if it does not stand still sooner."""


def greedy(ready: Ready) -> Schedule:
    """Begins a step with its due rows, or else the oldest, and adds the row whose experts cost least on top, the oldest
    of equals, until the step is full.
    """
    needs_RM, bytes_M = ready.missing_needs
    alone_R = needs_RM @ bytes_M
    steps, left, begin = [], list(ready.order), ready.due or ready.order[:1]
    while left:
        step: list[int] = []
        more_R = alone_R.copy()  # what each row would add
        read_M = np.zeros(len(bytes_M), dtype=bool)
        while left and len(step) < ready.most:
            row = begin[len(step)] if len(step) < len(begin) else min(left, key=more_R.__getitem__)
            step.append(row)
            left.remove(row)
            new = np.flatnonzero(needs_RM[row] & ~read_M)
            more_R -= needs_RM[:, new] @ bytes_M[new]
            read_M[new] = True
        steps.append(tuple(step))
        begin = tuple(left[:1])
    return tuple(steps)


def longest_queue(ready: Ready) -> Schedule:
    """A queue of rows for each missing expert: the longest goes first, the oldest rows of it first, until the step is
    full. After Read-ME (arXiv 2410.19123, algorithm 1), where a token has one expert; here it has several in each
    layer, so experts that the step reads already have no queue, and a queue is as long as the bytes that it shares.
    """
    needs_RM, bytes_M = ready.missing_needs
    steps, left, begin = [], list(ready.order), list(ready.due)
    while left:
        step, begin = begin, []
        left = [row for row in left if row not in step]
        while left and len(step) < ready.most:
            length_M = needs_RM[left].sum(0) * bytes_M * ~needs_RM[step].any(0)
            if not length_M.any():  # the rest costs nothing more
                step += left[: ready.most - len(step)]
            else:
                expert = int(np.argmax(length_M))
                step += [row for row in left if needs_RM[row, expert]][: ready.most - len(step)]
            left = [row for row in left if row not in step]
        steps.append(tuple(step))
    return tuple(steps)


def resplit(ready: Ready) -> Schedule:
    """Two steps' rows split in two anew: like 2-means, each row goes to the centre whose experts it shares, as many to
    each as fit, and a centre is what most of its rows need. After ExpertFlow (arXiv 2410.17954); the distance is
    counted in bytes that are missing instead of experts. At last pairs of rows change places while that saves bytes,
    which is ours. What is more than two steps stays in order.
    """
    rows, rest = ready.order[: 2 * ready.most], ready.order[2 * ready.most :]
    needs_RM, bytes_M = ready.missing_needs
    first, due = rows[: ready.most], set(ready.due)
    here, there = needs_RM[rows[0]], needs_RM[_farthest(ready, rows)]
    for _ in range(ROUNDS):
        # The distance to the first centre less that to the second is this and what is the same for all rows. Rows that
        # are due count as nearest to the first.
        margin_R = needs_RM @ (bytes_M * there - bytes_M * here)
        nearest = sorted(rows, key=lambda row: (row not in due, margin_R[row]))
        found = tuple(sorted(nearest[: ready.most], key=rows.index))
        second = tuple(row for row in rows if row not in found)
        here, there = _most_need(ready, found), _most_need(ready, second)
        if found == first or not second:
            break
        first = found
    first, second = _exchanged(ready, first, tuple(row for row in rows if row not in first))
    if not due and len(first) == len(second) and ready.bytes_of(second) < ready.bytes_of(first):
        first, second = second, first
    return (*(step for step in (first, second) if step), *cut(rest, ready.most))


def _exchanged(ready: Ready, first: Step, second: Step) -> tuple[Step, Step]:
    """Both steps after exchanges of one row each, the most useful first; rows that are due stay."""
    bytes_M = ready.missing_needs[1]
    needs_RM = ready.missing_needs[0].astype(np.float64)  # for BLAS; sums of bytes are below 2**53, so they are exact
    one, two = list(first), list(second)
    stay = np.array([row in ready.due for row in one])
    rows_2M = np.stack([needs_RM[one].sum(0), needs_RM[two].sum(0)])

    def prices_3M(columns: Integers) -> npt.NDArray[np.float64]:
        """A row takes along what it alone needs and brings what nobody there does. What both rows of a pair need stays
        where it is: the third price takes back what the first two count for it."""
        alone_2M, new_2M = bytes_M[columns] * (rows_2M[:, columns] == np.array([[[1]], [[0]]]))
        return np.stack([new_2M[1] - alone_2M[0], new_2M[0] - alone_2M[1], alone_2M.sum(0)])

    changed, old_3M = np.arange(len(bytes_M)), np.zeros((3, len(bytes_M)))
    away_R, back_R, both_RR = np.zeros(ready.rows), np.zeros(ready.rows), np.zeros((ready.rows, ready.rows))
    while two and not stay.all():
        part_RM, (away_M, back_M, both_M) = needs_RM[:, changed], prices_3M(changed) - old_3M
        away_R += part_RM @ away_M
        back_R += part_RM @ back_M
        both_RR += (part_RM * both_M) @ part_RM.T
        more_AB = away_R[one][:, None] + back_R[two] + both_RR[np.ix_(one, two)]
        more_AB[stay] = 0
        a, b = np.unravel_index(int(np.argmin(more_AB)), more_AB.shape)
        if more_AB[a, b] >= 0:
            break
        change_M = needs_RM[two[b]] - needs_RM[one[a]]
        changed = np.flatnonzero(change_M)
        old_3M = prices_3M(changed)
        rows_2M += np.stack([change_M, -change_M])
        one[a], two[b] = two[b], one[a]
    return tuple(sorted(one)), tuple(sorted(two))


def _farthest(ready: Ready, rows: Step) -> int:
    needs_RM, bytes_M = ready.missing_needs
    distances: Integers = (needs_RM[list(rows)] ^ needs_RM[rows[0]]) @ bytes_M
    return rows[int(np.argmax(distances))]


def _most_need(ready: Ready, step: Step) -> np.ndarray:
    return 2 * ready.missing_needs[0][list(step)].sum(0) > len(step)


WAYS: dict[str, Callable[[Ready], Schedule]] = {"greedy": greedy, "resplit": resplit, "longest-queue": longest_queue}
