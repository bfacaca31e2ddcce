"""Experts by a recorded trace instead of a random router's choice: random weights have no locality, real text has.

T: tokens of a call, K: experts per token, L: MoE layers, N: rows of the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..engine.predict.base import Rows


class ForcedRouting:
    """Replaces the ids of every router of a model that returns (logits [T, E], weights [T, K], ids [T, K]).

    The weights are the router's own probabilities of the forced experts, made to sum to one, the largest for the first
    expert of the trace's order, which is that of its router's weights. Calls are those of one prefill of equal prompts,
    request after request, and then of steps of one token per request in the same order (`start`); or of any steps of
    our engine, which says what is in them (`follow`).
    """

    def __init__(self, model: nn.Module, topk_NLK: npt.NDArray[Any]) -> None:
        routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        if len(routers) != topk_NLK.shape[1]:
            raise ValueError(f"routing: the trace has {topk_NLK.shape[1]} layers, the model {len(routers)} routers")
        self._topk_NLK = torch.from_numpy(np.ascontiguousarray(topk_NLK, dtype=np.int64))
        self._starts: list[int] = []
        self._done = 0
        self._row_T: torch.Tensor | None = None
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda _module, _args, out, layer=layer: self._force(layer, out))

    def start(self, starts: Sequence[int], input_len: int) -> None:
        """The next calls are of requests whose tokens route like the rows of the trace from `starts` on."""
        self._starts, self._input_len, self._done = list(starts), input_len, 0

    def follow(self, engine: Any, starts: Mapping[str, int]) -> None:
        """The next steps of an `engine.Engine` route like the rows of the trace from `starts` on, by request. What is
        in a step is what its predictors are told.
        """
        run = type(engine)._run_batch  # not what an earlier call has made of it

        def follow_step(batch: Any, rows: Sequence[Rows] = ()) -> torch.Tensor:
            begins = [(starts[row.request_id] + row.start, len(row.token_ids)) for row in rows]
            self._row_T = torch.cat([torch.arange(begin, begin + count) for begin, count in begins])
            try:
                found: torch.Tensor = run(engine, batch, rows)
                return found
            finally:
                self._row_T = None

        engine._run_batch = follow_step

    def _force(self, layer: int, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE, weights_TK, ids_TK = out
        rows = self._row_T if self._row_T is not None else self._next_rows(layer, len(ids_TK))
        if rows is None:
            return out
        if len(rows) != len(ids_TK):
            raise ValueError(f"routing: a step of {len(ids_TK)} tokens, and {len(rows)} are known of")
        ids_TK = self._topk_NLK[rows, layer].to(ids_TK.device)
        weights = logits_TE.float().softmax(-1).gather(1, ids_TK).sort(dim=-1, descending=True).values
        return logits_TE, (weights / weights.sum(-1, keepdim=True)).to(weights_TK.dtype), ids_TK

    def _next_rows(self, layer: int, count: int) -> torch.Tensor | None:
        """Of a step of equal requests."""
        requests = len(self._starts)
        if not requests:
            return None
        tokens = count // requests
        if tokens * requests != count or tokens != (1 if self._done else self._input_len):
            raise ValueError(f"routing: a step of {count} tokens is not one of {requests} equal requests")
        rows = torch.cat([torch.arange(start + self._done, start + self._done + tokens) for start in self._starts])
        if layer == self._topk_NLK.shape[1] - 1:
            self._done += tokens
        return rows
