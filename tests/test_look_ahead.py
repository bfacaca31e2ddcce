"""Look-ahead asks the routers of the next layers, of every architecture, and changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_parity import generate, prompts, reference
from torch import nn

from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.model import AttentionSpec, ExpertsSpec, ModelSpec
from moeyard.engine.predict.base import Rows
from moeyard.engine.predict.look_ahead import LookAhead, any_of
from moeyard.engine.predict.meter import Measured
from moeyard.engine.predict.routers import RouterWatch

OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "max_batched_tokens": 48, "block_size": 8, "progress": False}


class Seen:
    """An engine with a look-ahead which is asked all that it can be: what it said, and what the routers chose."""

    def __init__(self, path, monkeypatch, expert_memory=None, **options):
        self.routed, self.said, self.ids = {}, [], []
        warm_up = Engine._warm_up

        def watched(engine, dtype):
            self.look = LookAhead(engine._model, engine.spec, **options)
            peak = warm_up(engine, dtype)
            self.look.settle()
            return peak

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_warm_up", watched)
            self.engine = Engine(EngineConfig(model=str(path), expert_memory=expert_memory, **OPTIONS))
        if expert_memory is not None:
            return  # the engine itself tells the predictors
        self.engine._experts.recorder = self.record
        run = self.engine._run

        def told(step):
            self.look.begin_step([Rows(request_id="", first=0, token_ids=[0] * sum(step.tokens.values()), start=0)])
            try:
                return run(step)
            finally:
                self.look.end_step()

        self.engine._run = told

    def record(self, layer, ids_TK, weights_TK):
        ids_TK = ids_TK.gather(-1, weights_TK.argsort(dim=-1, descending=True, stable=True)).numpy()
        for (at, ahead), asked in self.look._asked.items():
            if at == layer:
                self.said.append((layer, ahead, asked, ids_TK))
        self.look.routed(layer, ids_TK)
        for ahead in range(1, self.look.depth + 1):
            if layer + ahead < len(self.engine.spec.experts):
                self.look.upcoming(layer + ahead)

    def recall(self, ahead):
        """At k and 2k."""
        right, k = [], 0
        for _, d, asked, ids_TK in self.said:
            if d == ahead:
                k = ids_TK.shape[1]
                right.append((ids_TK[:, :, None] == asked.ids_TP[:, None, :]).any(1))
        right_P = np.concatenate(right).sum(0) / (sum(map(len, right)) * k)
        return right_P[:k].sum(), right_P.sum()


OFTEN = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "dots1")
"""Architectures whose blocks differ most; the others with `-m slow`."""
RARELY = [pytest.param(name, marks=pytest.mark.slow) for name in tiny.ARCHITECTURES if name not in OFTEN]


@pytest.mark.parametrize("architecture", [*OFTEN, *RARELY])
def test_all_architectures_can_be_asked_and_answer_the_same(architecture, tmp_path, monkeypatch):
    path = tiny.save(architecture, tmp_path / architecture)
    seen = Seen(path, monkeypatch)
    texts = prompts(seen.engine.vocab_size, 3, longest=30)
    layers = len(seen.engine.spec.experts)
    assert seen.look.layers == list(range(layers))
    assert generate(seen.engine, texts, 4) == reference(path, texts, 4)
    tokens = sum(map(len, texts)) + 3 * len(texts)
    assert [int(layer.counts_E.sum()) for layer in seen.engine._experts.layers] == [
        tokens * spec.top_k for spec in seen.engine.spec.experts
    ], "asking is not counted"
    steps = seen.engine._steps
    assert seen.look.asks == steps * sum(min(seen.look.depth, layers - 1 - layer) for layer in range(layers))
    top_k, experts = seen.engine.spec.experts[0].top_k, seen.engine.spec.experts[0].num_experts
    for _, _, asked, _ in seen.said:
        assert asked.ids_TP.shape[1] == min(2 * top_k, experts), "the router's scores are found"
        assert all(len(set(row)) == len(row) and min(row) >= 0 for row in asked.ids_TP.tolist())
    seen.engine.close()


def still(path):
    """Makes all layers of a checkpoint add nothing to the residual stream."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_where_layers_change_nothing_it_is_always_right(architecture, tmp_path, monkeypatch):
    path = still(tiny.save(architecture, tmp_path / architecture, num_hidden_layers=5))
    seen = Seen(path, monkeypatch)
    generate(seen.engine, prompts(seen.engine.vocab_size, 3, longest=20), 8)
    for ahead in (1, 2, 3):
        assert seen.recall(ahead) == (1.0, 1.0)
        for layer in range(ahead, len(seen.engine.spec.experts)):
            top_k = seen.engine.spec.experts[layer].top_k
            places = seen.look.places(layer, ahead)
            assert (places[:top_k] > 0.8).all() and (places[top_k:] < 0.2).all(), "it has counted how right it is"
    generate(seen.engine, [[1]], 1)
    asked = seen.said[-1][2]
    used = np.zeros(len(asked.p_E), dtype=bool)
    used[asked.ids_TP[0, : seen.engine.spec.experts[0].top_k]] = True
    assert asked.p_E[used].min() > asked.p_E[~used].max()
    seen.engine.close()


def test_it_asks_the_next_layers_router(tmp_path, monkeypatch):
    """What it names follows from the weights of the layer that is asked, its norm included."""
    seen = Seen(tiny.save("qwen3_moe", tmp_path / "model"), monkeypatch, mean=False)
    model, streams = seen.engine._model, {}
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, args: streams.__setitem__(0, args[0].clone()))
    generate(seen.engine, prompts(seen.engine.vocab_size, 1, longest=9), 1)
    for layer in (1, 2):
        block = model.model.layers[layer]
        with torch.inference_mode():
            logits_TE = block.post_attention_layernorm(streams[0])[0] @ block.mlp.gate.weight.T
        asked = next(asked for at, ahead, asked, _ in seen.said if (at, ahead) == (layer, layer))
        assert asked.ids_TP.tolist() == logits_TE.argsort(-1, descending=True)[:, : 2 * 3].tolist()
    seen.engine.close()


def test_the_mean_of_what_layers_add_is_learned(tmp_path, monkeypatch):
    """Where every layer adds the same to all tokens, it is right once it has seen a step, and not without the mean."""
    recalls = {}
    for mean in (True, False):
        seen = Seen(still(tiny.save("qwen3_moe", tmp_path / "model", num_hidden_layers=4)), monkeypatch, mean=mean)
        generator = torch.Generator().manual_seed(3)
        for layer in seen.engine._model.model.layers:
            shift = torch.randn(48, generator=generator) * 10
            layer.self_attn.register_forward_hook(lambda module, args, out, shift=shift: (out[0] + shift, *out[1:]))
        generate(seen.engine, prompts(seen.engine.vocab_size, 1, longest=9), 1)
        seen.said.clear()
        generate(seen.engine, prompts(seen.engine.vocab_size, 1, longest=9, seed=1), 8)
        recalls[mean] = [seen.recall(ahead)[0] for ahead in (1, 2, 3)]
        seen.engine.close()
    assert min(recalls[True]) > 0.99
    assert max(recalls[False]) < 0.9


def test_a_step_that_was_not_announced_is_nothing(tmp_path, monkeypatch):
    seen = Seen(tiny.save("mixtral", tmp_path / "model"), monkeypatch)
    assert seen.look.upcoming(1) is None
    seen.look.begin_step([Rows(request_id="a", first=0, token_ids=[1, 2, 3], start=0)])
    assert seen.look.upcoming(0) is None and seen.look.upcoming(1) is None
    seen.look._see(0, torch.zeros(1, 2, 48))
    assert seen.look.upcoming(1) is None, "another number of tokens"
    seen.look._see(0, torch.zeros(1, 3, 48))
    assert seen.look.upcoming(0) is None and seen.look.upcoming(1).shape == (6,)
    seen.look.end_step()
    assert seen.look.upcoming(1) is None
    seen.look.settle()  # a second time is nothing
    seen.engine.close()


def test_what_is_ahead_must_be_a_layer(tmp_path):
    with pytest.raises(ValueError, match=r"^depth is 0"):
        LookAhead(nn.Linear(1, 1), ModelSpec(architecture="", hidden_size=1, vocab_size=1, attention=()), 0)


def test_experts_are_read_ahead_on_its_word_and_metered(tmp_path):
    path = tiny.save("qwen3_moe", tmp_path / "model", num_hidden_layers=4, num_experts=32)
    engine = Engine(
        EngineConfig(
            model=str(path),
            dtype="float32",
            device="cpu",
            threads=1,
            kv_memory="8MiB",
            progress=False,
            expert_memory="50%",
        )
    )
    forecast = engine._offload.forecast
    assert engine._offload.plan.size.ahead and "look_ahead" in [meter.name for meter in forecast.meters]
    forecast.meters = [meter for meter in forecast.meters if meter.name == "look_ahead"]
    forecast._least = 0.1  # experts that are worth reading ahead are larger than these
    texts = prompts(100, 1, longest=20)
    assert generate(engine, texts, 12) == reference(path, texts, 12)
    stats = engine.stats(with_experts=False)
    measured = Measured.from_list(stats.predictors["look_ahead"])
    assert stats.expert_ahead > 0 and measured.used_bytes > 0 and measured.us_per_token > 0
    assert 0 < measured.recall_k <= measured.recall_2k <= 1 and measured.precision is not None
    engine.close()


# The watch


class Experts(nn.Module):
    def forward(self, x, ids, weights):
        return x


class Chooser(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return weights, ids


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x, mask=None):
        self.calls += 1
        return self.project(x)


class Layer(nn.Module):
    """A layer of many kinds: with the routing in a block of its own, or among everything else."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm, self.attention, self.chooser, self.experts = nn.LayerNorm(8), Attention(), Chooser(), Experts()
        self.shared = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        x = x + self.attention(x)
        flat = self.norm(x)[0]
        if self.kind == "in code":
            weights, ids = self.chooser.gate(flat).topk(2)
        elif self.kind == "by name":
            weights, ids = self.chooser(flat)
            return x + self.experts(flat, ids=ids, weights=weights)[None]
        else:
            weights, ids = self.chooser(flat)
        return x + self.experts(flat, ids, weights)[None]


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList([Layer(kind), Layer(kind)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def spec_of(layers, vocab_size=1):
    experts = ExpertsSpec(
        module="",
        num_experts=4,
        top_k=2,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
        parameters=(),
    )
    attention = AttentionSpec(layer=0, heads=1, kv_heads=1, head_dim=8, value_dim=8)
    return ModelSpec(
        architecture="",
        hidden_size=8,
        vocab_size=vocab_size,
        attention=tuple(replace(attention, module=f"layers.{n}.attention") for n in range(layers)),
        experts=tuple(replace(experts, module=f"layers.{n}.experts") for n in range(layers)),
    )


@pytest.mark.parametrize(("kind", "found"), [("module", True), ("in code", False), ("by name", False)])
@torch.inference_mode()
def test_a_layer_without_a_block_is_asked_by_its_router_or_not_at_all(kind, found):
    """Attention is never run to ask: it writes keys and values."""
    model = Model(kind)
    watch = RouterWatch(model, spec_of(2))
    x = torch.randn(1, 3, 8)
    model(x)
    routers = watch.settle()
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert [router is not None for router in routers] == [found, found]
    if not found:
        return
    calls = model.layers[1].attention.calls
    choice = routers[1].ask(x)
    weights, ids = model.layers[1].chooser(x[0])
    assert torch.equal(choice.ids_TK, ids) and torch.equal(choice.weights_TK, weights)
    assert torch.equal(choice.scores_TE, model.layers[1].chooser.gate(x[0]))
    assert model.layers[1].attention.calls == calls
    assert "forward" not in model.layers[1].experts.__dict__


def test_shared_experts_are_left_out_when_asked(tmp_path, monkeypatch):
    seen = Seen(tiny.save("ernie4_5_moe", tmp_path / "model"), monkeypatch)
    silent = [router.silent for router in seen.look._routers]
    assert [[type(module).__name__ for module in modules] for modules in silent] == [["Ernie4_5_MoeMLP"]] * len(silent)
    calls = []
    run = silent[1][0].forward
    silent[1][0].forward = lambda x: calls.append(len(x)) or run(x)
    generate(seen.engine, prompts(seen.engine.vocab_size, 1, longest=9), 2)
    assert len(calls) == seen.engine._steps, "once for each step, and never to ask"
    seen.engine.close()


# Probabilities


@given(st.data())
@settings(deadline=None)
def test_chances_of_any_row(data):
    tokens, places, experts = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4)), data.draw(st.integers(4, 7))
    top_k = data.draw(st.integers(1, 4))
    ids_TP = np.array(
        [data.draw(st.permutations(range(experts)))[:places] for _ in range(tokens)], dtype=np.int64
    ).reshape(tokens, places)
    none = data.draw(arrays(bool, (tokens, places)))
    ids_TP[none] = -1
    places_P = np.array(data.draw(st.lists(st.floats(0, 0.999), min_size=places, max_size=places)))
    others = max(0.0, top_k - places_P.sum()) / max(1, experts - places)
    chance_E = []
    for expert in range(experts):
        unused = 1.0
        for row in ids_TP:
            place = list(row).index(expert) if expert in row else None
            unused *= 1 - (min(others, 1 - 1e-6) if place is None else places_P[place])
        chance_E.append(1 - unused)
    assert any_of(ids_TP, places_P, top_k, experts) == pytest.approx(chance_E, abs=1e-5)
