"""Which sequences a predictor follows: a bounded number, each with a place in its arrays.

R: followed sequences of the step, T: tokens of a step, K: experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Array, Rows


class Followed:
    """Gives places to the sequences of a step.

    In a step of more sequences than there are places those of the last rows are left out. When a new one finds no
    place, it takes that of one that is not in the step, the one that has waited longest. A sequence that begins again
    at 0, or goes back (it was preempted and is computed again), is new.

    Args:
        sequences: places.
    """

    def __init__(self, sequences: int) -> None:
        if sequences < 1:
            raise ValueError(f"sequences is {sequences}; it must be at least 1")
        self._place: dict[str, int] = {}
        """In the order in which they were last seen."""
        self._free = list(range(sequences))
        self._length_S = [0] * sequences
        self._end = 0
        self.row_R3 = np.zeros((0, 3), dtype=np.int64)
        """Of each sequence of the step its place, and the first and the end of its rows."""
        self.new_R = np.zeros(0, dtype=bool)
        """Who has no token before this step."""

    def __len__(self) -> int:
        """Of the step."""
        return len(self.row_R3)

    @property
    def place_R(self) -> Array:
        return self.row_R3[:, 0]

    @property
    def others(self) -> list[int]:
        """Places of sequences that are not in the step."""
        here = set(self.place_R.tolist())
        return [place for place in self._place.values() if place not in here]

    def begin(self, rows: Sequence[Rows]) -> None:
        """A step begins. What is kept at the places of new sequences is someone else's."""
        first: dict[str, Rows] = {}
        for row in rows:
            if len(row.token_ids):
                first.setdefault(row.request_id, row)
        here = list(first.values())[: len(self._length_S)]
        now = {row.request_id for row in here}
        found, new = [], []
        for row in here:
            place, goes_on = self._seat(row, now)
            count = len(row.token_ids)
            self._length_S[place] = row.start + count
            found.append((place, row.first, row.first + count))
            new.append(not goes_on)
        self.row_R3 = np.array(found, dtype=np.int64).reshape(-1, 3)
        self.new_R = np.array(new, dtype=bool)
        self._end = max((end for _, _, end in found), default=0)

    def checked(self, ids_TK: Array) -> Array:
        """As compiled loops need them: they do not look whether the step's rows are all there."""
        ids_TK = np.ascontiguousarray(ids_TK, dtype=np.int64)
        if len(ids_TK) >= self._end:
            return ids_TK
        return np.concatenate([ids_TK, np.full((self._end - len(ids_TK), ids_TK.shape[1]), -1)])

    def place_of(self, request_id: str) -> int | None:
        """Where a sequence is kept, of this step or an earlier one."""
        return self._place.get(request_id)

    def forget(self, request_id: str) -> bool:
        """Frees its place. False for a sequence that has none."""
        place = self._place.pop(request_id, None)
        if place is None:
            return False
        self._free.append(place)
        stays_R = self.place_R != place
        self.row_R3, self.new_R = self.row_R3[stays_R], self.new_R[stays_R]
        return True

    def _seat(self, row: Rows, now: set[str]) -> tuple[int, bool]:
        place = self._place.pop(row.request_id, None)
        goes_on = place is not None and 0 < self._length_S[place] <= row.start
        if place is None:
            if not self._free:
                longest = next(request for request in self._place if request not in now)
                self._free.append(self._place.pop(longest))
            place = self._free.pop()
        self._place[row.request_id] = place
        return place, goes_on
