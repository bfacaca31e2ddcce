"""The engine of `moeyard bench batching`, in its own process: `python -m moeyard.bench.batching_sides NAME`.

Its routing follows a trace; see `sides` for the protocol.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .forced_routing import ForcedRouting
from .sides import MoeyardSide, Workload, serve
from .token_trace import read_token_trace


class BatchingSide(MoeyardSide):
    """Requests that take turns to decode, as many in a step as each turn of the bench says."""

    def load(self, config: dict[str, Any], routing: str = "", **_: Any) -> dict[str, Any]:
        answer = super().load(config)
        self._routing = ForcedRouting(self._engine._model, read_token_trace(routing).topk_TLK)
        return answer

    def turn(
        self,
        workload: dict[str, Any],
        prompts: list[list[int]],
        routing: bool = False,
        starts: Sequence[int] = (),
        room: int = 1,
    ) -> dict[str, Any]:
        """`tokens` of each request, whose tokens route like the trace from its start on, and of the steps after all
        have their first token `decode_s` and `counts`. `room`: of a step.
        """
        from ..engine.messages import Submit
        from ..engine.params import SamplingParams

        assert not routing, "what is counted here does not depend on it"
        w, engine = Workload(**workload), self._engine
        self._turns += 1
        ids = [f"{self._turns}-{i}" for i in range(len(prompts))]
        self._routing.follow(engine, dict(zip(ids, starts, strict=True)))
        assert engine._picker is not None
        engine._picker.most = room
        params = SamplingParams(temperature=0.0, max_tokens=w.output_len, ignore_eos=True).to_dict()
        for request_id, prompt in zip(ids, prompts, strict=True):
            engine.submit(Submit(request_id=request_id, prompt_ids=prompt, params=params))
        tokens: dict[str, list[int]] = {i: [] for i in ids}
        before, began, waits = self._counts(), time.perf_counter(), [0]
        first = True
        while engine.has_work:
            for delta in engine.step():
                if delta.error:
                    raise RuntimeError(f"request {delta.request_id}: {delta.error}")
                tokens[delta.request_id] += delta.token_ids
            waits.append(max((r.passed_over for r in engine._scheduler.running), default=0))
            if first and all(tokens.values()):
                first, before, began = False, self._counts(), time.perf_counter()
        decode_s, after = time.perf_counter() - began, self._counts()
        counts = {name: after[name] - before[name] for name in after}
        return {
            "tokens": [tokens[i] for i in ids],
            "decode_s": decode_s,
            "counts": {**counts, "longest_wait": max(waits)},
        }

    def _counts(self) -> dict[str, int]:
        stats = self._engine.stats(with_experts=False)
        return {
            "steps": stats.steps,
            "tokens": stats.generated_tokens,
            "touched": stats.expert_hits + stats.expert_misses,
            "missed": stats.expert_misses,
            "read_bytes": stats.expert_read_bytes,
            "wait_ns": stats.expert_wait_ns,
            "regrouped": stats.decode_regrouped,
        }


if __name__ == "__main__":
    serve(BatchingSide())
