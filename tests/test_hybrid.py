"""Models whose layers keep states: greedy output equals transformers' own, and no state meets another.

Prompts of mixed length run together, chunked prefill mixed with decode, against transformers one prompt at a time:
every token must be the one that a pass over all before it prefers. That is what `generate` gives, in fewer passes; one
short prompt is compared with `generate` itself.
"""

import contextlib
import functools

import pytest
import tiny
import torch
from test_parity import generate, prompts, reference
from transformers import AutoModelForCausalLM

from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.group import RankLost
from moeyard.engine.messages import Submit
from moeyard.engine.params import SamplingParams

NEW_TOKENS = 48
PROMPTS = 4


def engine_of(path, **options):
    options = {"max_num_seqs": 3, "max_batched_tokens": 24, "block_size": 8} | options
    return Engine(EngineConfig(model=str(path), dtype="float32", progress=False, **options))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of an architecture, made once."""
    return functools.cache(lambda architecture: tiny.save(architecture, tmp_path_factory.mktemp(architecture)))


def some_prompts():
    return [ids[:40] for ids in prompts(131, count=PROMPTS)]


def assert_greedy(path, prompt_ids, answers):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        for prompt, answer in zip(prompt_ids, answers, strict=True):
            logits_TV = model(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
            assert logits_TV.argmax(dim=-1).tolist() == answer


@pytest.mark.parametrize("architecture", tiny.HYBRIDS)
def test_greedy_tokens_equal_transformers(architecture, saved):
    path, ids = saved(architecture), some_prompts()
    engine = engine_of(path)  # a request fewer at once than there are: a slot is used again
    ours = generate(engine, ids, NEW_TOKENS)
    assert_greedy(path, ids, ours)
    assert reference(path, ids[1:2], 6) == [ours[1][:6]]
    stats = engine.stats(with_experts=False)
    assert (stats.state_slots_used, stats.state_slots_total) == (0, 3)
    # Only jamba's mixer forgets its state between chunks; it must have been noticed, and nothing else.
    assert bool(engine._linear.forgetful) == (architecture == "jamba")
    engine.close()


def test_preempted_and_aborted_requests_leave_the_others_as_they_are(saved):
    path, ids = saved("qwen3_next"), some_prompts()
    # 24 blocks of 8 tokens of 256 bytes each: three requests of up to 88 tokens do not fit together.
    engine = engine_of(path, max_model_len=128, kv_memory=str(24 * 8 * 256))
    options = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True).to_dict()
    for i, prompt in enumerate([*ids, *ids]):
        engine.submit(Submit(request_id=str(i), prompt_ids=prompt, params=options))
    out = {str(i): [] for i in range(2 * PROMPTS)}
    steps = 0
    while engine.has_work:
        for delta in engine.step():
            out[delta.request_id] += delta.token_ids
        steps += 1
        if steps == 20:
            engine.abort("1")
            engine.abort("7")
    stats = engine.stats(with_experts=False)
    engine.close()
    assert stats.preemptions
    assert stats.state_slots_used == 0 and stats.kv_blocks_used == 0
    kept = [i for i in range(2 * PROMPTS) if i not in (1, 7)]
    assert all(len(out[str(i)]) == NEW_TOKENS for i in kept)
    assert_greedy(path, [ids[i % PROMPTS] for i in kept], [out[str(i)] for i in kept])


@pytest.mark.parametrize("architecture", ["qwen3_next", "qwen3_5_moe_text"])
def test_with_a_part_of_the_experts_in_memory(architecture, saved):
    path, ids = saved(architecture), some_prompts()
    engine = engine_of(path, expert_memory="60%", predictor="none", kv_memory="8MiB")
    ours = generate(engine, ids, 12)
    assert engine.stats(with_experts=False).expert_misses
    engine.close()
    assert_greedy(path, ids, ours)


def test_a_step_that_was_given_up_is_computed_again(saved):
    path, ids = saved("qwen3_next"), some_prompts()[:3]
    engine = engine_of(path)
    run, given_up = engine._run, []

    def cut_off(step):
        logits = run(step)
        if len(given_up) < 2 and engine._steps in (3, 9):  # in a prompt's chunks, and while all decode
            given_up.append(step)
            engine._steps += 1
            raise RankLost(engine.progress, ConnectionError("a rank is gone"))
        return logits

    engine._run = cut_off
    options = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True).to_dict()
    out = {str(i): [] for i in range(3)}
    for i, prompt in enumerate(ids):
        engine.submit(Submit(request_id=str(i), prompt_ids=prompt, params=options))
    while engine.has_work:
        with contextlib.suppress(RankLost):
            for delta in engine.step():
                out[delta.request_id] += delta.token_ids
    engine.close()
    assert len(given_up) == 2
    assert_greedy(path, ids, list(out.values()))
