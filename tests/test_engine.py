"""The engine's promises: sharing, preemption, chunking, neighbours and aborts change no token and leak nothing."""

import json
import random

import jsonschema_rs
import pytest
import tiny
import torch
from test_parity import generate, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeyard.engine.attention import PagedAttention
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.messages import Submit
from moeyard.engine.model import plug
from moeyard.engine.params import SamplingParams
from moeyard.engine.resolve import EMBEDDED
from moeyard.kernels.gathered_decode import gathered_decode_attention


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def make(checkpoint):
    engines = []

    def factory(**options):
        base = {"model": str(checkpoint), "dtype": "float32", "max_num_seqs": 16, "max_batched_tokens": 64}
        engines.append(Engine(EngineConfig(**{**base, "block_size": 4, "progress": False, **options})))
        return engines[-1]

    yield factory
    for engine in engines:
        engine.close()


def run(engine, requests):
    """Runs `{id: (prompt, params)}` to the end; per id the list of deltas."""
    out = {request_id: [] for request_id in requests}
    for request_id, (prompt, params) in requests.items():
        engine.submit(Submit(request_id=request_id, prompt_ids=prompt, params=params.to_dict()))
    while engine.has_work:
        for delta in engine.step():
            out[delta.request_id].append(delta)
    return out


def tokens(deltas):
    return [t for delta in deltas for t in delta.token_ids]


@pytest.mark.parametrize("had", [0, 1, 3])
def test_a_resumed_request_goes_on_and_its_prompt_is_not_counted_again(make, had):
    engine = make()
    prompt, params = list(range(10)), SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    whole = run(engine, {"whole": (prompt, params)})
    before = engine.stats(with_experts=False)
    assert (before.prompt_tokens, before.generated_tokens) == (10, 6)
    first = tokens(whole["whole"])[:had]
    engine.submit(Submit(request_id="rest", prompt_ids=prompt, params=params.to_dict(), output_ids=first))
    rest = []
    while engine.has_work:
        rest += engine.step()
    after = engine.stats(with_experts=False)
    assert first + tokens(rest) == tokens(whole["whole"])
    # Without a token yet the lost rank had not counted it.
    assert after.prompt_tokens - before.prompt_tokens == (0 if had else 10)
    assert after.generated_tokens - before.generated_tokens == 6 - had


def test_prefix_reuse_takes_effect_and_changes_no_token(make):
    shared = prompts(131, 1, seed=1)[0][:1] + list(range(40))
    ids = [[*shared, 7 * i % 131] for i in range(6)]
    plain = make(prefix_cache=False)
    wanted = [generate(plain, [p], 12)[0] for p in ids]
    cached = make()
    assert [generate(cached, [p], 12)[0] for p in ids] == wanted
    assert cached.stats(False).prefix_hit_tokens >= 5 * 40
    assert plain.stats(False).prefix_hit_tokens == 0
    assert cached._steps < plain._steps + 1


def test_salts_are_isolated(make):
    engine = make()
    prompt = list(range(30))
    for salt in ("", "a", "b", "a"):
        params = SamplingParams(temperature=0.0, max_tokens=1).to_dict()
        engine.submit(Submit(request_id=salt, prompt_ids=prompt, params=params, cache_salt=salt))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        hit = deltas[0].cached_tokens
    assert hit == 28
    assert engine.stats(False).prefix_hit_tokens == 28


def test_preemption_happens_and_changes_no_token(make):
    ids = prompts(131, 8, longest=40, seed=2)
    roomy = make(prefix_cache=False)
    wanted = generate(roomy, ids, 40)
    tight = make(max_model_len=100, kv_memory=str(2 * 3 * 64 * 4 * 110), prefix_cache=False)
    assert generate(tight, ids, 40) == wanted
    assert tight.stats(False).preemptions > 0
    assert roomy.stats(False).preemptions == 0
    assert tight.stats(False).kv_blocks_used == 0


@pytest.mark.parametrize("budget", [16, 17, 200])
def test_chunk_sizes_change_no_token(make, budget):
    ids = prompts(131, 10, longest=100, seed=3)
    wanted = generate(make(max_batched_tokens=1024), ids, 10)
    engine = make(max_batched_tokens=budget)
    assert generate(engine, ids, 10) == wanted


def test_a_seed_gives_the_same_tokens_whatever_the_batch(make):
    params = SamplingParams(temperature=1.3, top_p=0.9, top_k=40, seed=11, max_tokens=20, ignore_eos=True)
    prompt = list(range(17))
    alone = tokens(run(make(), {"x": (prompt, params)})["x"])
    others = {
        str(i): (p, SamplingParams(temperature=0.9, max_tokens=25, ignore_eos=True))
        for i, p in enumerate(prompts(131, 7, seed=4))
    }
    crowded = make(max_batched_tokens=24, max_num_seqs=12)
    assert tokens(run(crowded, {**others, "x": (prompt, params)})["x"]) == alone
    other_seed = SamplingParams(temperature=1.3, seed=12, max_tokens=20, ignore_eos=True)
    assert tokens(run(make(), {"x": (prompt, other_seed)})["x"]) != alone


def test_random_requests_with_random_aborts_leave_no_block(make):
    rng = random.Random(0)
    engine = make(max_model_len=200, kv_memory=str(2 * 3 * 64 * 4 * 400))
    live, done, submitted = set(), 0, 0
    while submitted < 200 or engine.has_work:
        while submitted < 200 and rng.random() < 0.7:
            prompt = [rng.randrange(5) for _ in range(rng.randint(1, 120))]
            params = SamplingParams(
                temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randint(1, 30), seed=submitted, ignore_eos=True
            )
            engine.submit(Submit(request_id=f"r{submitted}", prompt_ids=prompt, params=params.to_dict()))
            live.add(f"r{submitted}")
            submitted += 1
        for request_id in [r for r in sorted(live) if rng.random() < 0.005]:
            engine.abort(request_id)
            live.discard(request_id)
        for delta in engine.step():
            assert delta.request_id in live
            if delta.finish_reason:
                live.discard(delta.request_id)
                done += 1
    stats = engine.stats(False)
    assert not live
    assert 100 < done < 200
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    engine._scheduler.check_integrity()


def test_end_and_stop_tokens(make):
    engine = make()
    prompt = list(range(9))
    free = tokens(run(engine, {"a": (prompt, SamplingParams(temperature=0.0, max_tokens=12))})["a"])
    stop = free[4]
    first = free.index(stop)
    (last,) = run(engine, {"b": (prompt, SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(stop,)))})["b"][
        -1:
    ]
    assert (last.finish_reason, last.stop_token) == ("stop", stop)
    engine._eos_ids = frozenset([stop])
    deltas = run(engine, {"c": (prompt, SamplingParams(temperature=0.0, max_tokens=12))})["c"]
    assert tokens(deltas) == free[: first + 1]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token) == ("stop", None)
    ignoring = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    deltas = run(engine, {"d": (prompt, ignoring)})["d"]
    assert tokens(deltas) == free
    assert deltas[-1].finish_reason == "length"


def test_logprobs_are_the_models(make, checkpoint):
    prompt = list(range(12))
    engine = make()
    deltas = run(engine, {"a": (prompt, SamplingParams(temperature=0.0, max_tokens=3, logprobs=5))})["a"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    ((logprob, top),) = deltas[0].logprobs
    best = wanted.topk(5)
    assert logprob == pytest.approx(wanted[deltas[0].token_ids[0]].item(), abs=1e-4)
    assert [t for t, _ in top] == best.indices.tolist()
    assert [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([131], {}, "outside the vocabulary of 131"),
        ([1] * 512, {}, "prompt has 512 tokens; the limit is 511"),
        ([1] * 500, {"max_tokens": 20}, "max_tokens is 20; after a prompt of 500 tokens the limit of 512 leaves 12"),
        ([1], {"stop_token_ids": (131,)}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(make, prompt, params, message):
    engine = make()
    with pytest.raises(ValueError, match=message):
        engine.submit(Submit(request_id="x", prompt_ids=prompt, params=SamplingParams(**params).to_dict()))
    assert not engine.has_work


def test_a_kv_cache_too_small_for_one_request_is_refused(make):
    with pytest.raises(ValueError, match="set --max-model-len 20 or less"):
        make(kv_memory=str(3 * 2 * 32 * 4 * 4 * 5))


def test_more_kv_memory_than_there_is_is_refused(make):
    with pytest.raises(ValueError, match=r"kv_memory is 900TiB, and .* is free"):
        make(kv_memory="900TiB")


def test_weights_that_do_not_fit_are_refused_before_loading(make, monkeypatch):
    monkeypatch.setattr("moeyard.engine.memory.free_memory", lambda device: 1000)
    monkeypatch.setattr("moeyard.engine.engine.load", lambda *args, **kw: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"the weights need .*, and 1000 B is free on cpu"):
        make()


def test_float16_on_a_cpu_runs_without_gathering_the_history(make, monkeypatch):
    monkeypatch.setattr("moeyard.engine.attention.gathered_decode_attention", lambda *a, **kw: pytest.fail("gathered"))
    ids = prompts(131, 3, longest=30, seed=6)
    half, full = (generate(make(dtype=dtype), ids, 4) for dtype in ("float16", "float32"))
    assert [tokens[0] for tokens in half] == [tokens[0] for tokens in full]


def test_the_way_of_other_devices_gives_the_same_tokens(make, monkeypatch):
    """What a GPU without a paged flash kernel runs, run here: gathered history and grouped GEMMs."""
    ids = prompts(131, 6, longest=60, seed=7)
    wanted = generate(make(), ids, 12)
    engine = make()
    taken = []

    def gathered(*args, **options):
        taken.append(1)
        return gathered_decode_attention(*args, **options)

    cache = engine._cache
    monkeypatch.setattr("moeyard.engine.attention.gathered_decode_attention", gathered)
    monkeypatch.setattr("moeyard.kernels.paged_attention.paged_decode_attention", gathered)
    engine._attention = PagedAttention(engine.spec.attention, cache)
    plug(engine._model, engine._name, engine._attention, engine._experts)
    assert generate(engine, ids, 12) == wanted
    assert taken


def test_expert_counts_are_the_routers(make):
    engine = make()
    ids = prompts(131, 4, seed=5)
    generate(engine, ids, 6)
    counts = engine.stats(True).expert_counts
    computed = sum(len(p) + 5 for p in ids)
    assert [sum(layer) for layer in counts] == [3 * computed] * 3


def test_the_embedded_checkpoint_follows_a_json_schema():
    engine = Engine(EngineConfig(dtype="float32", progress=False))
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer", "maximum": 999}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=120, json_schema=json.dumps(schema))
    deltas = run(engine, {"a": (tokenizer("a file as JSON: ")["input_ids"], params)})["a"]
    text = tokenizer.decode(tokens(deltas), skip_special_tokens=True)
    assert jsonschema_rs.is_valid(schema, json.loads(text)), text
    engine.close()
