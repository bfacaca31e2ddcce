"""Routing that goes by token ids alone is known before a step: nothing is read in vain for it, and nothing missed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_look_ahead import Attention, Experts, spec_of
from test_parity import generate, prompts, reference
from torch import nn

from moeyard.engine import moe, offload_plan
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.predict.base import Predictor, Rows
from moeyard.engine.predict.exact import Exact
from moeyard.engine.predict.forecast import Forecast
from moeyard.engine.predict.meter import Measured, Meter
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost

HASHED = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 24,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 24,
    "n_routed_experts": 32,
    "num_experts_per_tok": 3,
    "layer_types": ["sliding_attention"] * 4,
    "sliding_window": 20,
    "o_groups": 2,
    "o_lora_rank": 8,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
}
"""DeepSeek-V4 without its compressed attention, which keeps a state that is not managed."""


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))


def save(path, hashed: int):
    """The first layers are routed by token ids, the others by what the router makes of the hidden states."""
    tiny.save("deepseek_v4", path, **HASHED, mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (4 - hashed))
    file = path / "model.safetensors"
    tensors, rng = load_file(file), np.random.default_rng(0)
    for name, tensor in tensors.items():
        if name.endswith("tid2eid"):
            rows = [rng.permutation(32)[:3] for _ in range(len(tensor))]
            tensors[name] = torch.tensor(np.array(rows), dtype=tensor.dtype)
    assert hashed == sum(name.endswith("tid2eid") for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def engine_of(path, **options):
    options = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": "8MiB", "block_size": 8} | options
    return Engine(EngineConfig(model=str(path), max_num_seqs=4, max_batched_tokens=16, progress=False, **options))


def test_layers_that_go_by_token_ids_are_known_and_read_in_time(tmp_path):
    """Prompts in chunks, several at once, and decoding."""
    path = save(tmp_path / "model", hashed=3)
    engine = engine_of(path, expert_memory="50%")
    forecast = engine._offload.forecast
    (meter,) = (meter for meter in forecast.meters if meter.exact)
    assert meter.predictor.layers == [0, 1, 2]
    texts = prompts(131, 3, longest=40)
    assert generate(engine, texts, 8) == reference(path, texts, 8)
    stats = engine.stats(with_experts=False)
    exact = Measured.from_list(stats.predictors["exact"])
    assert exact.recall_k == exact.recall_2k == exact.precision == 1.0
    assert exact.read_bytes == exact.used_bytes > 0, "nothing is read in vain"
    engine.close()


def test_of_layers_that_are_known_all_that_there_is_room_for_is_read_ahead(tmp_path, monkeypatch):
    """Nothing is missed: each layer's first misses, as many as there is room for, were asked for before."""
    path = save(tmp_path / "model", hashed=4)
    engine = engine_of(path, expert_memory="50%")
    store, visits, before = engine._offload.store, [], []
    ask, visit = store.ask, store.visit

    def asked(layer, experts, choose=None):
        before[:] = store.figures.misses, store.figures.ahead
        ask(layer, experts, choose)

    def seen(layer, experts, scores_LE=None):
        found = visit(layer, experts, scores_LE)
        visits.append((store.figures.misses - before[0], store.figures.ahead - before[1]))
        return found

    store.ask, store.visit = asked, seen
    text = prompts(131, 1, longest=40)
    assert generate(engine, text, 12) == reference(path, text, 12)
    missed = [(misses, ahead) for misses, ahead in visits if misses]
    assert missed and all(ahead == min(misses, store.size.ahead) for misses, ahead in missed)
    assert store.figures.ahead_bytes == store.figures.ahead_used_bytes
    engine.close()


def test_other_models_have_no_such_layers(tmp_path):
    engine = engine_of(tiny.save("deepseek_v3", tmp_path / "model", n_routed_experts=32), expert_memory="50%")
    assert "exact" not in [meter.name for meter in engine._offload.forecast.meters]
    engine.close()


# The watch


class Chooser(nn.Module):
    """By the ids, or by hidden states, or by both."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.gate = nn.Linear(8, 4, bias=False)
        self.register_buffer("table", torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3]]))

    def forward(self, x, input_ids):
        scores = self.gate(x.reshape(-1, 8))
        by_ids = self.table[input_ids.reshape(-1)]
        by_states = scores.topk(2).indices
        chosen = {"ids": by_ids, "states": by_states, "both": (by_ids + by_states) % 4}[self.kind]
        return scores, scores.gather(1, chosen), chosen


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.attention, self.chooser, self.experts = Attention(), Chooser(kind), Experts()

    def forward(self, x, input_ids):
        x = x + self.attention(x)
        _, weights, ids = self.chooser(x, input_ids)
        return x + self.experts(x[0], ids, weights)[None]


class Model(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList([Layer(kind) for kind in kinds])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids=input_ids)
        return x


def watched(*kinds):
    model = Model(*kinds)
    exact = Exact(model, spec_of(len(kinds), vocab_size=4))
    for ids in ([[0, 1, 2]], [[3]]):
        model(input_ids=torch.tensor(ids))
    exact.settle()
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    return model, exact


@torch.inference_mode()
def test_only_routers_that_go_by_ids_alone_are_known():
    model, exact = watched("ids", "states", "both", "ids")
    assert exact.layers == [0, 3]
    calls = [layer.attention.calls for layer in model.layers]
    exact.begin_step(
        [
            Rows(request_id="a", first=0, token_ids=[2, 2], start=0),
            Rows(request_id="b", first=2, token_ids=[0], start=7),
        ]
    )
    for layer in (0, 3):
        assert exact.upcoming(layer).tolist() == [1, 1, 0, 1]  # experts 3 and 0 of one, 0 and 1 of the other
    assert exact.upcoming(1) is None
    exact.routed(0, np.array([[3, 0]]))
    assert exact.upcoming(0) is None and exact.upcoming(3) is not None
    exact.end_step()
    assert exact.upcoming(3) is None
    assert calls == [layer.attention.calls for layer in model.layers], "attention is not run to ask"
    # an id is asked about once
    model.layers[0].chooser.forward = None
    exact.begin_step([Rows(request_id="a", first=0, token_ids=[0], start=2)])
    assert exact.upcoming(0).tolist() == [1, 1, 0, 0]
    with pytest.raises(TypeError):
        exact.begin_step([Rows(request_id="a", first=0, token_ids=[1], start=3)])


class Guess(Predictor):
    """Says that expert 1 of some layers is needed."""

    name = "guess"
    layers = tuple(range(6))

    def upcoming(self, layer):
        return np.array([0, 1], dtype=np.float32) if layer in self.layers else None


class Known(Guess):
    name, exact = "known", True
    layers = (1, 4)


def test_who_knows_goes_before_who_guesses_and_is_asked_about_all_layers():
    guess, known = (Meter(kind(), ns_per_byte=1) for kind in (Guess, Known))
    forecast = Forecast([], [guess], layers=6, experts=2, least_chance=0.5, depth=2)
    forecast.add(known)
    forecast.begin_step([Rows(request_id="a", first=0, token_ids=[1], start=0)])
    assert [(want.layer, want.by) for want in forecast.wants(-1)] == [(0, 0), (1, 1), (4, 1)]
    assert [(want.layer, want.by) for want in forecast.wants(1)] == [(2, 0), (3, 0), (4, 1)]
