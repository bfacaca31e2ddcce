"""How many layers ahead a predictor is asked: deeper while that pays and the disk has time, else less deep.

D: layers ahead, 1 to the most.
"""

from __future__ import annotations

from collections.abc import Sequence

TRIAL_STEPS = 32
"""Over so many steps a balance is drawn."""
REST_STEPS, LONGEST_REST = 128, 1 << 16
"""How long a depth that did not pay is left alone, at first and at most after many times in a row."""


class Depth:
    """A depth that follows what was measured. Without a clock: steps are its time.

    A depth pays while the time that reads hide which were begun so far ahead is more than the time that they take: of
    asking, and of what was read for nothing. Where the deepest does not, it is given up for a while, each time for
    twice as long; where it was not asked that far, because another one was, nothing changes. One more is tried when
    there were more layers at which the disk had nothing to do than reads that came too late.

    Args:
        start: layers, at first.
        most: layers.
    """

    def __init__(
        self,
        start: int,
        most: int,
        trial: int = TRIAL_STEPS,
        rest: int = REST_STEPS,
        longest: int = LONGEST_REST,
    ) -> None:
        assert 1 <= start <= most and trial >= 1 and 1 <= rest <= longest
        self.layers = start
        self.most = most
        self._trial, self._first_rest, self._longest = trial, rest, longest
        self._rest_D = [rest] * most
        """How long each depth will be left alone when it does not pay."""
        self._rests = 0
        self._left = trial
        self._net_D = [0] * most
        self._told_D = [False] * most
        self._idle = self._late = 0

    def step(self, gained_D: Sequence[int], spent_D: Sequence[int], *, idle: int, late: int) -> None:
        """A step is over, with what became known in it.

        Args:
            gained_D, spent_D: nanoseconds, by how far ahead reads were begun and the predictor was asked.
            idle: layers at whose start the disk had nothing to do.
            late: reads that were begun ahead and were not there when their router had chosen.
        """
        for d, (gained, spent) in enumerate(zip(gained_D, spent_D, strict=True)):
            self._net_D[d] += gained - spent
            self._told_D[d] |= gained > 0 or spent > 0
        self._idle += idle
        self._late += late
        self._rests = max(0, self._rests - 1)
        self._left -= 1
        if self._left:
            return
        deepest = self.layers - 1
        if self._net_D[deepest] > 0:
            self._rest_D[deepest] = self._first_rest
            if self._idle > self._late and self.layers < self.most and not self._rests:
                self.layers += 1
        elif self.layers > 1 and self._told_D[deepest]:
            self.layers -= 1
            self._rests = self._rest_D[deepest]
            self._rest_D[deepest] = min(2 * self._rests, self._longest)
        self._left = self._trial
        self._net_D = [0] * self.most
        self._told_D = [False] * self.most
        self._idle = self._late = 0
