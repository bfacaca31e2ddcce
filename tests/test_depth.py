"""How many layers ahead is asked: what pays stays, what does not is tried ever more rarely."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeyard.engine.predict.base import Predictor, Rows
from moeyard.engine.predict.depth import TRIAL_STEPS, Depth
from moeyard.engine.predict.forecast import MOST_AHEAD, Forecast
from moeyard.engine.predict.meter import Measured, Meter
from moeyard.engine.wants import Outcome

TRIAL, REST, LONGEST, MOST = 4, 8, 64, 5


def made(start: int = 2) -> Depth:
    return Depth(start, MOST, trial=TRIAL, rest=REST, longest=LONGEST)


def run(depth: Depth, steps: int, pays: int, idle: int = 3, late: int = 1) -> list[int]:
    """A disk and a model where it pays to look `pays` layers ahead and no further: the depth after each step."""
    seen = []
    for _ in range(steps):
        gained = [10 if d < pays else 1 for d in range(MOST)]
        depth.step(gained, [5] * MOST, idle=idle, late=late)
        seen.append(depth.layers)
    return seen


STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=MOST, max_size=MOST),
        st.lists(st.integers(0, 9), min_size=MOST, max_size=MOST),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    max_size=80,
)


@given(STEPS, st.integers(1, MOST))
def test_it_changes_by_one_at_the_end_of_a_balance_and_is_a_function_of_what_it_is_told(steps, start):
    depth, same = made(start), made(start)
    for number, (gained, spent, idle, late) in enumerate(steps, 1):
        before = depth.layers
        for one in (depth, same):
            one.step(gained, spent, idle=idle, late=late)
        assert 1 <= depth.layers <= MOST and abs(depth.layers - before) <= 1
        assert depth.layers == before or number % TRIAL == 0
        assert depth.layers == same.layers


@given(STEPS)
def test_what_does_not_pay_gets_less_deep_and_what_comes_late_never_deeper(steps):
    for gained, spent, idle, late in steps:
        depth = made(3)
        for _ in range(TRIAL):
            depth.step(gained, spent, idle=idle, late=late)
        if not gained[2] and not spent[2]:
            assert depth.layers == 3, "it was not asked"
        elif gained[2] <= spent[2]:
            assert depth.layers == 2
        elif idle <= late:
            assert depth.layers == 3
        else:
            assert depth.layers == 4


@given(st.integers(0, MOST), st.integers(1, MOST))
def test_it_comes_to_the_depth_that_pays_and_tries_the_next_one_ever_more_rarely(pays, start):
    depth = made(start)
    seen = run(depth, 2000, pays)[400:]
    settled = max(1, pays)
    assert set(seen) <= {settled, min(settled + 1, MOST)} if pays else set(seen) == {1}
    tried = sum(layers > settled for layers in seen)
    assert tried <= len(seen) * TRIAL / LONGEST + 2 * TRIAL


def test_no_deeper_while_reads_come_too_late_and_again_when_the_disk_has_time():
    depth = made(2)
    assert set(run(depth, 40, MOST, idle=1, late=1)) == {2}
    assert run(depth, 3 * TRIAL, MOST, idle=2, late=1)[-1] == MOST


def test_a_depth_that_failed_rests_and_twice_as_long_after_the_next_failure():
    depth = made(3)
    seen = run(depth, 100, pays=2)
    fails = [n for n in range(1, 100) if seen[n] < seen[n - 1]]
    gaps = [b - a for a, b in itertools.pairwise(fails)]
    assert seen[TRIAL - 1] == 2 and len(gaps) >= 2 and gaps[1] >= gaps[0] + REST


# As the predictors are asked


class Guess(Predictor):
    """Says of every layer that its expert 0 is needed; and is asked about as many layers as it has been right of."""

    name = "guess"
    reach = 2

    def upcoming(self, layer):
        return np.array([1, 0], dtype=np.float32)


LAYERS = 12


def steps(forecast, number, useful, idle, tokens=1):
    """Steps in which reads are used that were begun at most `useful` layers ahead: how far ahead was asked."""
    asked = set()
    for _ in range(number):
        forecast.begin_step([Rows(request_id="a", first=0, token_ids=[1] * tokens, start=0)])
        wants = list(forecast.wants(-1))
        asked.add(max(want.ahead for want in wants))
        assert all(want.layer == want.ahead - 1 for want in wants)
        for want in wants:
            used = want.ahead <= useful
            forecast.heard(
                want, Outcome(nbytes=30_000_000, used=used, hidden=30_000_000 * used, delay=10_000_000 * (not used))
            )
        idle[0] += 1
        forecast.end_step()
    return asked


def test_how_far_ahead_is_asked_follows_what_came_of_it():
    idle = [0]
    meter = Meter(Guess(), ns_per_byte=1.0)
    forecast = Forecast([], [meter], layers=LAYERS, experts=2, least_chance=0.5)
    forecast.idle_layers = lambda: idle[0]
    assert steps(forecast, TRIAL_STEPS, useful=5, idle=idle) == {2}
    steps(forecast, 5 * TRIAL_STEPS, useful=5, idle=idle)
    assert steps(forecast, 2 * TRIAL_STEPS, useful=5, idle=idle) == {5}, "6 was tried and rests"
    steps(forecast, 20 * TRIAL_STEPS, useful=LAYERS, idle=idle)
    assert steps(forecast, 1, useful=LAYERS, idle=idle) == {MOST_AHEAD}
    assert Measured.from_list(forecast.figures()["guess"]).depth == MOST_AHEAD
    # steps of other sizes have depths of their own
    assert steps(forecast, 1, useful=5, idle=idle, tokens=64) == {2}
    assert Measured.from_list(forecast.figures()["guess"]).depth == 2
    # where hardly any is used it goes down to the next layer
    steps(forecast, 30 * TRIAL_STEPS, useful=1, idle=idle, tokens=64)
    assert Measured.from_list(forecast.figures()["guess"]).depth == 1


def test_no_deeper_while_the_disk_has_enough_to_do():
    forecast = Forecast([], [Meter(Guess(), ns_per_byte=1.0)], layers=LAYERS, experts=2, least_chance=0.5)
    assert steps(forecast, 5 * TRIAL_STEPS, useful=LAYERS, idle=[0]) == {2}
