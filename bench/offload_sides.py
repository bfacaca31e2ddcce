"""The engines of `moeyard bench offload`, each in its own process: `python -m moeyard.bench.offload_sides NAME`.

Routing follows a trace on all of them; see `sides` for the protocol.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .forced_routing import ForcedRouting
from .sides import MoeyardSide, Workload, serve
from .token_trace import read_token_trace

COUNTERS = tuple(
    f"expert_{name}"
    for name in ("hits", "misses", "read_bytes", "ahead", "ahead_ready", "ahead_bytes", "ahead_used_bytes", "wait_ns")
)


class OffloadedSide(MoeyardSide):
    """Our engine, with a budget for experts or without."""

    def load(self, config: dict[str, Any], routing: str | None = None, **_: Any) -> dict[str, Any]:
        answer = super().load(config)
        self._routing = ForcedRouting(self._engine._model, read_token_trace(routing).topk_TLK) if routing else None
        return answer

    def turn(
        self, workload: dict[str, Any], prompts: list[list[int]], routing: bool = False, starts: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Also `decode_s`, from the first token of all requests to the last, and the store's counters over it."""
        if self._routing is not None:
            self._routing.start(starts, workload["input_len"])
        step, before = self._engine.step, self.counters()
        begun: set[str] = set()

        def counting() -> Any:
            nonlocal before
            deltas = step()
            if len(begun) < len(prompts):
                begun.update(delta.request_id for delta in deltas if delta.token_ids)
                if len(begun) == len(prompts):  # what prompts have read does not count
                    before = self.counters()
            return deltas

        self._engine.step = counting  # type: ignore[method-assign]
        try:
            answer = super().turn(workload, prompts, routing)
        finally:
            self._engine.step = step  # type: ignore[method-assign]
        after = self.counters()
        stamps = answer["stamps"]
        answer["decode_s"] = max(s[-1] for s in stamps) - max(s[0] for s in stamps)
        answer["counters"] = {name: after[name] - before[name] for name in after}
        return answer

    def counters(self) -> dict[str, int]:
        """What the store counts."""
        stats = self._engine.stats(with_experts=False)
        return {name: getattr(stats, name, 0) for name in COUNTERS}


class AccelerateSide:
    """transformers with accelerate's offload to disk: whole layers, as many as the budget has room for in memory.

    What is read is dropped from the page cache before each step, or the cache would be memory beyond the budget.
    """

    def load(self, config: dict[str, Any], routing: str | None, resident_layers: int, folder: str) -> dict[str, Any]:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(config["threads"])
        start = time.perf_counter()
        described = transformers.AutoConfig.from_pretrained(config["model"])
        layers = described.num_hidden_layers
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        for layer in range(layers):
            on_disk = layer >= resident_layers
            for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
                places[f"model.layers.{layer}.{part}"] = "cpu"
            places[f"model.layers.{layer}.mlp.experts"] = "disk" if on_disk else "cpu"
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            config["model"], dtype=getattr(torch, config["dtype"]), device_map=places, offload_folder=folder
        ).eval()
        self._model.generation_config.eos_token_id = None
        self._routing = ForcedRouting(self._model, read_token_trace(routing).topk_TLK) if routing else None
        self._files = [os.open(f, os.O_RDONLY) for f in sorted(Path(folder).rglob("*")) if f.is_file()]
        if not self._files:  # accelerate reads the checkpoint itself where that is possible
            self._files = [os.open(f, os.O_RDONLY) for f in sorted(Path(config["model"]).glob("*.safetensors"))]
        self._model.register_forward_pre_hook(lambda *_: self._drop())
        return {"load_s": time.perf_counter() - start}

    def _drop(self) -> None:
        for file in self._files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def turn(self, workload: dict[str, Any], prompts: list[list[int]], starts: Sequence[int] = ()) -> dict[str, Any]:
        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        w = Workload(**workload)
        if self._routing is not None:
            self._routing.start(starts, w.input_len)
        stamps: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
                stamps.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        options = GenerationConfig(do_sample=False, max_new_tokens=w.output_len, pad_token_id=0)
        start = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        return {
            "seconds": time.perf_counter() - start,
            "tokens": out[:, ids.shape[1] :].tolist(),
            "decode_s": stamps[-1] - stamps[0],
            "counters": {},
        }


SIDES: dict[str, Any] = {"accelerate": AccelerateSide}

if __name__ == "__main__":
    serve(SIDES.get(sys.argv[1], OffloadedSide)())
