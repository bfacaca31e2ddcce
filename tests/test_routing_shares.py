"""Tokens by shares: as many of each expert's rows to each rank as the shares say, spread over the tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.routing import SLICED, by_shares


@st.composite
def cases(draw):
    ranks, experts, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(0, 40))
    top_k = draw(st.integers(1, experts))
    ids = []
    for _ in range(tokens):
        chosen = draw(st.permutations(range(experts)))[:top_k]
        ids.append([e if draw(st.integers(0, 5)) else -1 for e in chosen])
    ids_TK = torch.tensor(ids, dtype=torch.long).reshape(tokens, top_k)
    shares = np.zeros((experts, ranks + 1), dtype=np.int64)
    for e in ids_TK.flatten().tolist():
        if e >= 0:
            shares[e, draw(st.integers(0, ranks))] += 1
    return ids_TK, shares


@settings(max_examples=100, deadline=None)
@given(cases())
def test_each_rank_gets_its_share(case):
    ids_TK, shares = case
    experts, ranks = shares.shape[0], shares.shape[1] - 1
    slot_EP = np.arange(experts * ranks).reshape(experts, ranks)
    member = np.arange(ranks) % 2 == 0  # the slice group of every expert: the even ranks
    part_slot_PE = np.where(member[:, None], 1000 + np.arange(experts), -1)
    routing = by_shares(ids_TK, shares, slot_EP, part_slot_PE)
    got = np.zeros_like(shares)
    for e, rank, slot in zip(*(t.flatten().tolist() for t in (ids_TK, routing.rank_TK, routing.slot_TK)), strict=True):
        if e < 0:
            assert (rank, slot) == (-1, -1)
        else:
            got[e, ranks if rank == SLICED else rank] += 1
            assert slot == (-1 if rank == SLICED else slot_EP[e, rank])
    assert (got == shares).all()

    need_TP, pairs_TP = routing.need(ranks), routing.pairs(ranks)
    for t in range(ids_TK.shape[0]):
        for p in range(ranks):
            wanted = [
                int(slot_EP[e, p]) if rank == p else (1000 + e if rank == SLICED and member[p] else -1)
                for e, rank in zip(ids_TK[t].tolist(), routing.rank_TK[t].tolist(), strict=True)
            ]
            assert bool(need_TP[t, p]) == any(slot >= 0 for slot in wanted)
            assert int(pairs_TP[t, p]) == sum(slot >= 0 for slot in wanted)
            assert routing.slots(torch.tensor([t]), torch.tensor([p]))[0].tolist() == wanted


def test_shares_are_spread_over_the_tokens():
    ids_TK = torch.zeros(1000, 1, dtype=torch.long)
    routing = by_shares(ids_TK, np.array([[500, 300, 200]]), np.array([[0, 0]]), np.array([[-1], [0]]))
    for eighth in routing.rank_TK[:, 0].view(8, 125):
        parts = [int((eighth == rank).sum()) for rank in (0, 1, SLICED)]
        assert all(abs(part - wanted) <= 5 for part, wanted in zip(parts, (62.5, 37.5, 25), strict=True)), parts
