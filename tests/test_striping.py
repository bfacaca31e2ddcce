"""Every link of a node gets an equal share of what its transfers bring, in few pieces; over gloo they go that way."""

import doctest
import itertools
from collections import Counter, defaultdict

import world
from balance_problems import problem_of
from hypothesis import given
from hypothesis import strategies as st
from test_balanced_layer import EXPERTS, Steps, cut, move, move_on

from moeyard.scheduler import placement
from moeyard.scheduler.balance import striping
from moeyard.scheduler.balance.plan import Plan, Transfer, native
from moeyard.scheduler.balance.problem import Rates
from moeyard.scheduler.balance.striping import choose, messages, share_out, stripes, time_ns

FAST_NEAR = Rates(1, 1, 1, near_alpha_ns=1, near_fs_per_byte=10, far_alpha_ns=1, far_fs_per_byte=1_000_000)


def test_examples():
    results = doctest.testmod(striping)
    assert not results.failed and results.attempted >= 3


@given(st.data())
def test_links_share_equally_in_few_pieces(data):
    links = data.draw(st.integers(1, 8))
    flows = data.draw(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, links - 1)), max_size=12))
    sizes, owners = [size for size, _ in flows], [owner for _, owner in flows]
    shared = share_out(sizes, owners, links)
    assert [sum(size for _, size in parts) for parts in shared] == sizes
    assert all(size > 0 for parts in shared for _, size in parts)
    assert sum(map(len, shared)) <= len(flows) + links - 1
    loads = Counter()
    for parts in shared:
        for link, size in parts:
            loads[link] += size
    assert max(loads.values(), default=0) <= -(-sum(sizes) // links)
    own = sum(size for parts, owner in zip(shared, owners, strict=True) for link, size in parts if link == owner)
    wanted = [sum(size for size, owner in flows if owner == link) for link in range(links)]
    total = sum(sizes)  # as much as can be goes over its owner's own link
    assert own == sum(min(n, total * (p + 1) // links - total * p // links) for p, n in enumerate(wanted))


@given(st.data())
def test_small_pieces_are_not_cut_off(data):
    links, least = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 1000))
    flows = data.draw(st.lists(st.tuples(st.integers(1, 10**4), st.integers(0, links - 1)), max_size=12))
    sizes, owners = [size for size, _ in flows], [owner for _, owner in flows]
    shared = share_out(sizes, owners, links, least)
    assert [sum(size for _, size in parts) for parts in shared] == sizes
    assert sum(map(len, shared)) <= len(flows) + links - 1
    assert all(size >= min(least, whole) for parts, whole in zip(shared, sizes, strict=True) for _, size in parts)
    for link in range(links):
        load = sum(size for parts in shared for other, size in parts if other == link)
        assert load <= -(-sum(sizes) // links) + links * least


def plans(draw, ranks, experts):
    """Transfers from experts' homes and from ranks that have got them."""
    transfers = []
    for expert in range(experts):
        way = draw(st.lists(st.integers(0, ranks - 1), unique=True, max_size=ranks))
        have = [expert % ranks]
        for p in way:
            if p not in have:
                transfers.append(Transfer(expert, draw(st.sampled_from(have)), p))
                have.append(p)
    return tuple(transfers)


@given(st.data())
def test_messages_bring_every_byte_after_it_came(data):
    nodes, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    ranks, experts = nodes * width, 4
    rates = data.draw(
        st.sampled_from([FAST_NEAR, Rates(1, 1, 1, near_alpha_ns=1, near_fs_per_byte=10**6), Rates(0, 0, 0)])
    )
    problem = problem_of(
        [5] * experts, ranks, ranks_per_node=width, rates=rates, home_E=[e % ranks for e in range(experts)]
    )
    transfers = plans(data.draw, ranks, experts)
    bytes_N = [data.draw(st.integers(1, 10**5)) for _ in transfers]
    sizes = {}  # an expert's is the same everywhere
    bytes_N = [sizes.setdefault(t.expert, n) for t, n in zip(transfers, bytes_N, strict=True)]
    start = native(problem)
    found = messages(problem, Plan("any", start.rows_EP, start.sliced_E, transfers), bytes_N)
    for p in range(ranks):
        mine = [m for m in found if p in (m.sender, m.receiver)]
        assert messages(problem, Plan("any", start.rows_EP, start.sliced_E, transfers), bytes_N, p) == mine
    node_P = problem.node_P.tolist()
    there = {(e % ranks, e): [(0, 10**9)] for e in range(experts)}
    for m in found:
        t = transfers[m.transfer]
        assert (
            m.sender == t.source or node_P[m.sender] in (node_P[t.source], node_P[t.destination])
        ) and m.stop > m.start
        assert covers(there.get((m.sender, t.expert), []), m.start, m.stop), m
        there.setdefault((m.receiver, t.expert), []).append((m.start, m.stop))
    for t, size in zip(transfers, bytes_N, strict=True):
        assert covers(there[t.destination, t.expert], 0, size)
    for i, size in enumerate(bytes_N):
        came = sorted((m.start, m.stop) for m in found if m.transfer == i and m.receiver == transfers[i].destination)
        assert came[0][0] == 0 and came[-1][1] == size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(came))  # each byte once


def covers(pieces, start, stop):
    for low, high in sorted(pieces):
        if low <= start < high:
            start = high
    return start >= stop


@given(st.data())
def test_stripes_share_the_links_of_both_nodes(data):
    widths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    node_P = [node for node, width in enumerate(widths) for _ in range(width)]
    ends = st.tuples(st.integers(0, len(node_P) - 1), st.integers(0, len(node_P) - 1)).filter(lambda it: it[0] != it[1])
    pairs = data.draw(st.lists(ends, max_size=10))
    transfers = [Transfer(i, a, b) for i, (a, b) in enumerate(pairs)]
    bytes_N = [data.draw(st.integers(1, 10**5)) for _ in transfers]
    found = stripes(transfers, bytes_N, node_P)
    far = [i for i, t in enumerate(transfers) if node_P[t.source] != node_P[t.destination]]
    assert len(found) <= len(transfers) + 2 * sum(width - 1 for width in widths)
    for i, t in enumerate(transfers):
        mine = [it for it in found if it.transfer == i]
        assert all((it.ranks[0], it.ranks[-1]) == (t.source, t.destination) for it in mine)
        assert len(mine) == 1 or i in far
        ends = [0, *(it.stop for it in mine)]
        assert [it.start for it in mine] == ends[:-1] and ends[-1] == bytes_N[i]
    sent, received = Counter(), Counter()
    for it in found:
        crossing = [(a, b) for a, b in itertools.pairwise(it.ranks) if node_P[a] != node_P[b]]
        assert len(crossing) == (it.transfer in far)
        for a, b in crossing:
            sent[a] += it.stop - it.start
            received[b] += it.stop - it.start
    for counts, end in ((sent, "source"), (received, "destination")):
        for node, width in enumerate(widths):
            total = sum(bytes_N[i] for i in far if node_P[getattr(transfers[i], end)] == node)
            loads = [counts[p] for p, other in enumerate(node_P) if other == node]
            assert max(loads) <= -(-total // width)


def test_stripes_only_where_they_are_faster():
    one = [Transfer(0, 0, 2)]
    for near, striped in ((10, True), (10**9, False)):
        rates = Rates(1, 1, 1, near_fs_per_byte=near, far_fs_per_byte=10**6)
        problem = problem_of([5] * 4, 4, ranks_per_node=2, rates=rates)
        found = choose(problem, one, [10**6])
        assert (len(found) > 1) == striped
        assert time_ns(problem, found) == (10**6 if striped else 2 * 10**6)
    assert len(choose(problem_of([5] * 4, 4, rates=FAST_NEAR), one, [10**6])) == 1  # one node
    assert len(choose(problem_of([5] * 4, 4, ranks_per_node=1, rates=FAST_NEAR), one, [10**6])) == 1


# Over gloo: four ranks that are told to be two nodes


def striped_layers(group):
    facts = {}
    for name, planner in {"move": move, "relay": move_on, "cut": cut}.items():
        table = placement.linear(EXPERTS, group.size)
        steps = Steps(group, table, slots=4, rates=FAST_NEAR, node_P=[0, 0, 1, 1])
        pairs = Counter()
        send = group.send_weights

        def counting(position, packed, pairs=pairs, send=send):
            pairs[group.position, position] += packed.nbytes
            return send(position, packed)

        group.send_weights = counting
        steps.run(planner)
        del group.send_weights
        problem, plan = steps.problems[-1], steps.plans[-1]
        sizes = [steps.layer.cutter.nbytes(t.part, t.parts) for t in plan.transfers]
        planned, chunks = Counter(), defaultdict(set)
        for m in messages(problem, plan, sizes):
            planned[m.sender, m.receiver] += m.stop - m.start
            chunks[m.transfer].add(m.start)
        facts[name] = (
            steps.wrong,
            dict(pairs),
            dict(planned),
            sum(sizes),
            max(map(len, chunks.values())),
            steps.balancer.figures.late,
        )
    return facts


def test_stripes_take_their_ways_and_results_are_equal():
    results = world.run_world(4, striped_layers)
    for name in results[0]:
        sent, planned = Counter(), results[0][name][2]
        for facts in results:
            wrong, pairs, same, *_, late = facts[name]
            assert not wrong and same == planned and not late, name
            sent.update(pairs)
        assert dict(sent) == planned, name
        far = {pair: n for pair, n in planned.items() if pair[0] // 2 != pair[1] // 2}
        for end in (0, 1):  # expert 0 is rank 0's: its node's links carry the same, and so do those of the other
            loads = Counter()
            for pair, n in far.items():
                loads[pair[end]] += n
            assert len(loads) == 2 and max(loads.values()) - min(loads.values()) <= 1, name
        assert results[0][name][4] > 20, "no chunks"
