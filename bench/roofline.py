"""How fast a Mixture-of-Experts model could run here: a bound from bytes and operations, and the machine's two rates.

The bound of a step is `max(bytes / bandwidth, operations / matrix peak)`, where the bytes are every weight that the
step must read, once, and the keys and values of its requests; nothing is assumed to stay in a cache between steps.
Routing is taken as uniform: `B` tokens touch `E * (1 - (1 - k/E)^B)` of a layer's `E` experts.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Rates of a machine: operations per second (a multiply-add is two) and bytes read per second."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Sizes of a model, in parameters and elements.

    `dense_params` is read by every token: all but experts, embedding and head. `kv_elements` is what one token adds to
    the cache of one layer, keys and values together, and `layers` are those that have keys and values; the states of a
    request in the others are `state_bytes`.
    """

    moe_layers: int
    experts: int
    top_k: int
    expert_params: int
    dense_params: int
    head_params: int
    embedding_params: int
    layers: int
    kv_elements: int
    query_elements: int
    itemsize: int
    state_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """All weights in memory; a head tied to the embedding is counted once (`embedding_params` is 0 then)."""
        routed = self.moe_layers * self.experts * self.expert_params
        return self.itemsize * (routed + self.dense_params + self.head_params + self.embedding_params)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.itemsize * self.layers * self.kv_elements


def experts_touched(experts: int, top_k: int, tokens: int) -> float:
    """Expected number of distinct experts that `tokens` tokens of uniform routing use in one layer."""
    return experts * (1 - (1 - top_k / experts) ** tokens) if experts else 0.0


def _step_seconds(cost: ModelCost, peaks: Peaks, *, tokens: int, heads: int, read: float, pairs: float) -> float:
    """`tokens` new ones, logits for `heads` of them, one per request, `read` old tokens' keys and values, `pairs` of
    query and key. Each request's states are read and written once; what a state costs to compute is left out."""
    experts = cost.moe_layers * experts_touched(cost.experts, cost.top_k, tokens) * cost.expert_params
    weights = experts + cost.dense_params + cost.head_params
    size = cost.itemsize * weights + cost.kv_bytes_per_token * (read + tokens) + 2 * heads * cost.state_bytes
    per_token = cost.dense_params + cost.moe_layers * cost.top_k * cost.expert_params
    flops = 2 * tokens * per_token + 2 * heads * cost.head_params + 4 * pairs * cost.layers * cost.query_elements
    return max(size / peaks.bytes_per_s, flops / peaks.flops_per_s)


def decode_seconds(cost: ModelCost, peaks: Peaks, *, batch: int, context: int) -> float:
    """Least time of a step that adds one token to each of `batch` requests with `context` tokens before it."""
    return _step_seconds(cost, peaks, tokens=batch, heads=batch, read=batch * context, pairs=batch * (context + 1))


def prefill_seconds(cost: ModelCost, peaks: Peaks, *, batch: int, length: int) -> float:
    """Least time to read `batch` prompts of `length` tokens in one step and give one token each."""
    pairs = batch * length * (length + 1) / 2
    return _step_seconds(cost, peaks, tokens=batch * length, heads=batch, read=0, pairs=pairs)


def workload_seconds(cost: ModelCost, peaks: Peaks, *, batch: int, input_len: int, output_len: int) -> float:
    """Least time of one prefill, which gives the first token, and `output_len - 1` decode steps."""
    steps = (decode_seconds(cost, peaks, batch=batch, context=input_len + i) for i in range(output_len - 1))
    return prefill_seconds(cost, peaks, batch=batch, length=input_len) + sum(steps)


def model_cost(config: Any, dtype: str) -> ModelCost:
    """The sizes of the transformers model of `config`, found on the meta device (no memory, no weights).

    Raises ValueError when the number of experts per token cannot be read from the config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..engine.model import build, probe

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    routed = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "experts" and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]
    experts = max((p.shape[0] for module in routed for p in module.parameters(recurse=False)), default=0)
    routed_params = sum(p.numel() for module in routed for p in module.parameters(recurse=False))
    head_params = head.weight.numel()
    embedding_params = 0 if head.weight is embedding.weight else embedding.weight.numel()
    top_k = getattr(text, "num_experts_per_tok", None)
    if routed and not top_k:
        raise ValueError(f"model: the config of {text.model_type!r} has no num_experts_per_tok; give another MODEL")
    heads = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None):  # latent attention, cached expanded
        key = text.qk_nope_head_dim + text.qk_rope_head_dim
        kv_elements, query_elements = heads * (key + text.v_head_dim), heads * key
    else:
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        kv_elements, query_elements = 2 * kv_heads * head_dim, heads * head_dim
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    attending = sum("attention" in kind and kind != "linear_attention" for kind in kinds)
    state_bytes = 0
    if attending < len(kinds):
        state_bytes = probe(build(copy.deepcopy(text), getattr(torch, dtype))).state_bytes
    return ModelCost(
        moe_layers=len(routed),
        experts=experts,
        top_k=top_k or 0,
        expert_params=routed_params // (len(routed) * experts) if routed else 0,
        dense_params=sum(p.numel() for p in model.parameters()) - routed_params - head_params - embedding_params,
        head_params=head_params,
        embedding_params=embedding_params,
        layers=attending,
        kv_elements=kv_elements,
        query_elements=query_elements,
        itemsize=getattr(torch, dtype).itemsize,
        state_bytes=state_bytes,
    )


def measure(*, device: str, threads: int, matrix: int, read_bytes: int, repeats: int) -> dict[str, float]:
    """The best rates seen: `bfloat16` and `float32` products (operations per second), and `read` (bytes per second).

    Products are of square matrices of side `matrix` and half of it, the second one as it is and transposed; reads add
    up a buffer of `read_bytes`. Each is run `repeats` times after one unmeasured time.
    """
    import torch

    torch.set_num_threads(threads)
    sync = torch.cuda.synchronize if device == "cuda" else _nothing
    rates = {}
    for dtype in ("bfloat16", "float32"):
        best = 0.0
        for size in (matrix // 2 or 1, matrix):
            a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
            out = torch.empty_like(a)
            seconds = min(_best(partial(torch.mm, a, w, out=out), sync, repeats) for w in (b, b.t()))
            best = max(best, 2 * size**3 / seconds)
        rates[dtype] = best
    values = torch.ones(read_bytes // 4, device=device)  # written, so that every page is real memory
    rates["read"] = values.nbytes / _best(values.sum, sync, repeats)
    return rates


def _nothing() -> None:
    pass


def _best(call: Callable[[], Any], sync: Callable[[], None], repeats: int) -> float:
    call()
    sync()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        sync()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Prints the rates as JSON; its own process, so that thread settings are those of the measured engines."""
    parser = argparse.ArgumentParser()
    for name in ("--threads", "--matrix", "--read-bytes", "--repeats"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--device", required=True)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
