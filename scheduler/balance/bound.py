"""A time below which no plan can be: the certificate that a plan is good, or how far from it.

The mean of all work is one such time. Another is that of streaming: an expert that cannot have left all its holders is
streamed by one of them. The others are about work that starts in few places: how much of it can be
computed elsewhere by a time T, when weights must go there first over links that carry one transfer at a time, and who
has got an expert can pass it on? P: ranks, E: experts. All in integers, rounded
towards less time. Compiled; `model.bound` is the way in.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .leaving import all_left, leaving_ns, left_by, link_steps
from .streaming import streaming_ns

WEIGHTS = np.array([0, 2, 5, 8])
"""Eighths in which the work of slices is counted where it is done; the rest is counted as the most that a group does.
"""
STEPS = 800
"""Points of time that are looked at; more make the bound sharper."""


@compiled
def _gain(work, left, parts, expert, row, wire, guest):
    """Work of one expert (all of it is `work`) that 1/parts of its columns get done in the time that is left."""
    left -= guest
    if left <= 0 or left * parts < expert:
        return np.int64(0)
    if parts * wire > row:
        left = left * row // (parts * wire) + 1
    return min(left, work // parts + 1)


@compiled
def _spread(
    work, count, step_ns, most_parts, expert_bytes, expert, row, wire, guest, na, nr, fa, fr, most_steps, weight, out
):
    """Fills out[:, n] with the most work that n steps of a link can bring about elsewhere:

    0: of one expert, the near link of a rank that has it; 1: the same, a node's links to other nodes; 2 and 3: the same
    when there is no end of such experts at the sender. A receiver of all of it sends too. Durations are rounded down.
    All parts of an expert compute the same rows, so none has more time than the last one to arrive, `most_steps`.
    What parts do counts `weight` eighths.
    """
    near1 = link_steps(expert_bytes, 1, na, nr, step_ns)
    far1 = link_steps(expert_bytes, 1, fa, fr, step_ns)
    near_k = np.empty(most_parts + 1, dtype=np.int64)
    far_k = np.empty(most_parts + 1, dtype=np.int64)
    for k in range(1, most_parts + 1):
        near_k[k] = link_steps(expert_bytes, k, na, nr, step_ns)
        far_k[k] = link_steps(expert_bytes, k, fa, fr, step_ns)
    out[:, 0] = 0
    for n in range(1, count + 1):
        for i in range(4):
            out[i, n] = out[i, n - 1]
        for k in range(2, most_parts + 1):
            if near_k[k] <= n:
                at = n - near_k[k]
                gain = (
                    _gain(work, min(at, most_steps) * step_ns * 1000, k, expert, row, wire, guest) * weight + 7
                ) // 8
                out[0, n] = max(out[0, n], out[0, at] + gain)
                out[2, n] = max(out[2, n], out[2, at] + gain)
            if far_k[k] <= n:
                at = n - far_k[k]
                gain = (
                    _gain(work, min(at, most_steps) * step_ns * 1000, k, expert, row, wire, guest) * weight + 7
                ) // 8
                out[1, n] = max(out[1, n], out[1, at] + gain)
                out[3, n] = max(out[3, n], out[3, at] + gain)
        if near1 <= n:
            at = n - near1
            value = min(work, _gain(work, at * step_ns * 1000, 1, expert, row, wire, guest) + out[0, at])
            out[0, n] = max(out[0, n], out[0, at] + value)
            out[2, n] = max(out[2, n], out[2, at] + value)
        if far1 <= n:
            at = n - far1
            value = min(work, _gain(work, at * step_ns * 1000, 1, expert, row, wire, guest) + out[0, at] + out[1, at])
            out[1, n] = max(out[1, n], out[1, at] + value)
            out[3, n] = max(out[3, n], out[3, at] + value)
        out[0, n] = min(out[0, n], work)
        out[1, n] = min(out[1, n], work)


@compiled
def _tables(work, count, step_ns, most_parts, expert_bytes, rates, row, most_steps, outs):
    """`_spread` for each of WEIGHTS, and last without what a guest costs besides its rows: what is done of it before a
    time must not be counted as less than it is.
    """
    na, nr, fa, fr = rates[4], rates[5], rates[6], rates[7]
    for i in range(len(WEIGHTS)):
        _spread(
            work, count, step_ns, most_parts, expert_bytes, rates[1], row, rates[3], rates[9] * 1000,
            na, nr, fa, fr, most_steps, WEIGHTS[i], outs[i],
        )  # fmt: skip
    _spread(
        work, count, step_ns, most_parts, expert_bytes, 0, row, rates[3], 0, na, nr, fa, fr, most_steps, 8, outs[-1]
    )


@compiled
def _possible(t, need, inside, helpers, close, near, far, outs, kind, step_ns, hidden, count, left_J, ratio):
    """Whether ranks with `need` work more than they may keep can be done by t ns."""
    need -= inside * t * 1000
    if need <= 0:
        return True
    last = min(count, -(-(t + hidden) // step_ns))
    slices = np.int64(0)
    for left in left_J:
        if left > t + hidden:
            break
        slices += ratio * (t + hidden + 1 - left)
    for i in range(len(WEIGHTS)):  # all that is done elsewhere by then
        away = near * outs[i, kind, last] + far * outs[i, kind + 1, last] + (8 - WEIGHTS[i]) * slices
        if need > away:
            return False
    beside = near * outs[len(WEIGHTS) - 1, kind, last]
    for n in range(last):  # what is done by some earlier time, and all that helpers can do after it
        after = t - max(np.int64(0), n * step_ns - hidden)
        if need > near * outs[-1, kind, n] + far * outs[-1, kind + 1, n] + helpers * after * 1000:
            return False
        beside = min(beside, near * outs[-1, kind, n] + close * after * 1000)
    # What went over near links first, and over no bundle, is done on the other ranks of these nodes.
    return need <= beside + far * outs[len(WEIGHTS) - 1, kind + 1, last]


@compiled
def _least(low, high, need, inside, helpers, close, near, far, outs, kind, step_ns, hidden, count, left_J, ratio):
    """The least time that is possible; `high` if none up to it is."""
    if _possible(low, need, inside, helpers, close, near, far, outs, kind, step_ns, hidden, count, left_J, ratio):
        return low
    while low < high:
        middle = (low + high) // 2
        if _possible(
            middle, need, inside, helpers, close, near, far, outs, kind, step_ns, hidden, count, left_J, ratio
        ):
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def least_ns(loads_E, holds_PE, home_E, node_P, rates, expert_bytes, steps):
    """Nanoseconds after `base`."""
    experts = len(loads_E)
    ranks = len(node_P)
    row = max(rates[2], rates[3])
    total = loads_E.sum()
    touched = (loads_E > 0).sum()
    best = -(-max(row * total, rates[1] * touched) // (ranks * 1000))
    if ranks == 1:
        return best
    nodes = node_P.max() + 1
    native_P = np.zeros(ranks, dtype=np.int64)
    touched_P = np.zeros(ranks, dtype=np.int64)
    for e in range(experts):
        native_P[home_E[e]] += loads_E[e]
        touched_P[home_E[e]] += loads_E[e] > 0
    # A rank's own experts take max(streaming, rows) together, and at least that when some leave: a linear programme's
    # dual with weight on streaming where that is more, on rows elsewhere.
    least = np.int64(0)
    for e in range(experts):
        if loads_E[e] > 0:
            cheapest = np.int64(1) << 60
            for p in range(ranks):
                if holds_PE[p, e]:
                    streams = rates[1] * touched_P[p] > row * native_P[p]
                    cheapest = min(cheapest, rates[1] if streams else row * loads_E[e])
            least += cheapest
    best = max(best, -(-least // (ranks * 1000)))
    order_P = np.argsort(-native_P, kind="mergesort")
    order_E = np.argsort(-loads_E, kind="mergesort")
    ceiling = np.int64(0)
    for p in range(ranks):
        ceiling = max(ceiling, -(-max(row * native_P[p], rates[1] * touched_P[p]) // 1000))
    outs = np.zeros((len(WEIGHTS) + 1, 4, steps + 1), dtype=np.int64)  # the last one: without fixed costs
    # The work that one slice group does per ns, in eighths of ps: rows of a part take at least the wire's time.
    ratio = (125 * (row * 1000 // max(np.int64(1), rates[3]) + 1) + 999) // 1000
    ratio = min(ratio, 125 * (ranks - 1))
    fa, fr = rates[6], rates[7]
    inside_P = np.zeros(ranks, dtype=np.bool_)
    seen_node = np.zeros(nodes, dtype=np.bool_)
    # Work that only ranks of a set have: the busiest one, two, ...; each node
    set_n = ranks - 1 + (nodes if nodes > 1 else 0)
    set_loads = np.zeros((set_n, experts), dtype=np.int64)
    set_count = np.zeros(set_n, dtype=np.int64)
    set_inside = np.zeros(set_n, dtype=np.int64)
    set_near = np.zeros(set_n, dtype=np.int64)
    set_far = np.zeros(set_n, dtype=np.int64)
    set_copies = np.zeros(set_n, dtype=np.int64)
    set_close = np.zeros(set_n, dtype=np.int64)
    for s in range(set_n):
        if s < ranks - 1:
            inside_P[order_P[s]] = True
            seen_node[node_P[order_P[s]]] = True
            set_near[s] = s + 1
            set_far[s] = seen_node.sum() if nodes > 1 else 0
            set_inside[s] = s + 1
            for p in range(ranks):
                set_close[s] += seen_node[node_P[p]] and not inside_P[p]
        else:
            inside_P = node_P == s - (ranks - 1)
            set_far[s] = 1
            set_inside[s] = inside_P.sum()
        for e in order_E:
            if loads_E[e] == 0:
                break
            only = True
            for p in range(ranks):
                if holds_PE[p, e] and not inside_P[p]:
                    only = False
                    break
            if only:
                set_loads[s, set_count[s]] = loads_E[e]
                set_count[s] += 1
                set_copies[s] = max(set_copies[s], holds_PE[:, e].sum())
    bytes_near, bytes_far = expert_bytes * rates[5] // 1_000_000, expert_bytes * fr // 1_000_000
    for s in range(set_n):
        best = leaving_ns(
            best, ceiling, set_loads[s], set_count[s], set_inside[s], set_near[s], set_far[s], set_copies[s] == 1,
            ranks, rates, row, bytes_near, bytes_far,
        )  # fmt: skip
    own = np.empty(experts, dtype=np.int64)
    left_J = np.empty(experts, dtype=np.int64)
    for p in range(ranks):
        own_n = 0
        for e in order_E:
            if loads_E[e] > 0 and holds_PE[p, e] and holds_PE[:, e].sum() == 1:
                own[own_n] = loads_E[e]
                own_n += 1
        bundles = 1 if nodes > 1 else 0
        best = leaving_ns(best, ceiling, own, own_n, 1, 1, bundles, True, ranks, rates, row, bytes_near, bytes_far)
    if rates[1]:
        best = streaming_ns(best, ceiling, loads_E, holds_PE, node_P, rates, row, expert_bytes)
    grow = 4  # the horizon is that many eighths longer than what is certain
    while best < ceiling:
        horizon = min(best + max(np.int64(1), best * grow // 8 if grow else best // 50), ceiling)
        start = best
        step_ns = max(np.int64(1), -(-(horizon + rates[8]) // steps))
        count = -(-(horizon + rates[8]) // step_ns)
        fine = link_steps(expert_bytes, ranks, rates[4], rates[5], step_ns) > 0 and (
            nodes == 1 or link_steps(expert_bytes, ranks, fa, fr, step_ns) > 0
        )
        if not fine:
            return best
        done_work, done_most = np.int64(-1), np.int64(-1)
        for j in range(experts):
            e = order_E[j]
            if loads_E[e] == 0 or (j > 4 and (j & (j - 1)) != 0):
                continue
            work = loads_E[e] * row
            for s in range(-1, set_n):
                if s < 0:  # the expert alone
                    holders = holds_PE[:, e].sum()
                    seen_node[:] = False
                    for p in range(ranks):
                        if holds_PE[p, e]:
                            seen_node[node_P[p]] = True
                    need, inside, near, copies, groups = work, holders, holders, holders, np.int64(1)
                    far = seen_node.sum() if nodes > 1 else 0
                    close = -holders
                    for p in range(ranks):
                        close += seen_node[node_P[p]]
                else:  # the set's experts; those with more rows than this one go away at no cost
                    need, groups = np.int64(0), np.int64(0)
                    for i in range(set_count[s]):
                        if set_loads[s, i] <= loads_E[e]:
                            need += set_loads[s, i] * row
                            groups += 1
                    inside, near, far, copies = set_inside[s], set_near[s], set_far[s], set_copies[s]
                    close = set_close[s]
                if inside == ranks or need <= inside * best * 1000:
                    continue
                first_ns = all_left(bytes_near, bytes_far, rates[4], fa, copies, far)
                most = count - min(count, first_ns // step_ns)
                left_J[:groups] = first_ns
                for i in range(groups if near else 0):  # the groups' experts leave one after the other
                    left = left_by(i + 1, rates, bytes_near, bytes_far, near, far, copies == 1)
                    left_J[i] = max(first_ns, left)
                if work != done_work or most != done_most:
                    _tables(work, count, step_ns, ranks - 1, expert_bytes, rates, row, most, outs)
                    done_work, done_most = work, most
                found = _least(
                    best, horizon, need, inside, ranks - inside, close, near, far, outs, 0 if s < 0 else 2,
                    step_ns, rates[8], count, left_J[:groups], ratio,
                )  # fmt: skip
                best = max(best, found)
        if best < horizon:
            if best - start < max(np.int64(1), best // 100):
                grow = grow // 2 if grow else -1
            if grow < 0:
                break
    return min(best, ceiling)
