"""How long guests' weights are waited for before their rows are computed at home instead."""

from __future__ import annotations

from collections import deque

WINDOW = 64


class Patience:
    """Ski rental: who has waited as long as doing it over costs does it over, which is at most twice what the best
    choice in hindsight would have cost. The wait counts from when the weights should have been there by the model.

    A machine's own jitter is no reason to do anything over: it is waited at least twice as long as the longest delay of
    the last `WINDOW` transfers. If delays are alike, fewer than one in `WINDOW` is longer than all of those before it.
    One that was given up counts as the wait that it outlasted, so that the next wait is twice as long: the back-off of
    TCP's retransmissions (RFC 6298). What the jitter is like is not known before `WINDOW` transfers have come; until
    then, and at most, it is waited for `most_ns`.

    Each rank decides for itself, by its own clock: what it found is told to the others.
    """

    def __init__(self, most_ns: int) -> None:
        if most_ns < 0:
            raise ValueError(f"most_ns is {most_ns}; it must be at least 0")
        self._most_ns = most_ns
        self._delays: deque[int] = deque(maxlen=WINDOW)

    def wait_ns(self, over_ns: int) -> int:
        """For weights that are due; doing it over takes `over_ns` by the model.

        >>> patience = Patience(most_ns=1000)
        >>> patience.wait_ns(50)
        1000
        >>> for delay in [7] * 63 + [30]: patience.came(delay)
        >>> patience.wait_ns(50), patience.wait_ns(70), patience.wait_ns(4000)
        (60, 70, 1000)
        """
        if len(self._delays) < WINDOW:
            return self._most_ns
        return min(self._most_ns, max(over_ns, 2 * max(self._delays)))

    def came(self, delay_ns: int) -> None:
        """So much after it should have been there; or it was waited for so long and did not come."""
        self._delays.append(max(0, delay_ns))
