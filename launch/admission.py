"""How much prompt waits for prefill, and how long until there is room: the bound of the front end's queue."""

from __future__ import annotations

import math

RATE_HALF_LIFE_S = 30.0
"""Busy seconds after which a measurement of the prefill rate counts half."""
MAX_RETRY_AFTER_S = 600


class PrefillQueue:
    """Counts prompt tokens that were submitted and have no first token yet. `now` is seconds of any one clock.

    `limit` is the most that may wait, None for no bound. A request is let in when nothing waits, however long it is.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.waiting = 0
        self._now = 0.0
        self._busy_s = 0.0
        self._done_tokens = 0.0

    def retry_after(self, tokens: int) -> int | None:
        """None when `tokens` more may enter, else whole seconds (at least 1) until they probably may."""
        if self.limit is None or self.waiting == 0 or self.waiting + tokens <= self.limit:
            return None
        too_many = min(self.waiting, self.waiting + tokens - self.limit)
        if not self._done_tokens:
            return 1
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(too_many * self._busy_s / self._done_tokens)))

    def enter(self, tokens: int, now: float) -> None:
        self._advance(now)
        self.waiting += tokens

    def leave(self, tokens: int, now: float, *, prefilled: bool) -> None:
        """Tokens that got their first output token (`prefilled`), or were given up."""
        self._advance(now)
        self.waiting -= tokens
        assert self.waiting >= 0, "more tokens left the queue than entered it"
        if prefilled:
            self._done_tokens += tokens

    def _advance(self, now: float) -> None:
        """Time counts only while something waits: an idle engine is not a slow one."""
        if self.waiting:
            elapsed = now - self._now
            decay = 0.5 ** (elapsed / RATE_HALF_LIFE_S)
            self._busy_s = self._busy_s * decay + elapsed
            self._done_tokens *= decay
        self._now = now
