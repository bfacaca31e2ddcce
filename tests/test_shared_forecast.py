"""What the predictors of several ranks say together, over notes that are handed round in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moeyard.engine.predict import meter as meter_module
from moeyard.engine.predict.base import Predictor, Rows
from moeyard.engine.predict.forecast import Forecast
from moeyard.engine.predict.meter import TRIAL_STEPS, Meter
from moeyard.engine.predict.notes import NoteFormat
from moeyard.engine.predict.shared_forecast import SharedForecast
from moeyard.engine.readers import Priority
from moeyard.engine.wants import Outcome, Want

LAYERS, EXPERTS, DEPTH = 3, 6, 2
EVEN = np.arange(EXPERTS) % 2 == 0
ROWS = [Rows(request_id="a", first=0, token_ids=[1], start=0)]


class Says(Predictor):
    """What a test wants."""

    def __init__(self, name="says", future=None, **chances):
        self.name, self.chances, self.asked = name, {int(k[1:]): v for k, v in chances.items()}, []
        self.future_LE, self.ids = future, []

    def routed(self, layer, ids_TK):
        self.ids.append(ids_TK.tolist())

    def upcoming(self, layer):
        self.asked.append(layer)
        return self.chances.get(layer)

    def future(self):
        return self.future_LE


def chance(**experts):
    """[E] "e3" is expert 3."""
    chance_E = np.zeros(EXPERTS, np.float32)
    for name, value in experts.items():
        chance_E[int(name[1:])] = value
    return chance_E


@pytest.fixture(autouse=True)
def no_time(monkeypatch):
    monkeypatch.setattr(meter_module.time, "perf_counter_ns", lambda: 0)


def ranks_of(*predictors, trained=(), here=(EVEN, ~EVEN)):
    """Forecasts of ranks with these predictors each; rank 0 has the even experts, rank 1 the odd ones."""
    found = []
    for position, mine in enumerate(predictors):
        meters = [Meter(predictor, ns_per_byte=1) for predictor in mine]
        known = [Meter(trained[position], ns_per_byte=1, judged=False)] if trained else []
        forecast = SharedForecast(known, meters, LAYERS, EXPERTS, least_chance=0.5, depth=DEPTH)
        forecast.join(position, len(predictors))
        for layer in range(LAYERS):
            forecast.place(layer, np.tile(here[position], (len(predictors), 1)))
        found.append(forecast)
    return found


def exchange(ranks, layer):
    notes_PN = np.stack([rank.say(layer) for rank in ranks])
    for rank in ranks:
        rank.hear(layer, notes_PN)


def begin(ranks, rows=None):
    for position, rank in enumerate(ranks):
        rank.announce(ROWS if rows is None else rows[position])
    exchange(ranks, -1)
    for position, rank in enumerate(ranks):
        rank.begin_step(ROWS if rows is None else rows[position])


def end(ranks):
    for rank in ranks:
        rank.end_step()
    tallies = [rank.tally() for rank in ranks]
    for rank in ranks:
        rank.settle(tallies)


def wanted(forecast, layer):
    return [(want.layer, want.expert, round(want.chance, 2), want.by) for want in forecast.wants(layer)]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.data())
def test_a_note_comes_as_it_was_written(depth, experts, ranks, data):
    form = NoteFormat(depth, experts)
    assert form.nbytes % 8 == 0 and form.nbytes < depth * (experts + 1) + 2 * experts + 9
    chances = arrays.arrays(np.float32, (ranks, depth, experts), elements=st.floats(0, 1, width=32))
    uses = arrays.arrays(np.float32, (ranks, experts), elements=st.floats(-1e6, 1e6, width=32))
    bys = arrays.arrays(np.uint8, (ranks, depth), elements=st.integers(0, 3))
    chance_PAE, future_PE, by_PA = data.draw(chances), data.draw(uses), data.draw(bys)
    said = form.unpack(np.stack([form.pack(*mine) for mine in zip(chance_PAE, by_PA, future_PE, strict=True)]))
    np.testing.assert_allclose(said.chance_PAE, chance_PAE, atol=0.51 / 255)
    np.testing.assert_allclose(said.future_PE, future_PE.clip(-65504, 65504), rtol=1e-3, atol=1e-7)
    assert (said.by_PA == by_PA).all()
    assert not form.unpack(form.pack(chance_PAE[0], by_PA[0], None)[None]).future_PE.any()


def test_each_rank_wants_what_any_ranks_tokens_will_use_of_its_own_experts():
    first = Says(_1=chance(e0=0.9, e1=0.6, e2=0.3, e3=0.3), _2=chance(e4=0.8))
    second = Says(_0=chance(e1=1, e2=1), _1=chance(e1=0.2, e2=0.4, e3=0.4, e5=1), _2=chance(e4=0.9))
    ranks = ranks_of([first], [Says("silent"), second])
    begin(ranks)
    assert wanted(ranks[0], -1) == [(0, 2, 1, (1, 1)), (1, 0, 0.9, (0, 0)), (1, 2, 0.58, (1, 1))]  # 1 - 0.7 * 0.6
    assert wanted(ranks[1], -1) == [(0, 1, 1, (1, 1)), (1, 5, 1, (1, 1)), (1, 1, 0.68, (0, 0)), (1, 3, 0.58, (1, 1))]
    assert {want.priority for want in ranks[0].wants(-1) if want.layer} == {Priority.LATER}
    exchange(ranks, 0)
    assert wanted(ranks[0], 0)[-1] == (2, 4, 0.98, (1, 1))
    assert [want.priority for want in ranks[1].wants(0)] == [Priority.NEXT_LAYER] * 3
    assert first.asked == [0, 1, 1, 2]


def test_a_rank_without_tokens_reads_for_the_others_and_copies_count_where_a_ranks_tokens_go():
    ranks = ranks_of([Says(_0=chance(e0=1, e1=1))], [Says(_0=chance(e0=1, e1=1))])
    for position, rank in enumerate(ranks):  # both have expert 1, each for its own tokens
        here_PE = np.tile(EVEN if not position else ~EVEN, (2, 1))
        here_PE[:, 1] = [not position, bool(position)]
        rank.place(0, here_PE)
    begin(ranks, rows=[ROWS, ()])
    assert wanted(ranks[0], -1) == [(0, 0, 1, (0, 0)), (0, 1, 1, (0, 0))]
    assert not wanted(ranks[1], -1)
    begin(ranks, rows=[(), ROWS])
    assert wanted(ranks[0], -1) == [(0, 0, 1, (1, 0))]
    assert wanted(ranks[1], -1) == [(0, 1, 1, (1, 0))]
    begin(ranks, rows=[(), ()])
    assert not wanted(ranks[0], -1) and not wanted(ranks[1], -1)  # nothing is left of the step before
    assert not ranks[1].elsewhere(0)[1] and ranks[1].elsewhere(0)[0]


def test_what_to_keep_is_what_all_ranks_sequences_will_use():
    own = [np.full((LAYERS, EXPERTS), value, np.float32) for value in (1, 10)]
    ranks = ranks_of([], [], trained=[Says(future=it) for it in own])
    begin(ranks)
    assert (ranks[0].future() == 1).all()  # of the others' nothing has been said
    for layer in range(2):
        exchange(ranks, layer)
        assert (ranks[0].future()[: layer + 1] == 11).all() and (ranks[0].future()[layer + 1 :] == 1).all()
    assert (ranks[1].future()[:2] == 11).all() and (ranks[1].future()[2] == 10).all()
    end(ranks)
    begin(ranks, rows=[ROWS, ()])
    exchange(ranks, 0)
    assert ranks[0].future()[:, 0].tolist() == [1, 11, 1]  # the other's sequences have ended; of layer 1 it will hear
    assert ranks[1].future()[:, 0].tolist() == [1, 1, 0]


def by(rank, predictor):
    return Want(layer=0, expert=0, chance=1.0, by=(rank, predictor))


def test_who_spoke_hears_what_it_was_worth_on_all_ranks():
    ranks = ranks_of([Says("x"), Says("y")], [Says("x")])
    begin(ranks)
    ranks[1].heard(by(0, 1), Outcome(nbytes=100, used=True))
    ranks[1].heard(by(0, 1), Outcome(nbytes=50))
    ranks[0].heard(by(0, 1), Outcome(nbytes=7, used=True))
    ranks[0].heard(by(1, 0), Outcome(nbytes=30))
    end(ranks)
    measured = [[meter.measured() for meter in rank.meters] for rank in ranks]
    assert [(it.read_bytes, it.used_bytes) for it in measured[0]] == [(0, 0), (157, 107)]
    assert [(it.read_bytes, it.used_bytes) for it in measured[1]] == [(30, 0)]
    begin(ranks)
    end(ranks)
    assert ranks[1].meters[0].measured().read_bytes == pytest.approx(30, rel=0.01)  # once


@pytest.mark.parametrize("used", [True, False])
def test_a_predictor_is_switched_off_for_what_others_read_in_vain(used):
    """The useless one says something of experts of the other rank only."""
    ranks = ranks_of([Says(_0=chance(e1=1))], [])
    asked = []
    for _ in range(TRIAL_STEPS + 1):
        begin(ranks, rows=[ROWS, ()])
        asked.append(bool(wanted(ranks[1], -1)))
        for want in ranks[1].wants(-1):
            ranks[1].heard(want, Outcome(nbytes=1000, used=used, hidden=1000 * used))
        end(ranks)
    assert asked == [True] * TRIAL_STEPS + [used]
    assert ranks[0].meters[0].on == used


def test_alone_it_is_a_plain_forecast():
    def predictors():
        return [Says("x", _0=chance(e0=0.9), _1=chance(e1=0.7)), Says("y", _1=chance(e2=0.6))]

    own = np.ones((LAYERS, EXPERTS), np.float32)
    plain = Forecast(
        [Meter(Says(future=own), ns_per_byte=1, judged=False)],
        [Meter(predictor, ns_per_byte=1) for predictor in predictors()],
        LAYERS,
        EXPERTS,
        least_chance=0.5,
        depth=DEPTH,
    )
    shared, lost = ranks_of(predictors(), predictors(), trained=[Says(future=own)] * 2)
    plain.begin_step(ROWS)  # a step that does not end
    begin([shared, lost])
    exchange([shared, lost], 0)
    shared.heard(by(1, 0), Outcome(nbytes=9, used=True))
    shared.join(0, 1)
    for forecast in (plain, shared):
        forecast.begin_step(ROWS)
    assert list(plain.wants(-1)) == list(shared.wants(-1)) != []
    assert (shared.future() == own).all() and not shared.elsewhere(0).any()
    for forecast in (plain, shared):
        for want in forecast.wants(-1):
            forecast.heard(want, Outcome(nbytes=10, used=want.expert == 0))
        forecast.end_step()
    assert plain.figures() == shared.figures() and shared.meters[1].measured().read_bytes == 20


def test_experts_are_sorted_only_for_those_who_look_at_their_order():
    ids_TK, weights_TK = torch.tensor([[2, 0, 1], [1, -1, 0]]), torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.9, 0.4]])
    for ordered in (False, True):
        says = Says()
        says.ordered = ordered
        forecast = Forecast([], [Meter(says, ns_per_byte=1)], 1, 3, least_chance=0.5)
        forecast.begin_step(ROWS)
        forecast.routed(0, ids_TK, weights_TK)
        assert says.ids == [[[0, 1, 2], [0, 1, -1]] if ordered else ids_TK.tolist()]
