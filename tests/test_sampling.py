"""The sampler against a plain Python oracle over small vocabularies, and its promises about batches and seeds."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moeyard.engine import sampling
from moeyard.engine.params import SamplingParams
from moeyard.engine.sampling import SequenceSampler, sample

F32 = np.float32


def sequence(vocab_size=8, prompt=(), output=(), eos=(), seed=0, grammar=None, limit=None, **options):
    options = {"max_tokens": None, **options}
    made = SequenceSampler(
        SamplingParams(**options), list(prompt), vocab_size, frozenset(eos), seed, grammar, max_new_tokens=limit
    )
    for token in output:
        made.advance(token)
    return made


class Fixed(SequenceSampler):
    """A sequence whose uniform number is given."""

    number = 0.0

    def uniform(self):
        return self.number


def fixed(number, vocab_size=8, **options):
    made = Fixed(SamplingParams(max_tokens=None, **options), [], vocab_size, frozenset(), 0)
    made.number = number
    return made


def one(logits, made):
    return sample(torch.as_tensor(logits)[None], [made])[0]


# The oracle: every step as its definition says, over lists.


def processed(logits, made, prompt):
    p, x = made.params, [F32(v) for v in logits[: made.vocab_size]]
    for token, bias in p.logit_bias.items():
        x[token] = F32(x[token] + F32(bias))
    if len(made.output_ids) < p.min_tokens:
        for token in made.stop_ids:
            x[token] = F32(-np.inf)
    if p.repetition_penalty != 1:
        for token in set(prompt) | set(made.output_ids):
            v = float(x[token])
            x[token] = F32(v / p.repetition_penalty if v > 0 else v * p.repetition_penalty)
    for token in set(made.output_ids):
        count = made.output_ids.count(token)
        x[token] = F32(float(x[token]) - p.presence_penalty - p.frequency_penalty * count)
    return [float(v) for v in x]


def distribution(x, p):
    """Weights after temperature and the filters; also how near a comparison was to going the other way."""
    best = max(x)
    weights = [math.exp((v - best) / p.temperature) for v in x]
    nearness = math.inf
    order = sorted(weights, reverse=True)
    if 0 < p.top_k < len(x):
        weights = [w if w >= order[p.top_k - 1] else 0.0 for w in weights]
    if p.top_p < 1:
        goal, order = p.top_p * sum(weights), sorted(weights, reverse=True)
        sums = list(itertools.accumulate(order))
        nearness = min(abs(s - goal) for s in sums) / sum(weights)
        floor = next((w for w, s in zip(order, sums, strict=True) if s >= goal), order[-1])
        weights = [w if w >= floor else 0.0 for w in weights]
    nearness = min([nearness, *(abs(w - p.min_p) for w in weights if p.min_p and w)])
    return [w if w >= p.min_p else 0.0 for w in weights], nearness


def invert(weights, number):
    """The token at `number`, and how near another one is."""
    sums, total = list(itertools.accumulate(weights)), sum(weights)
    token = next(i for i, s in enumerate(sums) if s > number * total)
    return token, min(abs(s / total - number) for s in sums)


options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.6]),
        "top_k": st.integers(-1, 12),
        "top_p": st.floats(0.02, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 7), st.floats(-5, 5)),
        "min_tokens": st.integers(0, 3),
        "stop_token_ids": st.lists(st.integers(0, 3), max_size=2).map(tuple),
    },
)
# A grid of values, so that ties are common.
rows = st.tuples(
    st.lists(st.integers(-16, 16).map(lambda v: v / 4), min_size=14, max_size=14),
    options,
    st.lists(st.integers(0, 7), max_size=4),
    st.lists(st.integers(4, 7), max_size=4),
    st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize("nucleus", [1024, 2])
@settings(max_examples=250, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=4))
def test_options_against_the_oracle(nucleus, batch):
    made, want = [], []
    for logits, opts, prompt, output, seed in batch:
        s = sequence(8 + len(logits) % 3, prompt, output, eos=[0], seed=seed, **opts)
        x = processed(logits, s, prompt)
        if s.params.temperature == 0:
            want.append(x.index(max(x)))
        else:
            weights, near_filter = distribution(x, s.params)
            token, near_token = invert(weights, s.uniform())
            assume(min(near_filter, near_token) > 1e-9)
            want.append(token)
        made.append(s)
    logits_BV = torch.tensor([logits for logits, *_ in batch])
    before = logits_BV.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_NUCLEUS", nucleus)
        got = sample(logits_BV, made)
    assert [s.token_id for s in got] == want
    assert not any(s.error for s in got)
    assert torch.equal(logits_BV, before)


@pytest.mark.parametrize(
    "opts",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_the_whole_distribution_is_exact(opts):
    """A grid of uniform numbers gives each token in exactly the share that it has."""
    x = [1.0, -2.0, 0.5, 3.0, 2.5, -1.0, 2.9, 0.0]
    grid = [(i + 0.5) / 4001 for i in range(4001)]
    made = [fixed(number, **opts) for number in grid]
    got = [s.token_id for s in sample(torch.tensor(x).expand(len(grid), -1), made)]
    weights, _ = distribution(x, made[0].params)
    assert got == [invert(weights, number)[0] for number in grid]
    assert set(got) == {i for i, w in enumerate(weights) if w / sum(weights) > 1 / 4001}


def test_each_filter_takes_effect():
    x = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    cases: list[tuple[dict[str, Any], int]] = [({}, 3), ({"top_k": 2}, 2), ({"top_p": 0.6}, 2), ({"min_p": 0.7}, 2)]
    for opts, last in [*cases, ({"top_k": 1}, 1)]:
        assert one(x, fixed(0.9999, vocab_size=4, **opts)).token_id == last, opts
    assert one(x, fixed(0.06, vocab_size=4)).token_id == 0
    assert one(x, fixed(0.06, vocab_size=4, temperature=0.5)).token_id == 1


def test_top_p_stops_at_the_token_that_reaches_it():
    """At this temperature each logit is one power of two: shares 1/2, 1/4, 1/8, 1/8."""
    x = torch.tensor([0.0, -1.0, -2.0, -2.0])
    for top_p, last in [(0.5, 0), (0.5001, 1), (0.75, 1), (0.7501, 3), (0.875, 3)]:
        made = fixed(0.9999, vocab_size=4, top_p=top_p, temperature=1 / math.log(2))
        assert one(x, made).token_id == last


def test_ties_at_the_border_are_kept():
    x = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    for opts in ({"top_k": 2}, {"top_p": 0.5}):
        grid = [fixed((i + 0.5) / 100, vocab_size=5, **opts) for i in range(100)]
        assert {s.token_id for s in sample(x.expand(100, -1), grid)} == {0, 1, 2, 3}


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_over_a_large_vocabulary(top_p, spread):
    """Flat rows reach top_p past the first look at the best tokens; peaked ones do not."""
    x = (torch.randn(6, 5000, generator=torch.Generator().manual_seed(1)) * spread).repeat_interleave(4, 0)
    made = [fixed(number, vocab_size=5000, top_p=top_p) for _ in range(6) for number in (0.0, 0.3, 0.8, 0.999)]
    for row, (got, s) in enumerate(zip(sample(x, made), made, strict=True)):
        weights, near = distribution(x[row].tolist(), s.params)
        token, distance = invert(weights, s.number)
        if near > 1e-12 and (s.number == 0 or distance > 1e-12):
            assert got.token_id == token


def test_the_first_and_the_last_number_stay_inside_the_allowed_tokens():
    x = torch.tensor([-math.inf, 3.0, -math.inf, 2.0, -50.0, -math.inf])
    assert one(x, fixed(0.0, vocab_size=6)).token_id == 1
    assert one(x, fixed(1 - 2.0**-53, vocab_size=6, top_p=0.999)).token_id == 3
    flat = torch.zeros(1 << 17)
    assert one(flat, fixed(1 - 2.0**-53, vocab_size=1 << 17)).token_id == (1 << 17) - 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    x = torch.tensor([1.0, 1.0001, -math.inf, 1.0])
    assert one(x, sequence(4, temperature=temperature, seed=9)).token_id == 1


def test_a_huge_temperature_is_uniform_over_what_is_allowed():
    x = torch.tensor([9.0, -math.inf, -9.0, 0.0])
    grid = [fixed((i + 0.5) / 30, vocab_size=4, temperature=1e300) for i in range(30)]
    assert [s.token_id for s in sample(x.expand(30, -1), grid)] == [0] * 10 + [2] * 10 + [3] * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_takes_the_first_best_and_never_padding(dtype, monkeypatch):
    monkeypatch.setattr(sampling, "_sample_chunk", None)  # the fast path does not need it
    x = torch.tensor([[1, 5, 5, 0, 9], [2, 2, 2, 2, 9], [-1, -2, -3, -1, 9]], dtype=dtype)
    made = [sequence(4, temperature=0.0, eos=[1]) for _ in range(3)]
    assert [s.token_id for s in sample(x, made)] == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_sample_as_float32(dtype):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    made = [sequence(37, seed=i, top_p=0.9, logprobs=2) for i in range(5)]
    assert sample(x, made) == sample(x.float(), made)


def test_padding_is_never_sampled():
    x = torch.full((50, 12), 50.0)
    x[:, :7] = 0
    made = [sequence(7, seed=i, logprobs=3, top_p=0.99 if i % 2 else 1.0) for i in range(50)]
    got = sample(x, made)
    assert {s.token_id for s in got} == set(range(7))
    assert all(token < 7 for s in got for token, _ in s.top or [])
    assert got[0].logprob == pytest.approx(-math.log(7))


# Randomness


def test_the_uniform_number_depends_on_seed_and_position_only():
    numbers = {}
    for seed in (0, 1, 2, -1, 2**63, 2**64 - 2):
        s = sequence(seed=seed)
        for index in range(200):
            numbers[seed, index] = s.uniform()
            assert s.uniform() == numbers[seed, index]
            s.advance(index % 7)
        assert sequence(seed=seed, output=[3] * 50, temperature=0.3).uniform() == numbers[seed, 50]
    assert len(set(numbers.values())) == len(numbers)
    assert all(0 <= u < 1 for u in numbers.values())
    # A fixed draw of 1200: mean and spread of a uniform number.
    assert np.mean(list(numbers.values())) == pytest.approx(0.5, abs=0.03)
    assert np.var(list(numbers.values())) == pytest.approx(1 / 12, abs=0.01)


CAST: list[dict[str, Any]] = [
    {},
    {"top_p": 0.8},
    {"top_k": 5},
    {"top_k": 40, "top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.1, "logprobs": 3},
    {"temperature": 0.0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"frequency_penalty": 1.0, "logit_bias": {3: 4.0}},
    {"min_tokens": 6, "stop_token_ids": (2, 5)},
    {"temperature": 0.0, "logprobs": 2, "frequency_penalty": 1.5},
]
MODEL = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 2


def play(order, pause=()):
    """Run the cast in one batch in this order; the members of `pause` sit out every third step. 12 tokens each."""
    made = {i: sequence(60, prompt=[i], eos=[59], seed=100 + i, ignore_eos=True, **CAST[i]) for i in order}
    log: dict[int, list[sampling.Sampled]] = {i: [] for i in order}
    for step in itertools.count():
        live = [i for i in order if len(log[i]) < 12 and not made[i].finish_reason]
        if not live:
            return log
        live = [i for i in live if i not in pause or step % 3 or len(live) == 1]
        last = [(made[i].output_ids or [i])[-1] for i in live]
        for i, got in zip(live, sample(MODEL[last], [made[i] for i in live]), strict=True):
            log[i].append(got)
            made[i].advance(got.token_id)


def test_tokens_do_not_depend_on_the_batch():
    alone = {i: play([i])[i] for i in range(len(CAST))}
    assert len({tuple(s.token_id for s in log) for log in alone.values()}) == len(CAST)
    shuffle = random.Random(4)
    for _ in range(6):
        order = shuffle.sample(range(len(CAST)), len(CAST))
        assert play(order) == {i: alone[i] for i in order}
        part = order[:5]
        assert play(part, pause=part[::2]) == {i: alone[i] for i in part}


def test_tokens_do_not_depend_on_the_chunk(monkeypatch):
    want = play(list(range(len(CAST))))
    monkeypatch.setattr(sampling, "_CPU_CHUNK", 3 * 60)
    assert play(list(range(len(CAST)))) == want


def test_seeds_differ():
    x = torch.zeros(40, 60)
    assert len({s.token_id for s in sample(x, [sequence(60, seed=i) for i in range(40)])}) > 20


# Options that change the logits


def test_logit_bias_forces_and_bans():
    x = torch.tensor([2.0, 1.0, 0.0, 3.0])
    for opts in ({"temperature": 0.0}, {"seed": 5}):
        assert one(x, sequence(4, logit_bias={2: 100}, **opts)).token_id == 2
        assert one(x, sequence(4, logit_bias={3: -100, 0: -100, 2: -100}, **opts)).token_id == 1


def test_repetition_penalty_counts_the_prompt_and_the_others_do_not():
    x = torch.tensor([2.0, 1.9, -1.0])
    assert one(x, sequence(3, prompt=[0], temperature=0.0, repetition_penalty=1.5)).token_id == 1
    assert one(x, sequence(3, output=[0], temperature=0.0, repetition_penalty=1.5)).token_id == 1
    assert one(-x, sequence(3, prompt=[2, 0, 1], temperature=0.0, repetition_penalty=1.5)).token_id == 2
    assert one(torch.tensor([-1.0, -1.2]), sequence(2, prompt=[0], temperature=0.0, repetition_penalty=2)).token_id
    for name in ("presence_penalty", "frequency_penalty"):
        assert one(x, sequence(3, prompt=[0, 0], temperature=0.0, **{name: 1.0})).token_id == 0
        assert one(x, sequence(3, output=[0], temperature=0.0, **{name: 1.0})).token_id == 1


def test_frequency_grows_with_the_count_and_presence_does_not():
    x = torch.tensor([2.0, 0.5])
    assert one(x, sequence(2, output=[0] * 4, temperature=0.0, presence_penalty=1.0)).token_id == 0
    assert one(x, sequence(2, output=[0], temperature=0.0, frequency_penalty=1.0)).token_id == 0
    assert one(x, sequence(2, output=[0] * 2, temperature=0.0, frequency_penalty=1.0)).token_id == 1


def test_prompt_tokens_outside_the_vocabulary_are_left_alone():
    x = torch.tensor([2.0, 1.9, 5.0])
    assert one(x, sequence(2, prompt=[7, 2, 0], temperature=0.0, repetition_penalty=1.5)).token_id == 1


def test_min_tokens_holds_off_every_end():
    x = torch.tensor([5.0, 4.0, 3.0, 0.0])
    opts = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (1,)}
    assert one(x, sequence(4, eos=[0, 9], **opts)).token_id == 2
    assert one(x, sequence(4, eos=[0, 9], output=[3, 3], **opts)).token_id == 0
    assert one(x, sequence(4, eos=[0, 9], ignore_eos=True, **opts)).token_id == 0


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_tokens_outside_the_vocabulary_are_refused(name):
    value = {8: 1.0} if name == "logit_bias" else (8,)
    with pytest.raises(ValueError, match=f"{name} names token 8; it must be between 0 and 7"):
        sequence(8, **{name: value})


# The end


@pytest.mark.parametrize(
    ("opts", "tokens", "reason", "stop_token"),
    [
        ({}, [1, 2, 0], "stop", None),
        ({"stop_token_ids": (5,)}, [1, 5], "stop", 5),
        ({"stop_token_ids": (0,)}, [1, 0], "stop", None),
        ({"stop_token_ids": (0,), "ignore_eos": True}, [0], "stop", 0),
        ({"ignore_eos": True, "max_tokens": 3}, [0, 0, 0], "length", None),
        ({"max_tokens": 2}, [1, 1], "length", None),
        ({"max_tokens": 2}, [1, 0], "stop", None),
        ({"max_tokens": 5, "limit": 2}, [1, 1], "length", None),
        ({"max_tokens": 2, "limit": 5}, [1, 1], "length", None),
        ({"limit": 1}, [1], "length", None),
    ],
)
def test_finish_reason(opts, tokens, reason, stop_token):
    s = sequence(eos=[0], **opts)
    for token in tokens:
        assert s.finish_reason == ""
        s.advance(token)
    assert (s.finish_reason, s.stop_token, s.output_ids) == (reason, stop_token, tokens)
    with pytest.raises(AssertionError):
        s.advance(1)


# Log-probabilities


def test_logprobs_are_of_the_raw_logits():
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(6)) * 3
    change = {"temperature": 0.4, "top_k": 7, "repetition_penalty": 1.7, "presence_penalty": 1.0}
    changes: list[dict[str, Any]] = [
        {},
        change,
        {"temperature": 0.0},
        {"logit_bias": {3: 50}},
        {"min_p": 0.3},
        {"top_p": 0.5},
    ]
    counts = [5, 2, 20, 0, None, 1]
    made = [
        sequence(47, prompt=[1, 2], output=[4], seed=i, logprobs=count, **opts)
        for i, (opts, count) in enumerate(zip(changes, counts, strict=True))
    ]
    want = x[:, :47].log_softmax(-1)
    for row, (got, count) in enumerate(zip(sample(x, made), counts, strict=True)):
        if count is None:
            assert got.logprob is None and got.top is None
            continue
        assert got.top is not None
        assert got.logprob == pytest.approx(want[row, got.token_id].item(), abs=1e-6)
        best = want[row].sort(descending=True)
        assert [token for token, _ in got.top] == best.indices[:count].tolist()
        assert [value for _, value in got.top] == pytest.approx(best.values[:count].tolist(), abs=1e-6)
    assert sample(x, made)[3].token_id == 3  # a bias moves the token but not its log-probability


@given(values=st.lists(st.sampled_from([-2.0, -0.5, -0.0, 0.0, 1.0, -math.inf]), min_size=3, max_size=30))
@example(values=[0.0, -0.0, -math.inf, 1.0, 1.0])
@settings(deadline=None)
def test_top_lists_put_the_lower_id_first_among_equals(values):
    assume(max(values) > -math.inf)
    got = one(values, sequence(len(values), temperature=0.0, logprobs=20))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [token for token, _ in got.top] == order[:20]
    assert got.top[0] == (got.token_id, got.logprob)


# Rows that cannot be sampled


class Nothing:
    """A grammar that allows no token, or that broke."""

    finished = False

    def __init__(self, error=""):
        self.error = error

    def mask(self):
        return np.zeros(4, dtype=np.uint8)

    def advance(self, token_id):
        pass


@pytest.mark.parametrize("opts", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 2, "min_p": 0.1}])
def test_a_bad_row_is_an_error_of_its_own(opts):
    good = torch.tensor([1.0, 2.0, 9.0, 0.0])
    x = good.repeat(9, 1)
    x[1] = math.nan
    x[2, 1] = math.nan
    x[3, 0] = math.inf
    x[4] = -math.inf
    made = [sequence(4, logprobs=1, **opts) for _ in range(9)]
    made[5] = sequence(4, grammar=Nothing(), **opts)
    made[6] = sequence(4, grammar=Nothing("the parser gave up"), **opts)
    made[7] = sequence(4, eos=[0, 1, 2, 3], min_tokens=1, **opts)
    made[8] = sequence(4, prompt=[0, 1, 2, 3], repetition_penalty=1e-300, **opts)
    got = sample(x, made)
    assert got[0].token_id == 2 and not got[0].error
    assert all(s.token_id == -1 and s.logprob is None and s.top is None for s in got[1:])
    for row, text in enumerate(["maximum is nan", "maximum is nan", "maximum is inf", "maximum is -inf"], 1):
        assert "model's logits are not finite" in got[row].error and text in got[row].error
    assert got[5].error == "no token is left to sample after json_schema"
    assert got[6].error == "json_schema: the parser gave up"
    assert "min_tokens" in got[7].error
    assert "penalties" in got[8].error


def test_bad_rows_in_the_greedy_batch():
    x = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [-math.inf, -math.inf]])
    got = sample(x, [sequence(2, temperature=0.0) for _ in range(3)])
    assert got[0].token_id == 1
    assert "nan" in got[1].error and "-inf" in got[2].error


def test_no_rows():
    assert sample(torch.zeros(0, 8), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_tokens_of_the_cpu():
    x = torch.randn(len(CAST) * 8, 50_000, generator=torch.Generator().manual_seed(8)) * 2
    made = [sequence(49_990, prompt=[1, 2, 3], output=[7, 7, 8], seed=i, **opts) for i, opts in enumerate(CAST * 8)]
    on_gpu, on_cpu = sample(x.cuda(), made), sample(x, made)
    assert [s.token_id for s in on_gpu] == [s.token_id for s in on_cpu]
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert (a.logprob is None) == (b.logprob is None)
        assert a.logprob is None or a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [t for t, _ in a.top or []] == [t for t, _ in b.top or []]
