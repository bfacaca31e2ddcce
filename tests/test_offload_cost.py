"""What experts on disk cost and what budgets are worth, by numbers that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import (
    EVEN,
    PUBLISHED,
    DiskCost,
    HitCurve,
    Machine,
    Need,
    RoutingSummary,
    expected,
    most_like,
)

NEED = Need(dense_bytes=100, expert_bytes=10, active=20, experts=100)
HERE = Machine(bandwidth=50, memory=300, free=10**9)


def test_a_disk_survives_json_and_says_its_rate() -> None:
    disk = DiskCost(
        reads={4: LinkCost(0, 5 * 10**5), 1: LinkCost(500, 10**6)}, sequential_fs_per_byte=9, expert_bytes=1000
    )
    assert list(disk.reads) == [1, 4] and disk.best == 4
    assert disk.time_ns(1, 4) == 500 and disk.bytes_per_s == pytest.approx(2e9)
    assert DiskCost.from_dict(json.loads(json.dumps(asdict(disk)))) == disk


def test_without_locality_the_share_is_hit() -> None:
    assert [EVEN.at(share) for share in (0, 0.25, 1)] == [0, 0.25, 1]


def test_a_curve_is_straight_between_its_points_and_ends_with_all() -> None:
    curve = HitCurve(shares=[0.5, 0.25], hits=[0.8, 0.6])
    assert [curve.at(share) for share in (0, 0.125, 0.25, 0.375, 0.5, 0.75, 1)] == pytest.approx(
        [0, 0.3, 0.6, 0.7, 0.8, 0.9, 1]
    )
    assert HitCurve(shares=[0.5], hits=[0.1]).at(0.5) == 0.5  # worse than no locality there is not


@given(st.integers(1, 16), st.integers(1, 64), st.floats(0, 1), st.floats(0, 1))
def test_published_curves_only_rise(top_k: int, times: int, a: float, b: float) -> None:
    for model in PUBLISHED:
        curve = model.curve(top_k, top_k * times)
        low, high = sorted((a, b))
        assert low <= curve.at(low) <= curve.at(high) <= 1


def test_a_model_is_like_the_one_with_as_many_experts_per_active_one() -> None:
    for top_k, experts, name in (
        (8, 128, "Qwen3-30B-A3B"),
        (4, 32, "OLMoE"),
        (2, 8, "Mixtral-8x7B"),
        (8, 256, "Qwen3-30B-A3B"),
    ):
        assert most_like(top_k, experts).name == name
    qwen = most_like(8, 128)
    assert qwen.curve(8, 128).at(2 / 16) == pytest.approx(0.65)
    assert qwen.curve(4, 64).at(3 / 16) == pytest.approx(0.75)  # of its own active experts
    assert qwen.curve(1, 2).shares == [0.5]  # three times as many are more than there are


def test_recorded_routing_by_policy() -> None:
    summary = RoutingSummary(tokens=9, active=20, shares=(0.25,), default=(8,), lru=(10,), least=(5,))
    assert summary.curve("default").at(0.25) == 0.6 == summary.curve("predicted").at(0.25)
    assert summary.curve("lru").at(0.25) == 0.5
    assert RoutingSummary.from_dict(json.loads(json.dumps(asdict(summary)))) == summary


def test_a_budget_is_worth_a_range() -> None:
    """Computing takes (100 + 20 * 10) / 300 = 1 s, a missed expert 10 / 50 = 0.2 s."""
    curve = HitCurve(shares=[0.25], hits=[0.9])
    found = expected(NEED, HERE, 25, curve)
    assert found.hits == (0.25, 0.9) and found.slots == 25
    assert found.tokens_per_s == (pytest.approx(1 / (15 * 0.2 + 1)), pytest.approx(1))  # 2 misses hide behind it
    assert expected(NEED, HERE, 25, HitCurve(shares=[0.25], hits=[0.5])).tokens_per_s[1] == pytest.approx(1 / 2)
    everything = expected(NEED, HERE, 100, curve)
    assert everything.hits == (1, 1) and everything.tokens_per_s == (1, 1)


def test_stored_bytes_are_read_and_measured_times_count() -> None:
    need = Need(dense_bytes=300, expert_bytes=10, active=20, experts=100, stored_bytes=5, experts_s=0.5)
    assert need.compute_s(HERE) == 1.5 and need.read_s(HERE, 4) == 0.4
