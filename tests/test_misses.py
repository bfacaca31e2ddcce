"""Who computes missing experts, against all subsets of them; and when the next layer's are copied ahead."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.scheduler.cost import ExpertCost, LinkCost
from moeyard.scheduler.misses import EXACT, MissCosts, choose_ways, streams

NS = st.integers(0, 50)
EXPERT = st.builds(ExpertCost, NS, NS, st.integers(0, 8000))
COSTS = st.builds(
    MissCosts,
    expert_bytes=st.just(1),
    copy=st.builds(LinkCost, NS, st.integers(0, 50_000_000)),
    device=EXPERT,
    host=EXPERT,
    both_ns=st.integers(0, 40),
)
ROWS = st.lists(st.integers(1, 30), max_size=EXACT)
FEW = st.lists(st.integers(1, 30), max_size=3)
REAL = MissCosts(  # of the size of Qwen3-30B-A3B's on a PCIe 4 desktop
    expert_bytes=9_437_184,
    copy=LinkCost(20_000, 40_000),
    device=ExpertCost(8_000, 10_000, 60_000),
    host=ExpertCost(20_000, 160_000, 9_000_000),
    both_ns=150_000,
)


def timeline(costs, copied, on_cpu, busy_ns):
    """A layer event by event: when each copy has come, when the device and the CPU are done."""
    ready = list(itertools.accumulate([costs.copy.alpha_ns, *[costs.copy_ns] * len(copied)]))[1:]
    device = busy_ns
    for at, rows in zip(ready, copied, strict=True):
        begin = device if device > at else at
        device = (
            begin + costs.device.base_ns + max(costs.device.per_expert_ns, -(-rows * costs.device.ps_per_row // 1000))
        )
    cpu = 0
    if on_cpu:
        cpu = costs.host.base_ns
        for rows in on_cpu:
            cpu += max(costs.host.per_expert_ns, -(-rows * costs.host.ps_per_row // 1000))
    memory = costs.both_ns * (len(copied) + len(on_cpu)) if copied and on_cpu else 0
    return max(device, cpu, memory)


def best_of_all(costs, rows, busy_ns, copied):
    """The least (time, experts on the CPU) of all subsets."""
    found = []
    for subset in itertools.product((False, True), repeat=len(rows)):
        over = sorted((r for r, cpu in zip(rows, subset, strict=True) if not cpu), reverse=True)
        cpu = [r for r, cpu in zip(rows, subset, strict=True) if cpu]
        found.append((timeline(costs, [*copied, *over], cpu, busy_ns), len(cpu)))
    return min(found)


@settings(deadline=None, max_examples=150)
@given(costs=COSTS, rows=ROWS, busy_ns=st.integers(0, 300), copied=FEW)
def test_no_subset_is_better(costs, rows, busy_ns, copied):
    ways = choose_ways(costs, rows, busy_ns=busy_ns, copied=copied)
    assert sorted((*ways.copied, *ways.on_cpu)) == list(range(len(rows)))
    chosen = [*copied, *(rows[m] for m in ways.copied)], [rows[m] for m in ways.on_cpu]
    assert ways.time_ns == costs.time_ns(*chosen, busy_ns) == timeline(costs, *chosen, busy_ns)
    assert (ways.time_ns, len(ways.on_cpu)) == best_of_all(costs, rows, busy_ns, copied)


@settings(deadline=None, max_examples=100)
@given(costs=COSTS, rows=st.lists(st.integers(1, 30), max_size=4), on_cpu=FEW, busy_ns=st.integers(0, 300))
def test_no_order_of_copies_is_better(costs, rows, on_cpu, busy_ns):
    ours = costs.time_ns(sorted(rows, reverse=True), on_cpu, busy_ns)
    assert ours == min(costs.time_ns(order, on_cpu, busy_ns) for order in itertools.permutations(rows))


@settings(deadline=None, max_examples=100)
@given(costs=COSTS, rows=st.lists(st.integers(1, 30), min_size=EXACT + 1, max_size=40), busy_ns=st.integers(0, 500))
def test_many_misses_are_split_best_where_the_device_takes_equally_long_for_each(costs, rows, busy_ns):
    costs = replace(costs, device=replace(costs.device, ps_per_row=0))
    ways = choose_ways(costs, rows, busy_ns=busy_ns)
    rows = sorted(rows, reverse=True)
    times = [(timeline(costs, rows[:n], rows[n:], busy_ns), len(rows) - n) for n in range(len(rows) + 1)]
    assert (ways.time_ns, len(ways.on_cpu)) == min(times)


@settings(deadline=None, max_examples=100)
@given(costs=COSTS, rows=ROWS, busy_ns=st.integers(0, 300), copied=FEW, more=st.integers(1, 30))
def test_more_to_do_takes_no_less_time(costs, rows, busy_ns, copied, more):
    def time_ns(costs=costs, rows=rows, busy_ns=busy_ns, copied=copied):
        return choose_ways(costs, rows, busy_ns=busy_ns, copied=copied).time_ns

    before = time_ns()
    assert time_ns(busy_ns=busy_ns + more) >= before
    assert time_ns(copied=[*copied, more]) >= before
    if len(rows) < EXACT:
        assert time_ns(rows=[*rows, more]) >= before
    if rows:
        assert time_ns(rows=[rows[0] + more, *rows[1:]]) >= before
    for name in ("device", "host"):
        slower = replace(getattr(costs, name), per_expert_ns=getattr(costs, name).per_expert_ns + more)
        assert time_ns(costs=replace(costs, **{name: slower})) >= before
    assert time_ns(costs=replace(costs, both_ns=costs.both_ns + more)) >= before


@settings(deadline=None, max_examples=100)
@given(costs=COSTS, count=st.integers(0, 20), rows=st.integers(1, 30), more=st.integers(1, 40))
def test_a_slower_way_gets_no_more_experts(costs, count, rows, more):
    costs = replace(costs, both_ns=0)
    before = len(choose_ways(costs, [rows] * count).on_cpu)
    slow_cpu = replace(costs, host=replace(costs.host, per_expert_ns=costs.host.per_expert_ns + more))
    slow_link = replace(costs, copy=replace(costs.copy, fs_per_byte=costs.copy.fs_per_byte + more * 1_000_000))
    assert len(choose_ways(slow_cpu, [rows] * count).on_cpu) <= before
    assert len(choose_ways(slow_link, [rows] * count).on_cpu) >= before


def test_ties_go_to_copying():
    free = MissCosts(
        expert_bytes=1, copy=LinkCost(0, 0), device=ExpertCost(0, 0, 0), host=ExpertCost(0, 0, 0), both_ns=0
    )
    assert choose_ways(free, [3, 1, 2]).copied == (0, 2, 1)
    # The device is busy for longer than all copies take: the CPU wins nothing, unless it takes work off the device.
    assert choose_ways(REAL, [1] * 4, busy_ns=10**9).copied == ()
    assert choose_ways(replace(REAL, device=ExpertCost(0, 0, 0)), [1] * 4, busy_ns=10**9).on_cpu == ()


@pytest.mark.parametrize(("misses", "on_cpu"), [(1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (8, 5)])
def test_a_desktop_shares_single_tokens_out(misses, on_cpu):
    """One token: the CPU reads an expert in 0.16 ms, the link takes 0.38 ms."""
    assert len(choose_ways(REAL, [1] * misses).on_cpu) == on_cpu


def test_the_device_gets_those_with_many_rows():
    ways = choose_ways(REAL, [1, 200, 1, 300])
    assert ways.copied == (3, 1) and ways.on_cpu == (0, 2)
    assert not choose_ways(REAL, [1000] * 12).on_cpu  # 9 ms of the CPU each


def test_layers_are_streamed_when_a_batch_touches_most_of_them():
    def asked(**changes):
        shape = {"missing": 96, "touched": 120, "experts": 128, "room": 8, "gap_ns": 800_000}
        return streams(REAL, **{**shape, **changes})

    assert asked()
    assert not asked(touched=8, gap_ns=300_000) and not asked(gap_ns=0)  # a copy that is under way would be in the way
    assert not asked(missing=0) and not asked(touched=0)
    assert asked(touched=8, room=2)  # both are there in time: the link was idle
    assert [t for t in range(129) if asked(touched=t)] == list(range(43, 129))  # 2 are done for 1 that is under way
    with pytest.raises(ValueError, match="touched is 129"):
        asked(touched=129)


def test_numbers_that_cannot_be():
    with pytest.raises(ValueError, match="an expert that nobody needs is not missing"):
        choose_ways(REAL, [1, 0])
    with pytest.raises(ValueError, match="expert_bytes is 0"):
        replace(REAL, expert_bytes=0)
    assert MissCosts.from_dict(json.loads(json.dumps(asdict(REAL)))) == REAL
    with pytest.raises(ValueError, match="constants: expected both_ns, copy"):
        MissCosts.from_dict({"copy": {}})
