"""Greedy output equals transformers' own `generate`, token by token, in float32, for every architecture we promise.

32 prompts of mixed length run together, chunked prefill mixed with decode, against transformers one prompt at a time: a
quarter of them by `generate`, and of all that each token is the greedy choice after those before it, which one forward
pass over prompt and answer tells.
"""

import random

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.messages import Submit
from moeyard.engine.params import SamplingParams

PROMPTS = 32
GENERATED = 8
NEW_TOKENS = 48


def prompts(vocab_size, count=PROMPTS, longest=90, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def reference(path, prompt_ids, new_tokens):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    out = []
    with torch.inference_mode():
        for prompt in prompt_ids:
            ids = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
            out.append(ids[0, len(prompt) :].tolist())
    return out


def greedy_choices(path, prompt_ids, answers):
    """transformers' greedy choice at each place of an answer, after the prompt and the answer up to there."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    out = []
    with torch.inference_mode():
        for prompt, answer in zip(prompt_ids, answers, strict=True):
            logits_TV = model(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
            out.append(logits_TV[len(prompt) - 1 :].argmax(-1).tolist())
    return out


def generate(engine, prompt_ids, new_tokens, **params):
    options = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, **params).to_dict()
    out = {str(i): [] for i in range(len(prompt_ids))}
    for i, prompt in enumerate(prompt_ids):
        engine.submit(Submit(request_id=str(i), prompt_ids=prompt, params=options))
    while engine.has_work:
        for delta in engine.step():
            assert not delta.error
            out[delta.request_id] += delta.token_ids
    return list(out.values())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_tokens_equal_transformers(architecture, tmp_path):
    path = tiny.save(architecture, tmp_path / architecture)
    # A budget of 96 tokens cuts prompts into chunks that share steps with decoding requests.
    engine = Engine(
        EngineConfig(
            model=str(path), dtype="float32", max_num_seqs=32, max_batched_tokens=96, block_size=8, progress=False
        )
    )
    ids = prompts(engine.vocab_size)
    ours = generate(engine, ids, NEW_TOKENS)
    engine.close()
    assert ours[:GENERATED] == reference(path, ids[:GENERATED], NEW_TOKENS)
    assert ours == greedy_choices(path, ids, ours)
