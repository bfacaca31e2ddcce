"""Constants found again in timings, noisy ones and few."""

from __future__ import annotations

from dataclasses import astuple
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.scheduler.cost import ExpertCost, LinkCost
from moeyard.scheduler.fit import fit_experts, fit_link

EXPERTS = ExpertCost(5_000, 10_000, 100_000)  # linear from 100 rows per expert


@pytest.mark.parametrize(
    "link", [LinkCost(20_000, 100_000), LinkCost(150_000, 1_200_000), LinkCost(8_000, 2_222), LinkCost(0, 50_000)]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_link_is_found_again_in_noise(link, seed):
    """5 % noise on each sample, and one in ten takes ten times as long."""
    random = Random(seed)
    sizes = [4**i for i in range(2, 13)]
    samples = [
        (size, max(1, round(link.time_ns(size) * random.gauss(1, 0.05) * random.choice([1] * 9 + [10]))))
        for size in sizes
        for _ in range(9)
    ]
    fitted = fit_link(samples)
    assert fitted == fit_link(random.sample(samples, len(samples)))  # order is nothing
    assert fitted.fs_per_byte == pytest.approx(link.fs_per_byte, rel=0.05)
    assert fitted.alpha_ns == pytest.approx(link.alpha_ns, rel=0.05, abs=10)


@pytest.mark.parametrize(
    ("samples", "link"),
    [
        ([(0, 500), (1000, 1500)], LinkCost(500, 10**6)),
        ([(1000, 1500), (0, 500), (2000, 2500)], LinkCost(500, 10**6)),
        ([(1000, 500), (9000, 500)], LinkCost(500, 0)),
        ([(1, 1000), (2, 2000)], LinkCost(0, 10**9)),
        ([(100, 900), (200, 100)], LinkCost(100, 0)),  # nothing falls with size
        ([(10, 10), (20, 40)], LinkCost(0, 10**6)),  # no start-up time below 0: the best line that has none
        ([(np.int32(0), np.int64(500)), (np.int32(1000), np.int64(1500))], LinkCost(500, 10**6)),
    ],
)
def test_fits_of_few_samples(samples, link):
    assert fit_link(samples) == link


@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(1, 10**9)), max_size=8))
def test_any_samples_of_two_sizes_give_a_link(samples):
    if len({size for size, _ in samples}) >= 2:
        fit_link(samples)
    else:
        with pytest.raises(ValueError, match="different sizes"):
            fit_link(samples)


@pytest.mark.parametrize("samples", [[(1, 0), (2, 5)], [(-1, 5), (2, 5)]])
def test_impossible_samples_are_named(samples):
    with pytest.raises(ValueError, match="samples has"):
        fit_link(samples)


@pytest.mark.parametrize(
    "cost",
    [EXPERTS, ExpertCost(50_000, 13_000, 94_600), ExpertCost(0, 200_000, 40_000_000), ExpertCost(9_000, 0, 7000)],
)
@pytest.mark.parametrize("seed", range(2))
def test_an_expert_cost_is_found_again_in_noise(cost, seed):
    random = Random(seed)
    samples = []
    for experts in (1, 4, 16, 32):
        for per_expert in (1, 4, 16, 64, 256, 1024):
            ns = cost.time_ns(experts, experts * per_expert)
            for _ in range(5):
                noise = random.gauss(1, 0.03) * random.choice([1] * 9 + [10])
                samples.append((experts, experts * per_expert, max(1, round(ns * noise))))
    fitted = fit_experts(samples)
    for experts in (1, 2, 8, 32):
        for rows in (experts, 10 * experts, 100 * experts, 2000 * experts):
            assert fitted.time_ns(experts, rows) == pytest.approx(cost.time_ns(experts, rows), rel=0.08)


def test_an_expert_cost_is_found_exactly_without_noise():
    grid = [(experts, experts * rows) for experts in (1, 3, 10) for rows in (1, 30, 300, 1000)]
    fitted = fit_experts([(*inputs, EXPERTS.time_ns(*inputs)) for inputs in grid])
    assert astuple(fitted) == pytest.approx(astuple(EXPERTS), rel=0.002)


def test_a_regime_without_samples_gets_the_largest_cost_that_fits():
    streaming = [(experts, experts * 4, 1000 + 500 * experts) for experts in (1, 2, 4, 8)]
    fitted = fit_experts(streaming)
    assert (fitted.base_ns, fitted.per_expert_ns, fitted.ps_per_row) == (1000, 500, 125_000)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([(1, 1, 5), (1, 1, 6), (2, 2, 7)], "different"),
        ([(1, 0, 5), (2, 0, 6), (3, 0, 7)], "no rows"),
        ([(1, 1, 0), (2, 2, 6), (3, 3, 7)], "above 0 ns"),
    ],
)
def test_experts_need_samples_that_tell_something(samples, message):
    with pytest.raises(ValueError, match=message):
        fit_experts(samples)
