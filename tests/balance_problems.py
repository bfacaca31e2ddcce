"""Balancing problems for tests: small ones of every kind for property tests, and loads like those in papers."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from hypothesis import strategies as st

from moeyard.scheduler.balance.plan import Plan
from moeyard.scheduler.balance.problem import Integers, Problem, Rates

PLENTY = 1 << 40

RATES = Rates(
    base_ns=5_000,
    expert_ps=14_900_000,
    row_ps=77_500,
    near_alpha_ns=5_000,
    near_fs_per_byte=2_222,
    far_alpha_ns=10_000,
    far_fs_per_byte=2_500,
    guest_ns=2_000,
)
"""An expert of gpt-oss-120b in bf16 on an H100-class machine: 49.8 MB, 450 GB/s in a node, 400 GB/s between nodes."""
GPT_OSS_EXPERT = 49_800_000


def linear_homes(experts: int, ranks: int) -> Integers:
    """[E] contiguous blocks."""
    return np.arange(experts) * ranks // experts


def problem_of(
    loads_E: Sequence[int],
    ranks: int,
    *,
    holds_PE: Integers | Sequence[Sequence[int]] | None = None,
    home_E: Sequence[int] | Integers | None = None,
    ranks_per_node: int | None = None,
    expert_bytes: int = GPT_OSS_EXPERT,
    room: int = PLENTY,
    most_rows: int = PLENTY,
    rates: Rates = RATES,
) -> Problem:
    """Loads whose rows come from all ranks in even shares; by default experts in contiguous blocks on one node.

    With `holds_PE` alone, an expert's home is its first holder.
    """
    experts = len(loads_E)
    if home_E is None:
        home_E = linear_homes(experts, ranks) if holds_PE is None else np.asarray(holds_PE).argmax(0)
    if holds_PE is None:
        holds_PE = np.zeros((ranks, experts), dtype=np.int64)
        holds_PE[np.asarray(home_E), np.arange(experts)] = 1
    loads = np.asarray(loads_E, dtype=np.int64)
    shares = np.arange(ranks + 1)[:, None] * loads // ranks
    return Problem(
        rows_PE=np.diff(shares, axis=0),
        holds_PE=np.asarray(holds_PE),
        home_E=np.asarray(home_E),
        node_P=np.arange(ranks) // (ranks_per_node or ranks),
        expert_bytes=expert_bytes,
        room_P=np.full(ranks, room),
        most_rows_P=np.full(ranks, most_rows),
        rates=rates,
    )


def zipf_loads(experts: int, rows: int, exponent: float = 1.2, seed: int = 0) -> list[int]:
    """[E] expected loads under Zipf's law, the experts in a random order."""
    ranking = list(range(1, experts + 1))
    Random(seed).shuffle(ranking)
    return _shares(np.array(ranking, dtype=float) ** -exponent, rows)


def hot_loads(experts: int, rows: int, share: float, hot: int) -> list[int]:
    """[E] loads with a share of all rows on the first `hot` experts, and the rest even."""
    inside = round(share * rows)
    return _shares(np.ones(hot), inside) + _shares(np.ones(experts - hot), rows - inside)


def _shares(weights: np.ndarray, rows: int) -> list[int]:
    ends = np.round(np.cumsum(weights) / weights.sum() * rows).astype(np.int64)
    return np.diff(ends, prepend=0).tolist()


RATES_OF_ANY = st.one_of(
    st.just(RATES),
    st.builds(
        Rates,
        base_ns=st.sampled_from([0, 5]),
        expert_ps=st.sampled_from([0, 1_000, 20_000]),
        row_ps=st.sampled_from([0, 100, 1_000]),
        wire_ps=st.sampled_from([0, 50, 300]),
        near_alpha_ns=st.sampled_from([0, 3]),
        near_fs_per_byte=st.sampled_from([0, 1, 10**6]),
        far_alpha_ns=st.sampled_from([0, 9]),
        far_fs_per_byte=st.sampled_from([0, 10, 10**7]),
        hidden_ns=st.sampled_from([0, 50]),
        guest_ns=st.sampled_from([0, 2]),
        plan_ns=st.sampled_from([0, 7]),
    ),
)


@st.composite
def problems(
    draw: st.DrawFn, *, most_ranks: int = 8, most_experts: int = 40, most_nodes: int = 2, most_rows: int = 5_000
) -> Problem:
    """Any small problem: sizes that do not divide, ranks without rows, ranks without experts, one expert hotter than
    all others together, replicas, two nodes, ranks with little room or none, little memory for rows.
    """
    ranks, experts = draw(st.integers(1, most_ranks)), draw(st.integers(1, most_experts))
    # The structure is drawn, so that it shrinks; the numbers come from a seed, so that drawing is fast.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loads = draw(st.sampled_from(["none", "few", "even", "zipf", "hot"]))
    weights = np.arange(1, experts + 1) ** (-1.2 if loads == "zipf" else 0.0)
    rows = 0 if loads == "none" else int(rng.integers(1, 4 if loads == "few" else 2 + most_rows // ranks))
    rows_PE = rng.multinomial(rows, rng.permutation(weights) / weights.sum(), size=ranks)
    if loads == "hot":
        rows_PE[:, rng.integers(experts)] += most_rows
    if draw(st.booleans()):
        rows_PE[rng.integers(ranks, size=max(1, ranks // 3))] = 0

    home_E = linear_homes(experts, ranks) if draw(st.booleans()) else rng.integers(ranks, size=experts)
    holds_PE = rng.random((ranks, experts)) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]))
    holds_PE[home_E, np.arange(experts)] = True
    expert_bytes = draw(st.sampled_from([1, 10, 49_800_000]))
    return Problem(
        rows_PE=rows_PE,
        holds_PE=holds_PE.astype(np.int64),
        home_E=home_E,
        node_P=np.arange(ranks) * min(ranks, draw(st.integers(1, most_nodes))) // ranks,
        expert_bytes=expert_bytes,
        room_P=draw(
            st.sampled_from(
                [np.full(ranks, PLENTY), rng.integers(3, size=ranks) * expert_bytes, np.zeros(ranks, dtype=np.int64)]
            )
        ),
        most_rows_P=np.full(ranks, draw(st.sampled_from([PLENTY, 100]))),
        rates=draw(RATES_OF_ANY),
    )


def same(first: Plan, second: Plan) -> bool:
    """Two plans that say the same."""
    return (
        first.planner == second.planner
        and np.array_equal(first.rows_EP, second.rows_EP)
        and np.array_equal(first.sliced_E, second.sliced_E)
        and (first.transfers, first.chunks, first.shared) == (second.transfers, second.chunks, second.shared)
    )
