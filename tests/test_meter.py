"""The meter counts what a predictor says and costs, and switches it off while it costs more than it hides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.engine.messages import Stats
from moeyard.engine.predict import meter as meter_module
from moeyard.engine.predict.base import Predictor, Rows
from moeyard.engine.predict.meter import HALF_LIFE, Measured, Meter, Switch, add_up
from moeyard.engine.wants import Outcome
from moeyard.launch.totals import Totals

# The switch


def brute_force(steps, trial, rest, longest):
    """On or off after each step, by looking at whole trials and rests."""
    out, at, pause = [], 0, rest
    while at < len(steps):
        window = steps[at : at + trial]
        out += [True] * len(window)
        at += trial
        if at > len(steps):
            break
        if sum(gained - spent for gained, spent in window) > 0:
            pause = rest
            continue
        out[-1] = False
        left = min(pause, len(steps) - at)
        out += [False] * (left - 1) + [left == pause] * (left > 0)
        at += pause
        pause = min(2 * pause, longest)
    return out


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=120),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 12),
)
def test_switch_is_on_while_trials_gain(steps, trial, rest, more):
    switch, seen = Switch(trial, rest, rest + more), []
    assert switch.on
    for gained, spent in steps:
        switch.step(gained, spent)
        seen.append(switch.on)
    assert seen == brute_force(steps, trial, rest, rest + more)


@given(st.integers(1, 100), st.integers(0, 99))
def test_switch_stays_on_or_rests_longer_and_longer(more, less):
    good, bad = Switch(2, 3, 24), Switch(2, 3, 24)
    states = []
    for _ in range(200):
        good.step(more + less, less)
        assert good.on
        bad.step(less, less)  # what brings only what it costs is not worth it
        states.append(bad.on)
    lengths = [len(part) for part in "".join("x" if on else "." for on in states).split("x") if part]
    assert lengths[:5] == [3, 6, 12, 24, 24] and sum(states) < 30


def test_one_good_trial_forgets_the_bad_ones():
    switch = Switch(1, 2, 100)
    for _ in range(20):
        switch.step(0, 1)
    assert switch.rest > 2
    while not switch.on:
        switch.step(0, 0)
    switch.step(1, 0)
    assert switch.on and switch.rest == 2


# The meter


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self, monkeypatch):
        self.ns = 0
        monkeypatch.setattr(meter_module.time, "perf_counter_ns", lambda: self.ns)


class Fake(Predictor):
    name = "fake"

    def __init__(self, clock=None, layers=2, experts=8):
        self.clock, self.calls = clock, []
        self.chances = {layer: np.zeros(experts, dtype=np.float32) for layer in range(layers)}
        self.next = None
        self.work_ns = 0

    def _work(self, what):
        self.calls.append(what)
        if self.clock:
            self.clock.ns += self.work_ns

    def begin_step(self, rows):
        self._work("begin")

    def routed(self, layer, ids_TK):
        self._work("routed")

    def end_step(self):
        self._work("end")

    def forget(self, request_id):
        self._work("forget")

    def upcoming(self, layer):
        self._work("upcoming")
        return self.chances.get(layer)

    def future(self):
        self._work("future")
        return self.next


def rows(tokens):
    return [Rows(request_id="a", first=0, token_ids=[1] * tokens, start=0)]


def used(nbytes, hidden=None):
    return Outcome(nbytes=nbytes, used=True, hidden=nbytes if hidden is None else hidden)


def step(meter, chosen, tokens=1, heard=()):
    """A step in which each layer used these experts, as [T, K]."""
    meter.begin_step(rows(tokens))
    for layer in chosen:
        meter.upcoming(layer)
    for layer, ids in chosen.items():
        for outcome in heard:
            meter.heard(outcome)
        meter.routed(layer, np.array(ids))
        meter.future()
    meter.end_step()


def always(monkeypatch):
    monkeypatch.setattr(meter_module, "MEASURED_STEP", 1)


@given(st.data())
def test_recall_and_precision_are_what_was_said(data):
    experts, layers = 6, 2
    resident = {
        layer: np.array(data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
        for layer in range(layers)
    }
    fake = Fake(layers=layers, experts=experts)
    meter = Meter(fake, ns_per_byte=1, resident=resident.__getitem__, judged=False)
    meter_module_step, meter_module.MEASURED_STEP = meter_module.MEASURED_STEP, 1
    try:
        used_sum = right_k = right_2k = likely = likely_used = 0.0
        for _ in range(data.draw(st.integers(1, 3))):
            used = {}
            for layer in range(layers):
                chances = data.draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts))
                fake.chances[layer] = np.array(chances, dtype=np.float32) / 4
                ids = data.draw(st.lists(st.lists(st.integers(-1, experts - 1), min_size=2, max_size=2), max_size=3))
                used[layer] = np.array(ids, dtype=np.int64).reshape(-1, 2)
                distinct = {e for row in ids for e in row if e >= 0}
                order = sorted(range(experts), key=lambda e: (-chances[e], e))
                fetch = {e for e in range(experts) if chances[e] >= 2 and not resident[layer][e]}
                used_sum += len(distinct)
                right_k += len(distinct & set(order[: len(distinct)]))
                right_2k += len(distinct & set(order[: 2 * len(distinct)]))
                likely += len(fetch)
                likely_used += len(fetch & distinct)
            step(meter, used, tokens=3)
            fade = 2 ** (-1 / HALF_LIFE)
            used_sum, right_k, right_2k, likely, likely_used = (
                value * fade for value in (used_sum, right_k, right_2k, likely, likely_used)
            )
    finally:
        meter_module.MEASURED_STEP = meter_module_step
    seen = meter.measured()
    for value, expected in (
        (seen.recall_k, right_k / used_sum if used_sum else None),
        (seen.recall_2k, right_2k / used_sum if used_sum else None),
        (seen.precision, likely_used / likely if likely else None),
    ):
        assert value == (None if expected is None else pytest.approx(expected))


def test_what_is_said_of_the_future_is_compared_with_the_next_step(monkeypatch):
    always(monkeypatch)
    fake = Fake()
    fake.chances, fake.next = {}, np.zeros((2, 8), dtype=np.float32)
    fake.next[0, 3] = fake.next[1, 5] = 1
    meter = Meter(fake, ns_per_byte=1, judged=False)
    step(meter, {0: [[1]], 1: [[1]]})
    assert meter.measured().recall_k is None, "nothing was said before it"
    fake.next[1, 5] = 0  # in place: what was said counts
    step(meter, {0: [[3]], 1: [[5]]})
    assert meter.measured().recall_k == 1
    step(meter, {0: [[3]], 1: [[5]]})
    assert meter.measured().recall_k == pytest.approx((2 + 1) / 4, abs=0.01)


def test_an_expert_that_was_read_ahead_since_was_still_missing(monkeypatch):
    always(monkeypatch)
    fake, resident = Fake(), np.zeros(8, dtype=bool)
    fake.chances[1][[2, 6]] = 0.9
    meter = Meter(fake, ns_per_byte=1, resident=lambda layer: resident, judged=False)
    meter.begin_step(rows(1))
    meter.upcoming(1)
    resident[:] = True
    meter.upcoming(1)
    meter.routed(1, np.array([[2, 3]]))
    meter.end_step()
    assert meter.measured().precision == 0.5


def test_cost_and_useful_share(monkeypatch):
    clock = Clock(monkeypatch)
    fake = Fake(clock)
    fake.work_ns = 1000
    meter = Meter(fake, ns_per_byte=1, judged=False)
    for _ in range(5):
        step(meter, {0: [[1, 2]] * 4}, tokens=4, heard=[used(30), Outcome(nbytes=10)])
    assert len(fake.calls) == 25
    seen = meter.measured()
    assert seen.us_per_token == pytest.approx(5 / 4)
    assert seen.useful_share == pytest.approx(0.75)


def drive(meter, fake, steps, tokens=1, heard=()):
    """Whether it was asked in each step."""
    asked = []
    for _ in range(steps):
        fake.calls.clear()
        step(meter, {0: [[1, 2]] * tokens}, tokens, heard)
        asked.append("upcoming" in fake.calls)
        assert asked[-1] or not fake.calls, "at rest it is left alone"
    return asked


@pytest.mark.parametrize(
    ("heard", "asked"),
    [
        ([used(1000)], True),  # hides a microsecond, takes half of one
        ([used(400)], False),
        ([used(1000, hidden=400)], False),  # the rest was waited for
        ([used(1000), Outcome(nbytes=900, delay=600)], False),  # a layer waited for what was read for nothing
        ([used(1000), Outcome(nbytes=900, delay=400)], True),
        ([used(1000), Outcome(nbytes=9000)], True),  # nobody waited for that
        ([], False),
    ],
)
def test_it_is_asked_while_it_hides_more_than_it_costs(monkeypatch, heard, asked):
    clock = Clock(monkeypatch)
    fake = Fake(clock)
    fake.work_ns = 100  # in each of five calls
    meter = Meter(fake, ns_per_byte=1)
    steps = drive(meter, fake, meter_module.TRIAL_STEPS + 40, heard=heard)
    assert all(steps[: meter_module.TRIAL_STEPS]), "a trial first"
    assert set(steps[meter_module.TRIAL_STEPS :]) == {asked}
    assert meter.on == asked == bool(meter.measured().on)


def test_it_is_tried_again(monkeypatch):
    fake = Fake(Clock(monkeypatch))
    fake.work_ns = 100
    meter = Meter(fake, ns_per_byte=1)
    trial, rest = meter_module.TRIAL_STEPS, meter_module.REST_STEPS
    assert drive(meter, fake, trial + rest) == [True] * trial + [False] * rest
    assert all(drive(meter, fake, 3 * trial, heard=[used(10_000)])), "now it is worth it"


def test_steps_of_other_sizes_are_judged_apart(monkeypatch):
    """Long prompts cost more to ask about and are not worth it; while short steps ask it is told of all."""
    clock = Clock(monkeypatch)
    fake = Fake(clock)
    meter = Meter(fake, ns_per_byte=1)
    for _ in range(meter_module.TRIAL_STEPS):
        fake.work_ns = 100
        step(meter, {0: [[1, 2]]}, 1, [used(1000)])
        fake.work_ns = 100_000
        step(meter, {0: [[1, 2]] * 300}, 300, [used(1000)])
    fake.work_ns = 100
    for tokens, on in ((1, True), (300, False)):
        fake.calls.clear()
        step(meter, {0: [[1, 2]] * tokens}, tokens, [used(1000)])
        assert ("upcoming" in fake.calls) == on and {"begin", "routed", "end"} <= set(fake.calls)
        assert meter.on == on


def test_who_cannot_be_judged_stays_on(monkeypatch):
    fake = Fake(Clock(monkeypatch))
    fake.work_ns = 100
    meter = Meter(fake, ns_per_byte=1, judged=False)
    assert all(drive(meter, fake, 2 * meter_module.TRIAL_STEPS)) and meter.on


def test_a_step_that_failed_is_closed_by_the_next(monkeypatch):
    fake = Fake(Clock(monkeypatch))
    fake.work_ns = 100
    meter = Meter(fake, ns_per_byte=1)
    for _ in range(meter_module.TRIAL_STEPS + 1):
        meter.begin_step(rows(2))
    assert not meter.on
    assert meter.measured().us_per_token == pytest.approx(0.05)


def test_all_is_passed_on(monkeypatch):
    fake = Fake()
    meter = Meter(fake, ns_per_byte=1)
    assert meter.name == "fake"
    meter.forget("a")
    step(meter, {0: [[1]]})
    assert fake.calls == ["forget", "begin", "upcoming", "routed", "future", "end"]


# Figures of several ranks


floats = st.floats(0, 1e12)


@given(st.lists(st.builds(Measured, **dict.fromkeys(vars(Measured()), floats)), max_size=4))
def test_ranks_add_up(ranks):
    total = add_up({"a": measured.to_list()} for measured in ranks)
    if not ranks:
        assert total == {}
        return
    seen = Measured.from_list(total["a"])
    assert seen.used == pytest.approx(sum(m.used for m in ranks)) and seen.on == pytest.approx(sum(m.on for m in ranks))
    totals = Totals()
    for rank, measured in enumerate(ranks):
        totals.take(rank, Stats(predictors={"a": measured.to_list()}))
    assert totals.total.predictors == total
    totals.lose(0)
    assert totals.total.predictors == add_up({"a": measured.to_list()} for measured in ranks[1:])


def test_a_predictor_of_one_rank_only():
    a, b = Measured(used=4, right_k=1, on=1).to_list(), Measured(used=4, right_k=3).to_list()
    assert add_up([{"x": a}, {"x": b, "y": a}]) == {"x": Measured(used=8, right_k=4, on=1).to_list(), "y": a}
