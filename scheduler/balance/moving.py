"""Weights that move, compiled: one attempt to bring every rank to a goal.

Ranks above the goal give rows away, link by link in the order of time: whoever's link is free first and has something
to give sends one expert, whole or in column parts, to ranks that can still compute by the goal. Who got an expert whole
may send it on. Picoseconds; links in nanoseconds. P: ranks, E: experts, N: nodes, S: segments (an expert's rows at one
rank that holds it).
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled
from .groups import OVER_ALL, OVER_ONE, PARTS, add_link, best_group
from .moving_state import (
    CHOSEN,
    CHOSEN_LINK,
    CLOSED,
    DONE,
    DROP,
    EXCESS,
    FAR_OPEN,
    LEFT,
    NEAR_OPEN,
    NODE,
    O_FROM,
    O_OPEN,
    O_RANK,
    O_SEGMENT,
    READY,
    RECEIVING,
    RELIEVED,
    ROOM,
    S_EXPERT,
    S_RANK,
    TAKER,
    TRIAL,
    W_FAR,
    W_FROM,
    W_RANK,
    begin,
    mixed,
    offer,
    space,
    starts_at,
)
from .offers import first_link, inside
from .prices import (
    EXPERT,
    EXPERT_BYTES,
    FAR_ALPHA,
    FAR_RATE,
    GUEST,
    MOST_PARTS,
    NEAR_ALPHA,
    NEAR_RATE,
    NODES,
    ONE,
    PS,
    ROW,
    WIRE,
    ZERO,
    link_ns,
)
from .relief import relieve, relieved
from .sending import give, reopen, send, share


@compiled
def _what(aim, first_P, segs_S, at_P, p, bit):
    """A rank's largest segment that somebody may take, the smallest where only experts must go; -1 for none."""
    s = -1
    for i in range(first_P[p], first_P[p + 1]):
        if segs_S[LEFT, i] == 0 or segs_S[CLOSED, i] & bit:
            continue
        if s < 0:
            s = i
        elif at_P[EXCESS, p] > 0:
            s = i if segs_S[LEFT, i] * mixed(aim.seed, i, 5, 300) > segs_S[LEFT, s] * mixed(aim.seed, s, 5, 300) else s
        else:
            s = i if segs_S[LEFT, i] < segs_S[LEFT, s] else s
    return s


@compiled
def _takers(aim, about_P, holds_PE, at_P, links_L, has_PE, pick_P, expert, node, far, start, stamp, n):
    """Adds the ranks of this node, or of others if `far`, that can take an expert to the first n: free ones first."""
    ranks = about_P.shape[1]
    for d in range(ranks):
        if (about_P[NODE, d] == node) == (far == 1) or has_PE[d, expert] == stamp or holds_PE[d, expert]:
            continue
        if at_P[DONE, d] >= aim.goal or at_P[ROOM, d] <= 0 or at_P[EXCESS, d] > 0 or at_P[DROP, d] > 0:
            continue
        if at_P[RELIEVED, d]:
            continue
        when = max(at_P[DONE, d], max(start, links_L[RECEIVING, ranks + about_P[NODE, d] if far else d]) * PS)
        if aim.seed & 1:
            when = when * mixed(aim.seed, d, expert, 200)
        i = n
        while i > 0 and pick_P[READY, i - 1] > when:
            pick_P[READY, i] = pick_P[READY, i - 1]
            pick_P[TAKER, i] = pick_P[TAKER, i - 1]
            i -= 1
        pick_P[READY, i] = when
        pick_P[TAKER, i] = d
        n += 1
    return n


@compiled
def _best_whole(aim, rates, about_P, holds_PE, at_P, links_L, has_PE, pick_P, e, far, start, most, must_all, stamp, n):
    """Which of n takers is best to get the whole expert: (score, rows, rank). The score is work by a link's time."""
    ranks = about_P.shape[1]
    goal = aim.goal
    row = max(rates[ROW], rates[WIRE])
    near_ns = link_ns(rates[EXPERT_BYTES], ONE, rates[NEAR_ALPHA], rates[NEAR_RATE])
    whole_ns = link_ns(rates[EXPERT_BYTES], ONE, rates[NEAR_ALPHA + 2 * far], rates[NEAR_RATE + 2 * far])
    best_score, best_rows, best_d, best_spare = np.int64(0), np.int64(0), -1, np.int64(0)
    tried = 0
    for i in range(n):
        d = pick_P[TAKER, i]
        pick_P[TRIAL, i] = 0  # whether it stands for its node
        if at_P[ROOM, d] < rates[EXPERT_BYTES]:
            continue
        end = max(start, links_L[RECEIVING, ranks + about_P[NODE, d] if far else d]) + whole_ns
        slack = goal - starts_at(rates, at_P, d, end) - rates[GUEST] * PS
        if slack < rates[EXPERT]:
            continue
        rows = min(most, slack // row if row else most, space(about_P, at_P, d))
        if rows <= 0 or (must_all and rows < most):
            continue
        if not must_all and rows * row > aim.quantum:
            rows = max(np.int64(1), aim.quantum // row)
        worth = rows * row
        spare = worth
        if far:  # it can pass it on inside its node, of which the first one is enough to look at
            seen = False
            for j in range(i):
                other = pick_P[TAKER, j]
                seen = seen or (about_P[NODE, other] == about_P[NODE, d] and pick_P[TRIAL, j] == 1)
            if seen:
                continue
            pick_P[TRIAL, i] = 1
            after = end + near_ns // 4
            for j in range(ranks):
                inside = j != d and about_P[NODE, j] == about_P[NODE, d]
                if inside and not holds_PE[j, e] and has_PE[j, e] != stamp:
                    worth += max(np.int64(0), goal - max(at_P[DONE, j], after * PS))
            spare = worth
            worth = min(worth, most * row)
        score = worth * mixed(aim.seed, e, start, 400) // max(np.int64(1), end - start) + 1
        if score > best_score or (score == best_score and spare > best_spare):
            best_score, best_rows, best_d, best_spare = score, rows, d, spare
        tried += 1
        if tried == 3 and not far:
            break
    return best_score, best_rows, best_d


@compiled
def _can_bring(aim, rates, about_P, at_P, links_L, start, far, p):
    """Whether a link of rank p can bring any expert, whole or in parts, to anyone in time for the goal."""
    ranks = about_P.shape[1]
    parts = min(PARTS[-1], rates[MOST_PARTS]) if aim.slices else 1
    both = aim.slices > OVER_ONE
    took = link_ns(rates[EXPERT_BYTES], parts, rates[NEAR_ALPHA + 2 * far], rates[NEAR_RATE + 2 * far])
    if both:
        took = min(took, link_ns(rates[EXPERT_BYTES], parts, rates[FAR_ALPHA - 2 * far], rates[FAR_RATE - 2 * far]))
    work = max(np.int64(1), rates[GUEST] * PS + rates[EXPERT] // parts)
    for d in range(ranks):
        if not both and (about_P[NODE, d] == about_P[NODE, p]) == (far == 1):
            continue
        if d == p or at_P[EXCESS, d] > 0 or at_P[DROP, d] > 0 or at_P[ROOM, d] < -(-rates[EXPERT_BYTES] // parts):
            continue
        begin = start if both else max(start, links_L[RECEIVING, ranks + about_P[NODE, d] if far else d])
        if starts_at(rates, at_P, d, begin + took) + work < aim.goal:
            return True
    return False


@compiled
def _links(aim, rates, about_P, holds_PE, rows_S, links_L, offers_O, ways_W, offers, at, s, far, spreading, start):
    """The links that parts of segment s can use, that of offer `at` first; returns their number."""
    p, e = offers_O[O_RANK, at], rows_S[S_EXPERT, s]
    links = add_link(about_P, links_L, ways_W, ZERO, p, far, start)
    if spreading or aim.slices == OVER_ONE:
        return links
    if rates[NODES] > 1:
        links = add_link(about_P, links_L, ways_W, links, p, 1 - far, start)
    if aim.slices == OVER_ALL:
        for i in range(offers):
            q, t = offers_O[O_RANK, i], offers_O[O_SEGMENT, i]
            has = holds_PE[q, e] if t < 0 else rows_S[S_EXPERT, t] == e
            if has:
                links = add_link(about_P, links_L, ways_W, links, q, ZERO, offers_O[O_FROM, i])
                if rates[NODES] > 1:
                    links = add_link(about_P, links_L, ways_W, links, q, ONE, offers_O[O_FROM, i])
    return links


@compiled
def attempt(aim, layer, segments, state, stamp, spent):
    """Brings every rank to the goal if it can. Returns the number of transfers, -1 where helpers are to be relieved and
    none has anything to lose; LEFT in `state.segs_S` are the rows that stay.

    `stamp` is another number for each attempt with this state; the steps it takes are added to `spent`.
    """
    rates = layer.rates
    about_P = layer.about_P
    rows_S = segments.rows_S
    transfers = state.transfers
    segs_S = state.segs_S
    holds_PE = layer.holds_PE
    first_P = segments.first_P
    links_L = state.links_L
    has_PE = state.has_PE
    at_P = state.at_P
    need_N = state.need_N
    grouped_E = state.grouped_E
    offers_O = state.offers_O
    pick_P = state.pick_P
    ways_W = state.ways_W
    ranks = about_P.shape[1]
    row = max(rates[ROW], rates[WIRE])
    origins, offers = begin(aim, layer, segments, state)
    low, high = 0, offers
    if aim.relief:
        low, high = offers, relieve(aim, rates, about_P, at_P, offers_O, origins, offers)
        spent[0] += aim.relief * aim.depth * origins * ranks
        if low == high:
            return -1
        offers = high
    relieving = aim.relief > 0
    count = 0
    # A segment whose expert came from another node and is spread in its own at once.
    forced, forced_node = np.int64(-1), np.int64(-1)
    while count < len(transfers):
        spent[0] += offers + 2 * ranks
        start, at, far = first_link(
            aim,
            rates,
            about_P,
            rows_S,
            segs_S,
            at_P,
            need_N,
            links_L,
            offers_O,
            origins,
            low,
            high if relieving else offers,
        )
        if relieving and (at < 0 or start * PS >= aim.goal):
            relieved(at_P, offers_O, low, high)
            low, relieving = 0, False
            continue
        spreading = False
        if forced >= 0 and not relieving:
            when, first = inside(about_P, links_L, offers_O, origins, offers, forced, forced_node)
            if first >= 0:
                start, at, far, spreading = when, first, 0, True
            forced = np.int64(-1)
        if at < 0 or start * PS >= aim.goal:
            break
        p, s = offers_O[O_RANK, at], offers_O[O_SEGMENT, at]
        bit = FAR_OPEN if far else NEAR_OPEN
        if s < 0:
            s = _what(aim, first_P, segs_S, at_P, p, bit)
            if s < 0:
                offers_O[O_OPEN, at] &= ~bit
                continue
        origin, e = rows_S[S_RANK, s], rows_S[S_EXPERT, s]
        wanted = at_P[EXCESS, origin]
        if aim.pooled and row and (far or about_P[NODE, p] != about_P[NODE, origin]):
            # More than the rank must lose: others of its node then have a place near by.
            wanted = max(wanted, need_N[about_P[NODE, origin]] // row)
        must_all = wanted <= 0
        most = segs_S[LEFT, s] if must_all else min(segs_S[LEFT, s], wanted)
        n = _takers(aim, about_P, holds_PE, at_P, links_L, has_PE, pick_P, e, about_P[NODE, p], far, start, stamp, ZERO)
        score, rows, best_d = _best_whole(
            aim, rates, about_P, holds_PE, at_P, links_L, has_PE, pick_P, e, far, start, most, must_all, stamp, n
        )
        parts = 1 if best_d >= 0 else 0
        if aim.slices and not grouped_E[e] and not must_all and (relieving or start * PS >= aim.later):
            links = _links(
                aim,
                rates,
                about_P,
                holds_PE,
                rows_S,
                links_L,
                offers_O,
                ways_W,
                offers,
                at,
                s,
                far,
                spreading,
                start,
            )
            if rates[NODES] > 1 and aim.slices > OVER_ONE and not spreading:
                n = _takers(
                    aim, about_P, holds_PE, at_P, links_L, has_PE, pick_P, e, about_P[NODE, p], 1 - far, start, stamp, n
                )
            found, found_rows = best_group(
                aim, rates, about_P, at_P, links_L, pick_P, ways_W, links, start, most, score, n, spent
            )
            if found:
                parts, rows = found, found_rows
        if at >= origins and not far and parts and about_P[NODE, p] != about_P[NODE, origin]:
            forced, forced_node = s, about_P[NODE, p]
        if parts == 0 or count + parts > len(transfers):
            nobody = parts == 0 and not _can_bring(aim, rates, about_P, at_P, links_L, start, far, p)
            if nobody or offers_O[O_SEGMENT, at] >= 0:
                offers_O[O_OPEN, at] &= ~bit
            else:
                segs_S[CLOSED, s] |= bit
            continue
        over = at_P[EXCESS, origin] > 0
        if parts > 1:
            grouped_E[e] = 1
            best_d = pick_P[CHOSEN, 0]
            for i in range(parts):
                j = pick_P[CHOSEN_LINK, i]
                send(
                    rates,
                    about_P,
                    at_P,
                    links_L,
                    has_PE,
                    transfers,
                    count,
                    e,
                    s,
                    ways_W[W_RANK, j],
                    ways_W[W_FAR, j],
                    ways_W[W_FROM, j],
                    pick_P[CHOSEN, i],
                    i,
                    parts,
                    rows,
                    stamp,
                )
                count += 1
            give(rates, about_P, rows_S, segs_S, at_P, need_N, s, rows, best_d)
        else:
            end = send(
                rates,
                about_P,
                at_P,
                links_L,
                has_PE,
                transfers,
                count,
                e,
                s,
                p,
                far,
                offers_O[O_FROM, at],
                best_d,
                ZERO,
                ONE,
                rows,
                stamp,
            )
            count += 1
            if offers < offers_O.shape[1]:
                offer(rates, offers_O, offers, best_d, s, end)
                offers += 1
                if far:
                    forced, forced_node = s, about_P[NODE, best_d]
            give(rates, about_P, rows_S, segs_S, at_P, need_N, s, rows, best_d)
            share(aim, rates, about_P, rows_S, segs_S, at_P, need_N, transfers, s, count - 1)
        if over and at_P[EXCESS, origin] < 0:
            reopen(about_P, rows_S, segs_S, offers_O, origins, about_P[NODE, origin])
    return count
