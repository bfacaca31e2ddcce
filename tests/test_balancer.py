"""What a balancer does with plans that its ranks could not carry out: it leaves the layer as it is, and says so."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moeyard.engine.balance import Balancer
from moeyard.engine.guests import Cutter, GuestRoom
from moeyard.scheduler.balance.plan import Plan, Transfer, native
from moeyard.scheduler.balance.problem import Rates

RANKS, EXPERTS, WIDTH = 3, 6, 4


def mixed(x):
    return x.softmax(-1)  # no part of the columns can be computed alone


def halves(x):
    first, second = x.chunk(2, dim=-1)
    return first * second


def layer_of(gate, rows):
    pool = SimpleNamespace(
        format=None,
        up_SND=torch.zeros(2, rows, 8),
        down_SDI=torch.zeros(2, 8, WIDTH),
        up_bias_SN=None,
        down_bias_SD=None,
    )
    home_E = np.arange(EXPERTS) // 2
    number_PE = np.where(home_E == np.arange(RANKS)[:, None], np.arange(EXPERTS) % 2, -1)
    return SimpleNamespace(
        cutter=Cutter(pool, gate),
        index=0,
        number_PE=number_PE,
        home_E=home_E,
        holders_digest=0,
        tokens_P=(),
        update=lambda: None,
    )


def balancer_of(layer, planner, guests):
    room = GuestRoom(guests * layer.cutter.nbytes(), layer.cutter, torch.device("cpu"))
    group = SimpleNamespace(size=RANKS, position=0)
    rates = Rates(1, 1, 1000, near_fs_per_byte=1)
    return Balancer(group, planner, room, node_P=[0] * RANKS, rates=rates)


def moving(*transfers):
    """A planner that has expert 0 computed where these bring it."""

    def plan(problem):
        it = native(problem)
        whole = [t for t in transfers if t.parts == 1]
        if not whole:
            it.sliced_E[0], it.rows_EP[0] = it.rows_EP[0].sum(), 0
        for t in whole:
            it.rows_EP[t.expert, t.destination], it.rows_EP[t.expert, t.source] = problem.loads_E[t.expert], 0
        return Plan("made", it.rows_EP, it.sliced_E, transfers)

    return plan


PARTS = (Transfer(0, 0, 1, 0, 2), Transfer(0, 0, 2, 1, 2))
TWO = (Transfer(0, 0, 1), Transfer(1, 0, 1))


@pytest.mark.parametrize(
    ("gate", "rows", "guests", "transfers", "refused"),
    [
        (halves, 2 * WIDTH, 2, TWO, 0),
        (halves, 2 * WIDTH, 1, TWO, 1),
        (halves, 2 * WIDTH, 1, PARTS, 0),
        (mixed, WIDTH, 2, PARTS, 1),
    ],
    ids=["there is room", "no room for both", "parts", "an activation that cannot be cut"],
)
def test_what_cannot_be_carried_out_is_left(gate, rows, guests, transfers, refused, caplog):
    layer = layer_of(gate, rows)
    balancer = balancer_of(layer, moving(*transfers), guests)
    counts = np.full((RANKS, EXPERTS), 4)
    with caplog.at_level(logging.WARNING, "moeyard.balance"):
        plans = [balancer.plan(layer, counts)[1] for _ in range(2)]
    assert [plan.is_native for plan in plans] == [bool(refused)] * 2
    assert balancer.figures.refused == 2 * refused and len(caplog.records) == refused
    assert balancer.figures.acted == 2 - 2 * refused


def test_the_priced_planner_cuts_no_further_than_the_layer_allows():
    seen = []
    layer = layer_of(mixed, WIDTH)
    balancer_of(layer, lambda problem: seen.append(problem.most_parts) or native(problem), 2).plan(
        layer, np.ones((RANKS, EXPERTS), dtype=np.int64)
    )
    assert seen == [1]
