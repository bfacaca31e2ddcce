"""What the ranks agree on before a step: who computes how many tokens, and how they reach the experts."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The same on every rank. `tokens_P` has each rank's tokens; `dispatcher` is `all_gather` or `all_to_all`.

    `degree` is the number of chunks of a layer, 0 when each layer chooses by the counts that its ranks exchange.
    `table_digest` stands for where the experts are. `balanced` steps make a balancing plan in each layer.
    """

    step: int
    tokens_P: tuple[int, ...]
    dispatcher: str
    degree: int
    table_digest: int
    balanced: bool = False

    @property
    def digest(self) -> int:
        """A number of 31 bits that travels with every exchange of counts."""
        text = repr((self.step, self.tokens_P, self.dispatcher, self.degree, self.table_digest, self.balanced))
        return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big") & 0x7FFFFFFF
