"""The cost model against brute force: expected rows, the pipeline, the choices, and constants found again in noise."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeyard.scheduler.balance.problem import Rates
from moeyard.scheduler.choices import DEGREES, DISPATCHERS, Choice, choose_degree, choose_step, pipeline_ns
from moeyard.scheduler.cost import (
    Constants,
    ExpertCost,
    LinkCost,
    RankConstants,
    expected_rows,
    median_error,
    rates,
)

LINK = LinkCost(20_000, 100_000)  # 20 us, 10 GB/s
EXPERTS = ExpertCost(5_000, 10_000, 100_000)  # linear from 100 rows per expert
CONSTANTS = Constants(LinkCost(10_000, 100_000), LINK, LINK, LINK, EXPERTS)
FREE = LinkCost(0, 0)

links = st.builds(LinkCost, st.integers(0, 10**6), st.integers(0, 10**7))
expert_costs = st.builds(ExpertCost, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**7))
constants = st.builds(Constants, links, links, links, links, expert_costs, links, links, st.integers(0, 10**6))
tokens = st.lists(st.integers(0, 5000), min_size=1, max_size=6)
stages = st.integers(0, 10**6)


@st.composite
def routers(draw: st.DrawFn) -> dict[str, int]:
    experts = draw(st.integers(1, 64))
    return {"experts": experts, "top_k": draw(st.integers(1, min(experts, 8))), "row_bytes": draw(st.integers(0, 8192))}


@st.composite
def layers(draw: st.DrawFn, least: int = 1) -> dict:
    """What `choose_degree` needs besides the constants."""
    size = draw(st.integers(least, 5))
    counts = st.lists(st.integers(0, 3000), min_size=size, max_size=size)
    return {
        "rows_out_PP": draw(st.lists(counts, min_size=size, max_size=size)),
        "row_bytes_out": draw(st.integers(0, 8192)),
        "row_bytes_back": draw(st.integers(0, 8192)),
        "experts_P": draw(st.lists(st.integers(0, 32), min_size=size, max_size=size)),
        "pairs_P": draw(counts),
    }


# Costs


def test_link_time():
    assert LINK.time_ns(0) == 20_000
    assert LINK.time_ns(1_000_000) == 120_000
    assert LinkCost(7, 1).time_ns(1) == 8  # a part of a nanosecond counts as one
    assert LinkCost(0, 2222).time_ns(10**9) == 2_222_000  # 450 GB/s


def test_expert_time_is_flat_then_linear():
    assert EXPERTS.time_ns(0, 0) == 5_000
    assert EXPERTS.time_ns(8, 8) == EXPERTS.time_ns(8, 800) == 85_000
    assert EXPERTS.time_ns(8, 801) == 85_100


@pytest.mark.parametrize("make", [lambda: LinkCost(-1, 0), lambda: LinkCost(0, -1), lambda: ExpertCost(0, 0, -1)])
def test_costs_below_zero_are_refused(make):
    with pytest.raises(ValueError, match="below 0"):
        make()


def test_costs_are_integers():
    with pytest.raises(TypeError):
        LinkCost(1.5, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        LINK.time_ns(1.5)  # type: ignore[arg-type]


def test_numpy_integers_do_not_overflow():
    link = LinkCost(np.int32(5), np.int32(4_000_000))
    assert link == LinkCost(5, 4_000_000)
    assert link.time_ns(np.int32(2_000_000_000)) == 8_000_000_005
    assert type(link.time_ns(np.int64(8))) is int
    cost = ExpertCost(np.int8(1), np.int32(2_000_000_000), np.int32(2_000_000_000))
    assert cost.time_ns(np.int32(3), np.int32(2_000_000_000)) == 4 * 10**15 + 1


def test_constants_travel_as_plain_integers():
    values = CONSTANTS.to_list()
    assert len(values) == 19 and all(type(value) is int for value in values)
    assert Constants.from_list(values) == CONSTANTS
    assert Constants.from_list(np.array(values)) == CONSTANTS
    with pytest.raises(ValueError, match="18 values, not 19"):
        Constants.from_list(values[:-1])


@given(st.lists(constants, min_size=1, max_size=4))
def test_the_worst_constants_are_the_largest_of_each(all_ranks):
    worst = Constants.worst(all_ranks)
    assert worst == Constants.worst(all_ranks[::-1]) == Constants.worst([worst, *all_ranks])
    assert worst.to_list() == np.max([c.to_list() for c in all_ranks], axis=0).tolist()


def test_the_worst_of_none_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        Constants.worst([])


def test_constants_are_read_from_what_a_file_has():
    for values in (CONSTANTS, RankConstants(EXPERTS, 64, LINK), RankConstants(EXPERTS, 0)):
        assert type(values).from_dict(json.loads(json.dumps(asdict(values)))) == values


@pytest.mark.parametrize(
    "change",
    [
        {"few_rows": None},
        {"few_rows": 1.5},
        {"few_rows": -1},
        {"more": 1},
        {"host": [1, 2]},
        {"host": {"alpha_ns": 1}},
        {"experts": {"base_ns": 0, "per_expert_ns": 0, "ps_per_row": "x"}},
    ],
)
def test_constants_of_another_form_are_refused(change):
    with pytest.raises((ValueError, TypeError)):
        RankConstants.from_dict(asdict(RankConstants(EXPERTS, 64)) | change)


# Expected rows


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 4), (7, 2), (6, 3), (1, 1)])
@pytest.mark.parametrize("tokens_P", [[5], [3, 4], [0, 7, 1], [0, 0], [2, 0, 9, 5]])
def test_expected_rows_are_the_mean_over_all_choices_of_experts(experts, top_k, tokens_P):
    ranks = len(tokens_P)
    home = [rank for rank in range(ranks) for _ in range(experts // ranks + (rank < experts % ranks))]
    choices = [{home[e] for e in chosen} for chosen in combinations(range(experts), top_k)]
    sent, received = [Fraction(0)] * ranks, [Fraction(0)] * ranks
    for src, count in enumerate(tokens_P):
        for targets in choices:
            for dst in targets - {src}:
                sent[src] += Fraction(count, len(choices))
                received[dst] += Fraction(count, len(choices))
    up = [tuple(-(-f.numerator // f.denominator) for f in side) for side in (sent, received)]
    assert expected_rows(tokens_P, top_k, experts, ranks) == tuple(up)


def test_expected_rows_never_exceed_one_per_rank():
    """Top-8 of 256 on 4 ranks: 3 other ranks, of which a token reaches nearly 9 in 10."""
    (sent, *_), _ = expected_rows([1000, 0, 0, 0], 8, 256, 4)
    assert 2700 < sent < 3000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1, 1, 0), "tokens_P"),
        (([1, -1], 1, 2, 2), "tokens_P"),
        (([1, 1], 1, 2, 3), "2 ranks, not 3"),
        (([1, 1], 3, 2, 2), "top_k is 3"),
        (([1, 1], 0, 2, 2), "top_k is 0"),
    ],
)
def test_impossible_routing_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        expected_rows(*arguments)


# The pipeline


def schedule(degree: int, dispatch: int, experts: int, combine: int) -> int:
    """The schedule played event by event: operations in the order of the program, each with what it waits for."""
    link: list[tuple[str, int]] = [("dispatch", 0)]
    for c in range(degree):
        link += [("dispatch", c + 1)] * (c + 1 < degree) + [("combine", c)]
    cost = {"dispatch": dispatch, "combine": combine, "experts": experts}
    after: dict[tuple[str, int], list[tuple[str, int]]] = {op: [] for op in link}
    for before, op in pairwise(link):
        after[op].append(before)  # one link, first come first served
    for c in range(degree):
        after["experts", c] = [("dispatch", c), *([("experts", c - 1)] if c else [])]
        after["combine", c].append(("experts", c))
        if c and c + 1 < degree:
            after["dispatch", c + 1].append(("experts", c - 1))  # it is posted only after those experts ran
    end: dict[tuple[str, int], int] = {}
    while len(end) < len(after):
        for op, waits in after.items():
            if op not in end and all(w in end for w in waits):
                end[op] = max((end[w] for w in waits), default=0) + cost[op[0]]
    return max(end.values())


@pytest.mark.parametrize(
    ("degree", "dispatch", "experts", "combine", "total"),
    [
        (1, 10, 20, 30, 60),
        (4, 0, 20, 0, 80),
        (4, 10, 0, 5, 60),
        (4, 10, 20, 10, 10 + 4 * 20 + 10),  # experts hide all but the first and the last exchange
        (4, 10, 15, 10, 8 * 10 + 5 + 5),  # the link idles only for the end of the first and the last experts
        (2, 10, 3, 10, 40),
    ],
)
def test_pipelines_by_hand(degree, dispatch, experts, combine, total):
    assert pipeline_ns(degree, dispatch, experts, combine) == total
    assert schedule(degree, dispatch, experts, combine) == total


@given(st.integers(1, 8), stages, stages, stages)
def test_the_pipeline_is_the_schedule(degree, dispatch, experts, combine):
    total = pipeline_ns(degree, dispatch, experts, combine)
    assert total == schedule(degree, dispatch, experts, combine)
    assert max(degree * (dispatch + combine), dispatch + degree * experts + combine) <= total
    assert total <= degree * (dispatch + experts + combine)


# What planners calculate with

ROUTER = {"row_bytes": 1000, "row_bytes_back": 600, "top_k": 2, "experts": 8}
MOVES = replace(CONSTANTS, near=LinkCost(5_000, 2_222), far=LinkCost(10_000, 2_500), planner_ns=150_000)


def test_rates_worked_by_hand():
    """Two ranks with 4 of 8 experts each, top-2: 22 of the 28 pairs of experts have one on a given rank, and half of
    the tokens are at home there. So 0.393 rows of 1600 bytes, at 100 ps, travel for each (token, expert) pair."""
    made = rates(MOVES, **ROUTER, ranks=2, beside=True, hidden_ns=7)
    counts_ns = 10_000 + 4  # 8 experts of 4 bytes: 3.2 ns
    assert made == Rates(
        base_ns=5_000 + counts_ns + 2 * 20_000,
        expert_ps=10_000_000,
        row_ps=100_000,
        wire_ps=62_858,
        near_alpha_ns=5_000,
        near_fs_per_byte=2_222,
        far_alpha_ns=10_000,
        far_fs_per_byte=2_500,
        hidden_ns=7,
        guest_ns=5_000,
        plan_ns=counts_ns + 150_000,
    )


def test_rates_of_shared_experts_worked_by_hand():
    """Hidden vectors of 600 bytes travel both ways at 100 ps; moving any costs two exchanges and a call."""
    with_shared = replace(MOVES, shared=ExpertCost(3_000, 400, 70_000))
    made = rates(with_shared, **ROUTER, ranks=2, beside=True)
    shared = {"shared_ps": 70_000, "shared_wire_ps": 120_000, "shared_ns": 3_400 + 2 * 20_000}
    assert made == replace(rates(MOVES, **ROUTER, ranks=2, beside=True), **shared)
    assert Constants.from_list(with_shared.to_list()) == with_shared == Constants.from_dict(asdict(with_shared))


def test_where_exchanges_compute_with_the_cores_a_row_takes_both():
    beside, alone = (rates(MOVES, **ROUTER, ranks=4, beside=beside) for beside in (True, False))
    assert alone == replace(beside, row_ps=beside.row_ps + beside.wire_ps, wire_ps=0)


def test_one_rank_has_no_exchanges():
    made = rates(MOVES, **ROUTER, ranks=1, beside=True)
    assert (made.base_ns, made.wire_ps, made.plan_ns) == (EXPERTS.base_ns, 0, 150_000)


@given(st.integers(2, 6), st.integers(1, 8), st.integers(6, 40))
def test_the_way_of_rows_is_that_of_expected_rows(ranks, top_k, experts):
    """At the rank with the most experts, for equally many tokens everywhere."""
    top_k, tokens = min(top_k, experts), 100_000
    made = rates(MOVES, row_bytes=1000, row_bytes_back=1000, top_k=top_k, experts=experts, ranks=ranks, beside=True)
    _, (received, *_) = expected_rows([tokens] * ranks, top_k, experts, ranks)
    pairs = tokens * ranks * top_k * -(-experts // ranks) / experts
    assert made.wire_ps == pytest.approx(received * 2000 * 100 / pairs, rel=1e-3)


def test_the_median_error_is_relative_to_what_was_measured():
    assert median_error([(110, 100), (100, 200), (300, 300)]) == pytest.approx(0.1)
    assert median_error([(80, 100), (150, 100)]) == pytest.approx(0.35)


@pytest.mark.parametrize(("pairs", "message"), [([], "empty"), ([(5, 0)], "above 0")])
def test_errors_need_measured_times(pairs, message):
    with pytest.raises(ValueError, match=message):
        median_error(pairs)


# The choice of a step


@given(constants, tokens, routers(), st.sets(st.sampled_from(DISPATCHERS), min_size=1))
@example(
    Constants(FREE, FREE, FREE, FREE, ExpertCost(0, 0, 0)),
    [3, 0],
    {"experts": 4, "top_k": 2, "row_bytes": 8},
    {*DISPATCHERS},
)
def test_a_step_takes_the_smallest_time_then_the_fewest_chunks_then_all_gather(constants, tokens_P, router, allowed):
    choice = choose_step(constants, tokens_P, **router, allowed=sorted(allowed, reverse=True))
    assert {(name, degree) for name, degree, _ in choice.alternatives} == {(n, d) for n in allowed for d in DEGREES}
    assert len(choice.alternatives) == len(allowed) * len(DEGREES)
    ns, degree, dispatcher = min((ns, degree, dispatcher) for dispatcher, degree, ns in choice.alternatives)
    assert (choice.dispatcher, choice.degree, choice.modelled_ns) == (dispatcher, degree, ns)
    assert all(type(n) is int for _, *numbers in choice.alternatives for n in numbers)
    assert choice == choose_step(constants, np.array(tokens_P), **router, allowed=tuple(allowed))


@given(constants, tokens, routers(), st.data())
def test_more_tokens_never_take_less_time(constants, tokens_P, router, data):
    more_P = [count + data.draw(st.integers(0, 500)) for count in tokens_P]
    few, many = (choose_step(constants, t, **router).alternatives for t in (tokens_P, more_P))
    assert all(a[:2] == b[:2] and a[2] <= b[2] for a, b in zip(few, many, strict=True))


@given(constants, tokens, routers(), st.integers(0, 10), st.integers(1, 10**6))
def test_worse_constants_never_take_less_time(constants, tokens_P, router, at, by):
    values = constants.to_list()
    values[at] += by
    worse = choose_step(Constants.from_list(values), tokens_P, **router)
    assert choose_step(constants, tokens_P, **router).modelled_ns <= worse.modelled_ns


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("degree", DEGREES)
def test_one_allowed_name_and_degree_forces_them(dispatcher, degree):
    choice = choose_step(CONSTANTS, [64, 0], row_bytes=64, top_k=2, experts=8, allowed=[dispatcher], degrees=[degree])
    assert choice == Choice(dispatcher, degree, choice.modelled_ns, ((dispatcher, degree, choice.modelled_ns),))


def test_a_step_priced_by_hand():
    """Two ranks with 2 experts each, top-4 of 4: every token goes everywhere and touches everything."""
    choice = choose_step(CONSTANTS, [100, 300], row_bytes=1000, top_k=4, experts=4, degrees=[1])
    experts_ns = 5_000 + 800 * 100
    gather = 2 * (20_000 + 300 * 100) + experts_ns
    exchange = 10_000 + 2  # 4 experts of 4 bytes at 100 ps: 1.6 ns
    assert choice.alternatives == (("all_gather", 1, gather), ("all_to_all", 1, gather + exchange))
    assert (choice.dispatcher, choice.modelled_ns) == ("all_gather", gather)


def test_the_busiest_rank_may_be_a_receiver():
    """Four experts on three ranks: the first has two, so half of all rows come to it, more than any rank sends."""
    assert expected_rows([0, 400, 400], 1, 4, 3) == ((0, 300, 300), (400, 100, 100))
    arguments = {"row_bytes": 1000, "top_k": 1, "experts": 4, "degrees": [1], "allowed": ["all_to_all"]}
    compute_ns, exchange_ns = 5_000 + 400 * 100, 10_000 + 4
    total = exchange_ns + 2 * (20_000 + 400 * 100) + compute_ns
    assert choose_step(CONSTANTS, [0, 400, 400], **arguments).modelled_ns == total


def test_rows_back_may_be_wider():
    arguments = {"row_bytes": 1000, "top_k": 4, "experts": 4, "degrees": [1]}
    same = choose_step(CONSTANTS, [300, 300], **arguments)
    wide = choose_step(CONSTANTS, [300, 300], **arguments, row_bytes_back=2000)
    added = [b[2] - a[2] for a, b in zip(same.alternatives, wide.alternatives, strict=True)]
    assert added == [300 * 1000 // 10] * 2


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_one_chunk_when_starting_dominates(dispatcher):
    slow_start = LinkCost(10**9, 1000)
    constants = Constants(slow_start, slow_start, slow_start, slow_start, EXPERTS)
    choice = choose_step(constants, [512] * 4, row_bytes=4096, top_k=4, experts=32, allowed=[dispatcher])
    assert choice.degree == 1


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_more_chunks_when_exchange_and_compute_are_long(dispatcher):
    choice = choose_step(CONSTANTS, [16384] * 4, row_bytes=1024, top_k=4, experts=32, allowed=[dispatcher])
    assert choice.degree == 8


@pytest.mark.parametrize(
    ("tokens_P", "top_k", "dispatcher"),
    [
        ([1] * 8, 8, "all_gather"),  # decode: one exchange less
        ([8192] * 8, 1, "all_to_all"),  # an eighth of the rows
        ([8192, 0, 0, 0, 0, 0, 0, 0], 1, "all_to_all"),  # nobody pads
        ([0] * 8, 8, "all_gather"),
    ],
)
def test_the_dispatcher_follows_the_load(tokens_P, top_k, dispatcher):
    assert choose_step(CONSTANTS, tokens_P, row_bytes=4096, top_k=top_k, experts=64).dispatcher == dispatcher


def test_padding_costs_all_gather_only():
    """One rank with all tokens: all-gather pays as if every rank had as many."""
    arguments = {"row_bytes": 4096, "top_k": 1, "experts": 64, "degrees": [1]}
    no_compute = replace(CONSTANTS, experts=ExpertCost(0, 0, 0))
    gather = [choose_step(no_compute, t, **arguments, allowed=["all_gather"]) for t in ([800, 0, 0, 0], [800] * 4)]
    assert gather[0] == gather[1]


def test_no_tokens_anywhere_is_one_chunk():
    choice = choose_step(CONSTANTS, [0, 0, 0], row_bytes=4096, top_k=2, experts=8)
    assert (choice.dispatcher, choice.degree, choice.modelled_ns) == ("all_gather", 1, 2 * 20_000 + 5_000)


def test_one_rank_exchanges_nothing():
    choice = choose_step(CONSTANTS, [400], row_bytes=4096, top_k=2, experts=8)
    assert (choice.dispatcher, choice.degree, choice.modelled_ns) == ("all_gather", 1, 5_000 + 80_000)


def test_numpy_integers_make_the_same_step():
    plain = choose_step(CONSTANTS, [30_000, 1], row_bytes=8192, top_k=8, experts=60)
    arguments = {
        "row_bytes": np.int16(8192),
        "top_k": np.int8(8),
        "experts": np.int8(60),
        "degrees": np.array([8, 1, 4, 2]),
    }
    assert plain == choose_step(CONSTANTS, np.array([30_000, 1], np.int16), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_P": []}, "tokens_P"),
        ({"allowed": []}, "allowed"),
        ({"allowed": ["all_together"]}, "allowed.*all_together"),
        ({"degrees": []}, "degrees"),
        ({"degrees": [0]}, "degrees"),
        ({"top_k": 9}, "top_k is 9"),
    ],
)
def test_impossible_steps_are_named(arguments, message):
    arguments = {"tokens_P": [1, 1], "row_bytes": 1, "top_k": 1, "experts": 8} | arguments
    with pytest.raises(ValueError, match=message):
        choose_step(CONSTANTS, **arguments)


# The choice of a layer


def layer_times(constants: Constants, layer: dict, degrees=DEGREES) -> list[tuple[int, int]]:
    """(ns, degree) of each, the slow way."""
    rows_PP, ranks = layer["rows_out_PP"], range(len(layer["rows_out_PP"]))
    others = [[(src, dst) for src in ranks for dst in ranks if src != dst and rank in (src, dst)] for rank in ranks]
    busiest = max(
        sum(rows_PP[s][d] for s, d in pairs if (s, d)[side] == r) for r, pairs in enumerate(others) for side in (0, 1)
    )
    times = []
    for degree in degrees:
        rows = -(-busiest // degree)
        out, home = (constants.all_to_all.time_ns(rows * layer[f"row_bytes_{way}"]) for way in ("out", "back"))
        if len(ranks) == 1:
            out = home = 0
        work = [(e, -(-p // degree)) for e, p in zip(layer["experts_P"], layer["pairs_P"], strict=True)]
        slowest = max(constants.experts.time_ns(min(e, p), p) for e, p in work)
        times.append((schedule(degree, out, slowest, home), degree))
    return times


@given(constants, layers())
def test_a_layer_takes_the_smallest_time_then_the_fewest_chunks(constants, layer):
    assert choose_degree(constants, **layer) == min(layer_times(constants, layer))[1]
    as_arrays = {name: np.array(v) for name, v in layer.items() if name.endswith("P")}
    assert choose_degree(constants, **layer | as_arrays, degrees=(8, 4, 2, 1)) == choose_degree(constants, **layer)


@given(constants, layers(least=2), st.data())
def test_what_stays_at_home_and_the_order_of_ranks_change_nothing(constants, layer, data):
    before = choose_degree(constants, **layer)
    order = data.draw(st.permutations(range(len(layer["pairs_P"]))))
    rows_PP = [[layer["rows_out_PP"][s][d] for d in order] for s in order]
    for rank, row in enumerate(rows_PP):
        row[rank] = 10**9
    moved = {"rows_out_PP": rows_PP, **{k: [layer[k][r] for r in order] for k in ("experts_P", "pairs_P")}}
    assert choose_degree(constants, **layer | moved) == before


def even_layer(ranks: int, tokens: int, *, experts: int = 8, row_bytes: int = 4096) -> dict:
    return {
        "rows_out_PP": [[tokens] * ranks for _ in range(ranks)],
        "row_bytes_out": row_bytes,
        "row_bytes_back": row_bytes,
        "experts_P": [experts] * ranks,
        "pairs_P": [tokens * ranks] * ranks,
    }


def test_a_layer_in_one_chunk_when_starting_dominates():
    assert choose_degree(replace(CONSTANTS, all_to_all=LinkCost(10**9, 1000)), **even_layer(4, 1000)) == 1


def test_a_layer_in_more_chunks_when_exchange_and_compute_are_long():
    layer = even_layer(4, 4096, row_bytes=1024)
    assert choose_degree(CONSTANTS, **layer) == 4
    assert choose_degree(CONSTANTS, **layer, degrees=(1, 2)) == 2


def test_chunks_stream_the_same_weights_again():
    """A linear cost would cut this layer; weight streaming, paid for in each chunk, forbids it."""
    layer = even_layer(4, 200, experts=32)
    streaming = ExpertCost(0, 100_000, 100_000)
    linear = ExpertCost(0, 0, streaming.time_ns(32, 800) * 1000 // 800)
    assert linear.time_ns(32, 800) == streaming.time_ns(32, 800)
    cheap_start = replace(CONSTANTS, all_to_all=LinkCost(100, 10**6))
    assert choose_degree(replace(cheap_start, experts=linear), **layer) > 1
    assert choose_degree(replace(cheap_start, experts=streaming), **layer) == 1


@pytest.mark.parametrize("sends", [False, True])
@pytest.mark.parametrize("hot", range(4))
def test_the_busiest_rank_decides_not_the_mean(hot, sends):
    """One rank gets (or sends) all rows. The same totals spread evenly are too little work to cut."""
    tokens = 400
    skewed = {
        "rows_out_PP": [[tokens * (dst == hot) for dst in range(4)] for _ in range(4)],
        "row_bytes_out": 1024,
        "row_bytes_back": 1024,
        "experts_P": [8 * (rank == hot) for rank in range(4)],
        "pairs_P": [4 * tokens * (rank == hot) for rank in range(4)],
    }
    mean = skewed | {
        "rows_out_PP": [[tokens // 4] * 4 for _ in range(4)],
        "experts_P": [2] * 4,
        "pairs_P": [tokens] * 4,
    }
    constants = replace(CONSTANTS, all_to_all=LinkCost(40_000, 100_000))
    if sends:
        skewed["rows_out_PP"] = np.transpose(skewed["rows_out_PP"])
    assert choose_degree(constants, **mean) == 1
    assert choose_degree(constants, **skewed) == 2


def test_a_chunk_of_few_rows_touches_few_experts():
    """Two experts with a row each: two chunks stream each weight once, behind an exchange that is as long."""
    layer = even_layer(2, 2, experts=2) | {"pairs_P": [2, 2], "row_bytes_out": 10**6, "row_bytes_back": 0}
    cost = replace(CONSTANTS, all_to_all=LinkCost(0, 100_000), experts=ExpertCost(0, 100_000, 0))
    assert choose_degree(cost, **layer) == 2
    assert choose_degree(cost, **layer | {"pairs_P": [200, 200]}) == 1


@pytest.mark.parametrize("busy", [(), (0,), (2,)])
def test_ranks_without_tokens_take_part(busy):
    layer = even_layer(3, 0) | {"experts_P": [0] * 3, "rows_out_PP": np.zeros((3, 3), int)}
    layer["rows_out_PP"][list(busy)] = 5
    assert choose_degree(CONSTANTS, **layer) == 1


def test_numpy_integers_choose_the_same_degree():
    layer = even_layer(4, 100_000)
    small = {"row_bytes_out": np.int16(4096), "row_bytes_back": np.int16(4096), "experts_P": np.array([8] * 4, np.int8)}
    small |= {"rows_out_PP": np.array(layer["rows_out_PP"], np.int32), "pairs_P": np.array(layer["pairs_P"], np.int32)}
    given_PP = small["rows_out_PP"].copy()
    assert choose_degree(CONSTANTS, **layer | small) == choose_degree(CONSTANTS, **layer)
    assert (small["rows_out_PP"] == given_PP).all()  # the caller's matrix is left alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows_out_PP": []}, "rows_out_PP"),
        ({"rows_out_PP": [[1, 2]]}, "rows_out_PP"),
        ({"rows_out_PP": [[0.5, 1.0], [1.0, 0.5]]}, "rows_out_PP"),
        ({"rows_out_PP": [[0, -1], [0, 0]]}, "rows_out_PP"),
        ({"experts_P": [1]}, "experts_P has 1"),
        ({"pairs_P": [1, 2, 3]}, "pairs_P 3"),
        ({"pairs_P": [1, -2]}, "pairs_P"),
        ({"degrees": ()}, "degrees"),
    ],
)
def test_impossible_layers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_degree(CONSTANTS, **even_layer(2, 1) | arguments)
