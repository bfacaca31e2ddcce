"""The compiled half of the priced planner: candidate plans, and what each costs by the model.

Everything numba compiles is in this one module, so that its cache on disk knows when to compile again.
Times are picoseconds where nothing else is said; links are reckoned in nanoseconds. P: ranks, E: experts, N: nodes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BASE, EXPERT, ROW, WIRE, NEAR_ALPHA, NEAR_RATE, FAR_ALPHA, FAR_RATE, HIDDEN, GUEST, PLAN = range(11)
"""Places of `Rates` in an array."""
MOST_PARTS = 11
"""Behind them, in `search`: into how many parts an expert may be cut."""
FS = 1_000_000
PS = 1000
MOST = np.int64(1) << 60

# Columns of a transfer in the making.
T_EXPERT, T_SOURCE, T_DESTINATION, T_PART, T_PARTS, T_ROWS, T_ARRIVAL, T_SEGMENT = range(8)
COLUMNS = 8

SLICES, QUANTUM, LATER, POOLED = range(4)
WAYS = np.array(
    [
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (1, 0, 0, 1),
        (1, 0, 0, 0),
        (1, 1, 0, 1),
        (1, 2, 0, 1),
        (2, 0, 0, 1),
        (1, 0, 2, 1),
        (1, 0, 4, 1),
        (1, 0, 5, 1),
        (2, 0, 3, 1),
        (0, 1, 0, 1),
        (0, 2, 0, 1),
        (2, 1, 0, 1),
        (2, 0, 2, 1),
        (1, 1, 2, 1),
        (1, 0, 1, 1),
        (1, 0, 3, 1),
        (2, 0, 0, 0),
        (0, 3, 0, 1),
    ],
    dtype=np.int64,
)
"""How weights move, in the columns above: whole experts, slices too (1), slices over near and far links together (2);
one transfer brings at most 1/2 ** QUANTUM of the goal (0: no limit); slices only after LATER eighths of it; whether a
node sends away what it has too much of together, so that a rank can give more than it must and then take from others.
"""

LEAST_BUDGET = 350_000
BUDGET_PER_PAIR = 26
"""How long the search looks, in steps that are counted, so that all ranks stop at the same place: for each pair of an
expert and a rank, and at least so many; twice that with several nodes, which have more ways. About 250 steps take a
microsecond.
"""

_PARTS = np.array([2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 63], dtype=np.int64)


@njit(cache=True)
def _copy(values, into):
    """Assigning a slice compiles to a hundred times as much code."""
    for i in range(len(values)):
        into[i] = values[i]


@njit(cache=True)
def _link_ns(expert_bytes, parts, alpha, rate):
    size = -(-expert_bytes // parts)
    return alpha + -(-(size * rate) // FS)


@njit(cache=True)
def _guest_ps(rates, rows, parts, chunks):
    """Work of a guest; as `model.guest_ps`."""
    streaming = -(-(rates[EXPERT] * chunks) // parts)
    computing = -(-(rates[ROW] * rows) // parts)
    return max(streaming, computing, rates[WIRE] * rows) + rates[GUEST] * PS * chunks


@njit(cache=True)
def times(rates, hidden_row, held_rows_P, held_touched_P, transfers, count, chunks, done_P):
    """Fills done_P with each rank's picoseconds after `base`; the same as `model.rank_times`."""
    ranks = len(held_rows_P)
    for p in range(ranks):
        done_P[p] = max(rates[EXPERT] * held_touched_P[p] * chunks, hidden_row * held_rows_P[p])
    order = np.empty(count, dtype=np.int64)  # by arrival; of equal ones as they are sent
    for i in range(count):
        at = i
        while at > 0 and transfers[order[at - 1], T_ARRIVAL] > transfers[i, T_ARRIVAL]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i
    for i in order:
        rows = transfers[i, T_ROWS]
        if rows > 0:
            d = transfers[i, T_DESTINATION]
            arrival = max(np.int64(0), transfers[i, T_ARRIVAL] - rates[HIDDEN]) * PS
            done_P[d] = max(done_P[d], arrival) + _guest_ps(rates, rows, transfers[i, T_PARTS], chunks)


@njit(cache=True)
def worst_ns(rates, held_rows_P, held_touched_P, transfers, count, chunks, done_P):
    """The price without `plan_ns`."""
    times(rates, max(rates[ROW], rates[WIRE]), held_rows_P, held_touched_P, transfers, count, chunks, done_P)
    worst = np.int64(0)
    busy = False
    for p in range(len(done_P)):
        worst = max(worst, -(-done_P[p] // PS))
        busy = busy or held_touched_P[p] > 0
    for i in range(count):
        busy = busy or transfers[i, T_ROWS] > 0
    return worst + (rates[BASE] * chunks if busy else 0)


@njit(cache=True)
def arrive(rates, expert_bytes, node_P, holds_PE, transfers, count):
    """Fills the arrivals in; the same as `model.arrivals`."""
    ranks, experts = holds_PE.shape
    sending = np.zeros(2 * ranks, dtype=np.int64)  # a node has its number + ranks
    receiving = np.zeros(2 * ranks, dtype=np.int64)
    there = np.zeros((ranks, experts), dtype=np.int64)
    for i in range(count):
        e, s, d = transfers[i, T_EXPERT], transfers[i, T_SOURCE], transfers[i, T_DESTINATION]
        parts = transfers[i, T_PARTS]
        if node_P[s] != node_P[d]:
            out, into = ranks + node_P[s], ranks + node_P[d]
            took = _link_ns(expert_bytes, parts, rates[FAR_ALPHA], rates[FAR_RATE])
        else:
            out, into = s, d
            took = _link_ns(expert_bytes, parts, rates[NEAR_ALPHA], rates[NEAR_RATE])
        end = max(sending[out], receiving[into], there[s, e]) + took
        sending[out] = end
        receiving[into] = end
        if parts == 1:
            there[d, e] = end
        transfers[i, T_ARRIVAL] = end


@njit(cache=True)
def chunks_for(rows_P, most_rows_P):
    chunks = np.int64(1)
    for p in range(len(rows_P)):
        chunks = max(chunks, -(-rows_P[p] // most_rows_P[p]))
    return chunks


# Splits over ranks that hold the expert


@njit(cache=True)
def _whole(rates, loads_E, several, holders_EP, count_E, split_EP, rows_P, touched_P, fewest):
    """Each expert with several holders onto one: the one with the `fewest` experts (METRO), or the one that then has
    the least time (TEMPO's seed). Largest first; of equal ones that with fewer rows, then the lower rank.
    """
    row = max(rates[ROW], rates[WIRE])
    for e in several:
        for i in range(count_E[e]):
            p = holders_EP[e, i]
            rows_P[p] -= split_EP[e, p]
            touched_P[p] -= split_EP[e, p] > 0
            split_EP[e, p] = 0
    for e in several:
        best, best_time, best_rows = -1, MOST, MOST
        for i in range(count_E[e]):
            p = holders_EP[e, i]
            time = max(rates[EXPERT] * (touched_P[p] + 1), row * (rows_P[p] + loads_E[e]))
            if fewest:
                time = touched_P[p]
            if time < best_time or (time == best_time and rows_P[p] < best_rows):
                best, best_time, best_rows = p, time, rows_P[p]
        split_EP[e, best] = loads_E[e]
        rows_P[best] += loads_E[e]
        touched_P[best] += 1


@njit(cache=True)
def _pour(loads_E, several, holders_EP, count_E, split_EP, rows_P, touched_P):
    """Each expert with several holders over them like water, again and again until nothing moves: LPLB's linear
    programme, one expert at a time.
    """
    ranks = len(rows_P)
    order = np.empty(ranks, dtype=np.int64)
    for _ in range(32):
        moved = np.int64(0)
        for e in several:
            n = count_E[e]
            for i in range(n):  # in order of their other rows
                p = holders_EP[e, i]
                rows_P[p] -= split_EP[e, p]
                touched_P[p] -= split_EP[e, p] > 0
                at = i
                while at > 0 and rows_P[order[at - 1]] > rows_P[p]:
                    order[at] = order[at - 1]
                    at -= 1
                order[at] = p
            total, wet = loads_E[e], 0
            while wet < n:  # holders under water
                total += rows_P[order[wet]]
                wet += 1
                if wet == n or total <= rows_P[order[wet]] * wet:
                    break
            level, rest = total // wet, total % wet
            for i in range(n):
                p = order[i]
                rows = level - rows_P[p] + (i < rest) if i < wet else np.int64(0)
                moved += abs(rows - split_EP[e, p])
                split_EP[e, p] = rows
                rows_P[p] += rows
                touched_P[p] += rows > 0
        if moved <= 2 * len(several):
            break


@njit(cache=True)
def _refine(rates, several, holders_EP, count_E, split_EP, rows_P, touched_P, rounds):
    """Moves rows off the slowest rank to other holders, as long as that makes it faster (TEMPO's local search)."""
    ranks = len(rows_P)
    row = max(rates[ROW], rates[WIRE])
    for _ in range(rounds):
        slow, slow_time = 0, np.int64(-1)
        for p in range(ranks):
            time = max(rates[EXPERT] * touched_P[p], row * rows_P[p])
            if time > slow_time:
                slow, slow_time = p, time
        best_time, best_e, best_p, best_rows = slow_time, -1, -1, np.int64(0)
        for e in several:
            have = split_EP[e, slow]
            if have == 0:
                continue
            for i in range(count_E[e]):
                p = holders_EP[e, i]
                if p == slow:
                    continue
                new = split_EP[e, p] == 0
                half = (rows_P[slow] - rows_P[p]) // 2
                for rows in (have, min(have, half)):
                    if rows <= 0:
                        continue
                    left = max(rates[EXPERT] * (touched_P[slow] - (rows == have)), row * (rows_P[slow] - rows))
                    there = max(rates[EXPERT] * (touched_P[p] + new), row * (rows_P[p] + rows))
                    if max(left, there) < best_time:
                        best_time, best_e, best_p, best_rows = max(left, there), e, p, rows
        if best_e < 0:
            return
        new = split_EP[best_e, best_p] == 0
        gone = split_EP[best_e, slow] == best_rows
        split_EP[best_e, slow] -= best_rows
        split_EP[best_e, best_p] += best_rows
        rows_P[slow] -= best_rows
        rows_P[best_p] += best_rows
        touched_P[slow] -= gone
        touched_P[best_p] += new


# Weights that move


@njit(cache=True)
def _takers(
    goal,
    expert,
    node_P,
    node,
    far,
    start,
    holds_PE,
    has_PE,
    stamp,
    done_P,
    room_P,
    excess_P,
    drop_P,
    receiving,
    order,
    ready,
):
    """Fills `order` with the ranks of this node, or of others if `far`, that can take an expert: free ones first."""
    ranks = len(node_P)
    n = 0
    for d in range(ranks):
        if (node_P[d] == node) == (far == 1) or has_PE[d, expert] == stamp or holds_PE[d, expert]:
            continue
        if done_P[d] >= goal or room_P[d] <= 0 or excess_P[d] > 0 or drop_P[d] > 0:
            continue
        when = max(done_P[d], max(start, receiving[ranks + node_P[d] if far else d]) * PS)
        i = n
        while i > 0 and ready[i - 1] > when:
            ready[i] = ready[i - 1]
            order[i] = order[i - 1]
            i -= 1
        ready[i] = when
        order[i] = d
        n += 1
    return n


@njit(cache=True)
def _anyone(goal, start, far, p, node_P, done_P, room_P, excess_P, drop_P, receiving, rates, expert_bytes, slices):
    """Whether a link of rank p can bring any expert, whole or in parts, to anyone in time for the goal."""
    parts = _PARTS[-1] if slices else 1
    took = _link_ns(expert_bytes, parts, rates[NEAR_ALPHA + 2 * far], rates[NEAR_RATE + 2 * far])
    if slices == 2:
        took = min(took, _link_ns(expert_bytes, parts, rates[FAR_ALPHA - 2 * far], rates[FAR_RATE - 2 * far]))
    work = max(np.int64(1), rates[GUEST] * PS + rates[EXPERT] // parts)
    for d in range(len(node_P)):
        if slices != 2 and (node_P[d] == node_P[p]) == (far == 1):
            continue
        if d == p or excess_P[d] > 0 or drop_P[d] > 0 or room_P[d] < -(-expert_bytes // parts):
            continue
        begin = start if slices == 2 else max(start, receiving[len(node_P) + node_P[d] if far else d])
        if max(done_P[d], max(np.int64(0), begin + took - rates[HIDDEN]) * PS) + work < goal:
            return True
    return False


@njit(cache=True)
def _attempt(
    goal,
    quantum,
    slices,
    later,
    pooled,
    rates,
    expert_bytes,
    node_P,
    nodes,
    holds_PE,
    room_P,
    most_rows_P,
    segment_expert,
    segment_rank,
    segment_rows,
    first_P,
    same_S,
    base_rows_P,
    base_touched_P,
    # results
    left,
    rows_P,
    touched_P,
    transfers,
    has_PE,
    stamp,
    spent,
):
    """Brings every rank to `goal` if it can: ranks above it give rows away, link by link in the order of time.

    Returns the number of transfers; `left` are the rows that stay in each segment.
    """
    ranks = len(node_P)
    row = max(rates[ROW], rates[WIRE])
    near_ns = _link_ns(expert_bytes, 1, rates[NEAR_ALPHA], rates[NEAR_RATE])
    far_ns = _link_ns(expert_bytes, 1, rates[FAR_ALPHA], rates[FAR_RATE])
    guest = rates[GUEST] * PS
    hidden = rates[HIDDEN]
    done_P = np.empty(ranks, dtype=np.int64)
    incoming_P = np.zeros(ranks, dtype=np.int64)  # received rows
    room = room_P.copy()
    sending = np.zeros(2 * ranks, dtype=np.int64)
    receiving = np.zeros(2 * ranks, dtype=np.int64)
    excess_P = np.zeros(ranks, dtype=np.int64)  # rows that a rank wants to lose
    drop_P = np.zeros(ranks, dtype=np.int64)  # experts
    _copy(segment_rows, left)
    _copy(base_rows_P, rows_P)
    _copy(base_touched_P, touched_P)
    closed = np.zeros(len(left), dtype=np.int64)  # bit 1: no more by near links, 2: nor by far ones
    grouped = np.zeros(holds_PE.shape[1], dtype=np.bool_)
    limit = ranks + len(transfers)
    offer_rank = np.empty(limit, dtype=np.int64)
    offer_segment = np.empty(limit, dtype=np.int64)
    offer_from = np.empty(limit, dtype=np.int64)
    offer_open = np.empty(limit, dtype=np.int64)
    offers = 0
    for p in range(ranks):
        done_P[p] = max(rates[EXPERT] * touched_P[p], row * rows_P[p])
        excess_P[p] = max(-(-max(np.int64(0), row * rows_P[p] - goal) // row) if row else 0, rows_P[p] - most_rows_P[p])
        if rates[EXPERT]:
            drop_P[p] = -(-max(np.int64(0), rates[EXPERT] * touched_P[p] - goal) // rates[EXPERT])
    need_N = np.zeros(nodes, dtype=np.int64)  # work that must leave the node
    for p in range(ranks):
        if pooled:
            need_N[node_P[p]] += done_P[p] - goal
    for p in range(ranks):
        if excess_P[p] > 0 or drop_P[p] > 0:
            at = offers
            while at > 0 and done_P[offer_rank[at - 1]] < done_P[p]:
                offer_rank[at] = offer_rank[at - 1]
                at -= 1
            offer_rank[at] = p
            offers += 1
    for i in range(offers):
        offer_segment[i] = -1
        offer_from[i] = 0
        offer_open[i] = 3 if nodes > 1 else 1
    origins = offers
    for i in range(origins):  # other holders can send too
        p = offer_rank[i]
        for s in range(first_P[p], first_P[p + 1]):
            e = segment_expert[s]
            for q in range(ranks):
                if q != p and holds_PE[q, e] and offers < limit:
                    offer_rank[offers] = q
                    offer_segment[offers] = s
                    offer_from[offers] = 0
                    offer_open[offers] = 3 if nodes > 1 else 1
                    offers += 1
    order = np.empty(ranks, dtype=np.int64)
    ready = np.empty(ranks, dtype=np.int64)
    chosen = np.empty(ranks, dtype=np.int64)
    chosen_far = np.empty(ranks, dtype=np.int64)
    trial = np.empty(ranks, dtype=np.int64)
    trial_far = np.empty(ranks, dtype=np.int64)
    order2 = np.empty(ranks, dtype=np.int64)
    asked = 0
    asked_N = np.zeros(nodes, dtype=np.int64)
    count = 0
    forced_node = -1
    forced = -1  # a segment whose expert came from another node and is spread in its own at once
    while count < len(transfers):
        spent[0] += offers + 2 * ranks
        # The link that is free first.
        start, at, far = MOST, -1, 0
        for i in range(offers):
            if offer_open[i] == 0:
                continue
            p, s = offer_rank[i], offer_segment[i]
            if s >= 0:
                q = segment_rank[s]
                if left[s] == 0 or (
                    excess_P[q] <= 0 and drop_P[q] <= 0 and (need_N[node_P[q]] < row or node_P[p] == node_P[q])
                ):
                    offer_open[i] = 0
                    continue
            if s < 0 and excess_P[p] <= 0 and drop_P[p] <= 0:
                offer_open[i] = 0
                continue
            if offer_open[i] & 1:
                t = max(offer_from[i], sending[p])
                if t < start or (
                    pooled and t == start and far == 0 and i < origins
                ):  # those that are last to send far ones
                    start, at, far = t, i, 0
            if offer_open[i] & 2:
                t = max(offer_from[i], sending[ranks + node_P[p]])
                if t < start:
                    start, at, far = t, i, 1
        spreading = False
        if forced >= 0:
            begin = MOST
            for i in range(origins, offers):
                if offer_segment[i] == forced and offer_open[i] & 1 and node_P[offer_rank[i]] == forced_node:
                    t = max(offer_from[i], sending[offer_rank[i]])
                    if t < begin:
                        begin, at, far = t, i, 0
            if begin < MOST:
                start = begin
                spreading = True
            forced = -1
        if at < 0 or start * PS >= goal:
            break
        p, s = offer_rank[at], offer_segment[at]
        bit = 2 if far else 1
        if s < 0:  # its largest expert; the smallest when only experts must go
            for i in range(first_P[p], first_P[p + 1]):
                if left[i] == 0 or closed[i] & bit:
                    continue
                if s < 0 or (left[i] > left[s] if excess_P[p] > 0 else left[i] < left[s]):
                    s = i
            if s < 0:
                offer_open[at] &= ~bit
                continue
        origin, e = segment_rank[s], segment_expert[s]
        wanted = excess_P[origin]
        if pooled and row and (far or node_P[p] != node_P[origin]):
            # More than the rank must lose: others of its node then have a place near by.
            wanted = max(wanted, need_N[node_P[origin]] // row)
        must_all = wanted <= 0
        most = left[s] if must_all else min(left[s], wanted)
        n = _takers(
            goal,
            e,
            node_P,
            node_P[p],
            far,
            start,
            holds_PE,
            has_PE,
            stamp,
            done_P,
            room,
            excess_P,
            drop_P,
            receiving,
            order,
            ready,
        )
        best_score, best_parts, best_rows, best_d, best_spare = np.int64(0), 0, np.int64(0), -1, np.int64(0)
        # The whole expert to one of them.
        whole_ns = far_ns if far else near_ns
        tried = 0
        asked += 1
        for i in range(n):
            d = order[i]
            if room[d] < expert_bytes:
                continue
            link = ranks + node_P[d] if far else d
            end = max(start, receiving[link]) + whole_ns
            slack = goal - max(done_P[d], max(np.int64(0), end - hidden) * PS) - guest
            if slack < rates[EXPERT]:
                continue
            rows = min(most, slack // row if row else most, most_rows_P[d] - rows_P[d] - incoming_P[d])
            if rows <= 0 or (must_all and rows < most):
                continue
            if not must_all and rows * row > quantum:
                rows = max(np.int64(1), quantum // row)
            worth = rows * row
            spare = worth
            if far:  # it can pass it on inside its node, of which the first one is enough to look at
                if asked_N[node_P[d]] == asked:
                    continue
                asked_N[node_P[d]] = asked
                after = end + near_ns // 4
                for j in range(ranks):
                    if j != d and node_P[j] == node_P[d] and holds_PE[j, e] == 0 and has_PE[j, e] != stamp:
                        worth += max(np.int64(0), goal - max(done_P[j], after * PS))
                spare = worth
                worth = min(worth, most * row)
            score = worth * 1024 // max(np.int64(1), end - start) + 1
            if score > best_score or (score == best_score and spare > best_spare):
                best_score, best_parts, best_rows, best_d, best_spare = score, 1, rows, d, spare
            tried += 1
            if tried == 3 and not far:
                break
        if slices and not grouped[e] and not must_all and start * PS >= later:
            start2 = max(start, sending[p if far else ranks + node_P[p]])
            n2 = 0
            if (
                nodes > 1 and not spreading and slices == 2
            ):  # who is on the other side: parts go over both kinds of links
                n2 = _takers(
                    goal,
                    e,
                    node_P,
                    node_P[p],
                    1 - far,
                    start2,
                    holds_PE,
                    has_PE,
                    stamp,
                    done_P,
                    room,
                    excess_P,
                    drop_P,
                    receiving,
                    order2,
                    ready,
                )
            for parts in _PARTS:
                if parts > n + n2 or parts > rates[MOST_PARTS]:
                    break
                spent[0] += parts
                size = -(-expert_bytes // parts)
                took = _link_ns(expert_bytes, parts, rates[NEAR_ALPHA + 2 * far], rates[NEAR_RATE + 2 * far])
                took2 = _link_ns(expert_bytes, parts, rates[FAR_ALPHA - 2 * far], rates[FAR_RATE - 2 * far])
                end, end2, last = start, start2, start
                i1, i2 = 0, 0
                spare = quantum
                rows = most
                for i in range(parts):
                    arrive1, arrive2 = MOST, MOST
                    if i1 < n:
                        d = order[i1]
                        arrive1 = max(end, receiving[ranks + node_P[d] if far else d]) + took
                    if i2 < n2:
                        d = order2[i2]
                        arrive2 = max(end2, receiving[d if far else ranks + node_P[d]]) + took2
                    if arrive1 <= arrive2:
                        d = order[i1]
                        i1 += 1
                        end = arrive1
                        last = max(last, end)
                        when = end
                        trial_far[i] = far
                    else:
                        d = order2[i2]
                        i2 += 1
                        end2 = arrive2
                        last = max(last, end2)
                        when = end2
                        trial_far[i] = 1 - far
                    trial[i] = d
                    if room[d] < size:
                        spare = np.int64(0)
                        break
                    spare = min(spare, goal - max(done_P[d], max(np.int64(0), when - hidden) * PS) - guest)
                    rows = min(rows, most_rows_P[d] - rows_P[d] - incoming_P[d])
                    if spare <= 0:
                        break
                if spare <= -(-rates[EXPERT] // parts):
                    continue
                if rates[ROW]:
                    rows = min(rows, spare * parts // rates[ROW])
                if rates[WIRE]:
                    rows = min(rows, spare // rates[WIRE])
                if rows <= 0:
                    continue
                score = rows * row * 1024 // max(np.int64(1), last - start) + 1
                if score > best_score:
                    best_score, best_parts, best_rows = score, parts, rows
                    for i in range(parts):
                        chosen[i] = trial[i]
                        chosen_far[i] = trial_far[i]
        if at >= origins and not far and best_parts and node_P[p] != node_P[origin]:
            forced, forced_node = s, node_P[p]
        if best_parts == 0 or count + best_parts > len(transfers):
            nobody = best_parts == 0 and not _anyone(
                goal, start, far, p, node_P, done_P, room, excess_P, drop_P, receiving, rates, expert_bytes, slices
            )
            if nobody or offer_segment[at] >= 0:
                offer_open[at] &= ~bit
            else:
                closed[s] |= bit
            continue
        if best_parts == 1:
            chosen[0] = best_d
            chosen_far[0] = far
        else:
            grouped[e] = True
        for i in range(best_parts):
            d, by_far = chosen[i], chosen_far[i]
            out = ranks + node_P[p] if by_far else p
            into = ranks + node_P[d] if by_far else d
            begin = max(sending[out], receiving[into], offer_from[at])
            end = begin + _link_ns(
                expert_bytes, best_parts, rates[NEAR_ALPHA + 2 * by_far], rates[NEAR_RATE + 2 * by_far]
            )
            sending[out] = end
            receiving[into] = end
            room[d] -= -(-expert_bytes // best_parts)
            has_PE[d, e] = stamp
            incoming_P[d] += best_rows
            done_P[d] = max(done_P[d], max(np.int64(0), end - hidden) * PS) + _guest_ps(rates, best_rows, best_parts, 1)
            transfers[count, T_EXPERT] = e
            transfers[count, T_SOURCE] = p
            transfers[count, T_DESTINATION] = d
            transfers[count, T_PART] = i if best_parts > 1 else 0
            transfers[count, T_PARTS] = best_parts
            transfers[count, T_ROWS] = best_rows
            transfers[count, T_ARRIVAL] = end
            transfers[count, T_SEGMENT] = s
            count += 1
            if best_parts == 1 and offers < limit:
                offer_rank[offers] = d
                offer_segment[offers] = s
                offer_from[offers] = end
                offer_open[offers] = 3 if nodes > 1 else 1
                if far:
                    forced, forced_node = s, node_P[d]
                offers += 1
        left[s] -= best_rows
        rows_P[origin] -= best_rows
        over = excess_P[origin] > 0
        excess_P[origin] -= best_rows
        if left[s] == 0:
            touched_P[origin] -= 1
            drop_P[origin] -= 1
        done_P[origin] = max(rates[EXPERT] * touched_P[origin], row * rows_P[origin])
        if chosen_far[0] or node_P[p] != node_P[origin]:
            need_N[node_P[origin]] -= best_rows * row
        other = same_S[s] if best_parts == 1 and row else s
        while other != s:  # what has come is of use for the expert's other holders too
            d, q = chosen[0], segment_rank[other]
            rows = min(left[other], excess_P[q], (goal - done_P[d]) // row)
            rows = min(rows, most_rows_P[d] - rows_P[d] - incoming_P[d], quantum // row - transfers[count - 1, T_ROWS])
            if rows > 0:
                left[other] -= rows
                rows_P[q] -= rows
                excess_P[q] -= rows
                if left[other] == 0:
                    touched_P[q] -= 1
                    drop_P[q] -= 1
                done_P[q] = max(rates[EXPERT] * touched_P[q], row * rows_P[q])
                if node_P[q] != node_P[d]:
                    need_N[node_P[q]] -= rows * row
                transfers[count - 1, T_ROWS] += rows
                incoming_P[d] += rows
                done_P[d] += rows * row
            other = same_S[other]
        if over and excess_P[origin] < 0:  # it can take from others now
            for i in range(len(left)):
                if node_P[segment_rank[i]] == node_P[origin]:
                    closed[i] &= ~1
            for i in range(origins):
                if node_P[offer_rank[i]] == node_P[origin]:
                    offer_open[i] |= 1
    return count


@njit(cache=True)
def _by_transfers(
    split_EP,
    rows_P,
    touched_P,
    rates,
    expert_bytes,
    node_P,
    nodes,
    holds_PE,
    room_P,
    most_rows_P,
    mean,
    best_ns,
    budget,
    spent,
    # results, where something better than best_ns is found
    best_split_EP,
    best_transfers,
):
    """Weights that move, from one split of the rows over the ranks that hold the experts: for each of WAYS, bisection
    on a goal for the slowest rank (UltraEP's idea, with time for tokens), from the mean of all work up for the first
    way, from what is best so far down for the others.

    Returns the best price (without `plan_ns`), its number of transfers and chunks; no more attempts begin when
    `spent` has come to `budget`.
    """
    experts, ranks = split_EP.shape
    size = 0  # segments, by rank
    for e in range(experts):
        for p in range(ranks):
            size += split_EP[e, p] > 0
    segment_expert = np.empty(size, dtype=np.int64)
    segment_rank = np.empty(size, dtype=np.int64)
    segment_rows = np.empty(size, dtype=np.int64)
    first_P = np.zeros(ranks + 1, dtype=np.int64)
    end = 0
    for p in range(ranks):
        for e in range(experts):
            if split_EP[e, p] > 0:
                segment_expert[end] = e
                segment_rank[end] = p
                segment_rows[end] = split_EP[e, p]
                end += 1
        first_P[p + 1] = end
    same_S = np.arange(size)  # round the segments of an expert
    last_E = np.full(experts, -1)
    for i in range(size):
        e = segment_expert[i]
        if last_E[e] >= 0:
            same_S[i] = same_S[last_E[e]]
            same_S[last_E[e]] = i
        last_E[e] = i
    left = np.empty(size, dtype=np.int64)
    best_left = segment_rows.copy()
    trial_rows, trial_touched = np.empty(ranks, dtype=np.int64), np.empty(ranks, dtype=np.int64)
    received = np.empty(ranks, dtype=np.int64)
    done_P = np.empty(ranks, dtype=np.int64)
    transfers = np.zeros((len(best_transfers), COLUMNS), dtype=np.int64)
    has_PE = np.zeros((ranks, experts), dtype=np.int32)
    stamp = np.int64(0)
    best_count, chunks = np.int64(-1), np.int64(1)
    for way in range(len(WAYS)):
        if nodes == 1 and (WAYS[way, SLICES] == 2 or way == 1 or way == 3):
            continue  # the same as another
        low, high = mean, (best_ns - rates[BASE]) * PS
        for step in range(14):
            if high - low <= high // (200 if way else 500) or spent[0] >= budget:
                break
            if way and step == 0:
                goal = max(mean + mean // 250, high - high // 50)  # one look whether this way is better at all
            elif step < 2:
                goal = mean + mean // (250 if step == 0 else 80)
                if goal >= high:
                    continue
            else:
                goal = low + (high - low) // (8 if high > 4 * low else 4 if high > 2 * low else 2)
            quantum = goal >> WAYS[way, QUANTUM] if WAYS[way, QUANTUM] else MOST
            later = goal * WAYS[way, LATER] // 8
            stamp += 1
            count = _attempt(
                goal,
                quantum,
                WAYS[way, SLICES],
                later,
                WAYS[way, POOLED],
                rates,
                expert_bytes,
                node_P,
                nodes,
                holds_PE,
                room_P,
                most_rows_P,
                segment_expert,
                segment_rank,
                segment_rows,
                first_P,
                same_S,
                rows_P,
                touched_P,
                left,
                trial_rows,
                trial_touched,
                transfers,
                has_PE,
                stamp,
                spent,
            )
            _copy(trial_rows, received)
            for i in range(count):
                received[transfers[i, T_DESTINATION]] += transfers[i, T_ROWS]
            trial_chunks = chunks_for(received, most_rows_P)
            ns = worst_ns(rates, trial_rows, trial_touched, transfers, count, trial_chunks, done_P)
            if ns < best_ns:
                best_ns, chunks, best_count = ns, trial_chunks, count
                for i in range(count):
                    _copy(transfers[i], best_transfers[i])
                _copy(left, best_left)
            if (ns - rates[BASE]) * PS <= goal + PS:
                high = min(goal, (ns - rates[BASE]) * PS)
            else:
                low = goal
                if way and step == 0:
                    break
    if best_count >= 0:
        for e in range(experts):
            _copy(split_EP[e], best_split_EP[e])
        for s in range(size):
            best_split_EP[segment_expert[s], segment_rank[s]] = best_left[s]
    return best_ns, best_count, chunks


@njit(cache=True)
def search(rows_PE, holds_PE, home_E, node_P, room_P, most_rows_P, rates, expert_bytes):
    """The best plan that is found: how far it went (0 native, 1 other rows, 2 transfers), rows_EP, sliced_E, [n, 5]
    transfers, chunks, its price and the native one.

    First rows over those that hold an expert, by water (LPLB), by fewest experts (METRO) and by least time (TEMPO),
    each refined. Then weights that move: from the best of those, and, where it is not native, from native too.
    """
    ranks, experts = rows_PE.shape
    loads_E = np.zeros(experts, dtype=np.int64)
    for p in range(ranks):
        for e in range(experts):
            loads_E[e] += rows_PE[p, e]
    row = max(rates[ROW], rates[WIRE])
    split_EP = np.zeros((experts, ranks), dtype=np.int64)
    rows_P = np.zeros(ranks, dtype=np.int64)
    touched_P = np.zeros(ranks, dtype=np.int64)
    total = np.int64(0)
    used = np.int64(0)
    several_n = np.int64(0)
    several = np.empty(experts, dtype=np.int64)
    for e in range(experts):
        if loads_E[e] > 0:
            h = home_E[e]
            split_EP[e, h] = loads_E[e]
            rows_P[h] += loads_E[e]
            touched_P[h] += 1
            total += loads_E[e]
            used += 1
            held = 0
            for p in range(ranks):
                held += holds_PE[p, e]
            if held > 1:
                at = several_n
                while at > 0 and loads_E[several[at - 1]] < loads_E[e]:
                    several[at] = several[at - 1]
                    at -= 1
                several[at] = e
                several_n += 1
    several = several[:several_n]
    nodes = np.int64(0)
    for p in range(ranks):
        nodes = max(nodes, node_P[p] + 1)
    done_P = np.empty(ranks, dtype=np.int64)
    transfers = np.zeros((4 * ranks + 64, COLUMNS), dtype=np.int64)
    native_chunks = chunks_for(rows_P, most_rows_P)
    native_ns = worst_ns(rates, rows_P, touched_P, transfers, np.int64(0), native_chunks, done_P)
    best_ns, kind, chunks = native_ns, 0, native_chunks
    best_count = np.int64(0)
    best_transfers = transfers.copy()
    sliced_E = np.zeros(experts, dtype=np.int64)
    if total == 0 or ranks == 1:
        return kind, split_EP, sliced_E, best_transfers[:0, :T_ROWS], chunks, best_ns, native_ns
    best_ns -= rates[PLAN]
    native_EP, native_rows, native_touched = split_EP.copy(), rows_P.copy(), touched_P.copy()
    # Over the ranks that hold it
    if several_n:
        base_rows, base_touched, base_split = rows_P.copy(), touched_P.copy(), split_EP.copy()
        holders_EP = np.empty((experts, ranks), dtype=np.int64)
        count_E = np.zeros(experts, dtype=np.int64)
        for e in several:
            for p in range(ranks):
                if holds_PE[p, e]:
                    holders_EP[e, count_E[e]] = p
                    count_E[e] += 1
        for start in range(4):
            trial_rows, trial_touched, trial_split = rows_P.copy(), touched_P.copy(), native_EP.copy()
            if start == 0:
                _pour(loads_E, several, holders_EP, count_E, trial_split, trial_rows, trial_touched)
            elif start < 3:
                _whole(rates, loads_E, several, holders_EP, count_E, trial_split, trial_rows, trial_touched, start == 2)
            _refine(rates, several, holders_EP, count_E, trial_split, trial_rows, trial_touched, 2 * ranks)
            trial_chunks = chunks_for(trial_rows, most_rows_P)
            ns = worst_ns(rates, trial_rows, trial_touched, transfers, np.int64(0), trial_chunks, done_P)
            if ns < best_ns:
                best_ns, kind, chunks = ns, 1, trial_chunks
                base_rows, base_touched, base_split = trial_rows, trial_touched, trial_split
        rows_P, touched_P, split_EP = base_rows, base_touched, base_split
    mean = -(-max(row * total, rates[EXPERT] * used) // ranks)
    budget = max(LEAST_BUDGET, BUDGET_PER_PAIR * experts * ranks) * (2 if nodes > 1 else 1)
    spent = np.zeros(1, dtype=np.int64)
    moved_EP = split_EP.copy()
    for start in range(1 + kind):
        if start:
            rows_P, touched_P, split_EP = native_rows, native_touched, native_EP
        ns, count, trial_chunks = _by_transfers(
            split_EP, rows_P, touched_P, rates, expert_bytes, node_P, nodes, holds_PE, room_P, most_rows_P,
            mean, best_ns, budget, spent, moved_EP, best_transfers,
        )  # fmt: skip
        if count >= 0:
            best_ns, kind, chunks, best_count = ns, 2, trial_chunks, count
    if kind == 0:
        return kind, native_EP, sliced_E, best_transfers[:0, :T_ROWS], native_chunks, native_ns, native_ns
    for i in range(best_count):
        e, d = best_transfers[i, T_EXPERT], best_transfers[i, T_DESTINATION]
        if best_transfers[i, T_PARTS] == 1:
            moved_EP[e, d] += best_transfers[i, T_ROWS]
        else:
            sliced_E[e] = best_transfers[i, T_ROWS]
    return kind, moved_EP, sliced_E, best_transfers[:best_count, :T_ROWS], chunks, best_ns + rates[PLAN], native_ns
