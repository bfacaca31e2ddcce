"""Whether what a layer's ranks receive fits into their memory, and in how many chunks it does.

P: ranks, C: parts of each rank's tokens. Rows are tokens that come to a rank, pairs their experts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_PARTS = 8
MOST_PARTS = 64

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowBudget:
    """What each rank can spare for one layer's received tokens; the same value on every rank.

    Attributes:
        bytes_P: of each rank.
        row_bytes: of a row with its way there and back, the next chunk's on its way included.
        pair_bytes: of a row in one expert.
        most_pairs: experts of one token that may be on one rank.
    """

    bytes_P: tuple[int, ...]
    row_bytes: int
    pair_bytes: int
    most_pairs: int

    def surely_fits(self, rows: int) -> bool:
        """Whether so many rows fit wherever they go: nothing needs to be counted then."""
        return rows * self._worst <= min(self.bytes_P)

    @property
    def _worst(self) -> int:
        return self.row_bytes + self.most_pairs * self.pair_bytes

    @property
    def most_pairs_P(self) -> Integers:
        """[P] pairs that each rank can take at once, when each comes alone."""
        return np.maximum(np.array(self.bytes_P, dtype=np.int64) // (self.row_bytes + self.pair_bytes), 1)

    def least_degree(self, rows_PCP: Integers, pairs_PCP: Integers) -> int:
        """The fewest chunks, a power of two, of which each fits on every rank: from the rows and pairs that each rank
        has in each of C parts for each rank. C, when none does.
        """
        need_CP = rows_PCP.sum(0) * self.row_bytes + pairs_PCP.sum(0) * self.pair_bytes
        parts, ranks = need_CP.shape
        degree = 1
        while degree < parts:
            if (need_CP.reshape(degree, parts // degree, ranks).sum(1) <= np.array(self.bytes_P)).all():
                break
            degree *= 2
        return degree

    def least_even_degree(self, tokens_P: Sequence[int]) -> int:
        """The fewest chunks, a power of two, when every rank gets all ranks' tokens, padded to the most."""
        degree = 1
        while degree < MOST_PARTS and not self.surely_fits(len(tokens_P) * -(-max(tokens_P) // degree)):
            degree *= 2
        return degree

    def parts(self, tokens: int) -> int:
        """In how many parts, a power of two, tokens must be counted so that one of them fits even when all `tokens` of
        every rank go to the same one. Raises ValueError when more than MOST_PARTS would be needed.
        """
        parts = LEAST_PARTS
        while not self.surely_fits(len(self.bytes_P) * -(-tokens // parts)):
            parts *= 2
            if parts > MOST_PARTS:
                ranks = len(self.bytes_P)
                fits = min(self.bytes_P) // self._worst // ranks * MOST_PARTS
                raise ValueError(
                    f"max_batched_tokens is {tokens}; if all tokens of {ranks} ranks went to one rank's experts, it"
                    f" would not have the memory for them: set --max-batched-tokens {max(fits, 1)} or less, or leave it"
                    " more"
                )
        return parts
