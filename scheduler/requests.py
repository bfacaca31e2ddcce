"""One sequence being generated: its tokens, and how much of it is in the KV cache."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any


class Status(Enum):
    WAITING = auto()  # in the queue: holds no block
    RUNNING = auto()  # admitted: holds blocks for all its known tokens but perhaps the last
    FINISHED = auto()  # finished or aborted: holds no block


class Request:
    """State of one request. Only `Scheduler` and `BlockPool` change it; everyone may read it.

    Public fields: `id`; `tokens`, the prompt and then the output; `prompt_len`; `max_total`, the most tokens
    it may reach; `computed`, the number of leading tokens whose KV is in the cache; `block_table`, the KV
    blocks in the order of the tokens; `state_slot`, its slot among the layers' states, in a model that has
    such (-1: none); `cached_tokens`, the prompt tokens that the prefix cache had at the first admission;
    `status`; `passed_over`, the steps in a row in which it could decode and was not picked; `payload`, which
    belongs to the caller.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "cache_salt",
        "cached_tokens",
        "computed",
        "id",
        "max_total",
        "num_published",
        "passed_over",
        "payload",
        "prompt_len",
        "started",
        "state_slot",
        "status",
        "tokens",
        "waits_for",
    )

    def __init__(
        self, id: str, prompt_ids: list[int], max_total: int, cache_salt: str = "", payload: Any = None
    ) -> None:
        assert 0 < len(prompt_ids) <= max_total, f"{len(prompt_ids)} prompt tokens, {max_total=}"
        self.id = id
        self.tokens = list(prompt_ids)
        self.prompt_len = len(prompt_ids)
        self.max_total = max_total
        self.cache_salt = cache_salt
        self.payload = payload
        self.status = Status.WAITING
        self.started = False  # has been admitted once
        self.computed = 0
        self.cached_tokens = 0
        self.passed_over = 0
        self.block_table: list[int] = []
        self.state_slot = -1
        self.block_hashes: list[bytes] = []  # of the leading full blocks; grows, never recomputed
        self.num_published = 0  # leading blocks that the prefix cache has been told about
        self.waits_for: bytes | None = None  # hash of a block that another request is about to compute

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def output_ids(self) -> list[int]:
        """A copy of the generated tokens."""
        return self.tokens[self.prompt_len :]

    def __repr__(self) -> str:
        return (
            f"Request({self.id!r}, {self.status.name}, {self.prompt_len} prompt + "
            f"{self.num_tokens - self.prompt_len} output tokens, {self.computed} computed)"
        )
