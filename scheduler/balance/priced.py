"""The priced planner: of all the plans that it looks at, the one whose modelled time is least.

Levers: nothing; rows over the ranks that hold an expert; whole experts for this layer; column slices; ranks that pass
on what they got; tokens in chunks when memory leaves nothing else; shared experts' tokens to ranks that are early.
"""

from __future__ import annotations

import numpy as np

from .filling import filled
from .model import rates_array
from .plan import Plan, Transfer
from .problem import Problem
from .search import search


def plan(problem: Problem) -> Plan:
    """The fastest plan found, by `model.price`; `native` unless another one is faster, `rates.plan_ns` included.

    Never slower than native. Other ties go to the plan that moves nothing, then to the one found first. The arrays are
    int64; the same problem gives the same plan everywhere: all decisions are made in integers and in a fixed order.
    `modelled_ns` and `native_ns` are filled in, `bound_ns` is not: it takes longer than a plan (see `model.bound`).

    Example: two ranks, rank 0 with both experts that have rows; the weights cross a link in 100 us.

    >>> import numpy as np
    >>> from moeyard.scheduler.balance.problem import Problem, Rates
    >>> rates = Rates(base_ns=0, expert_ps=0, row_ps=1_000_000, near_fs_per_byte=1_000_000)
    >>> held = np.array([[1, 1, 0], [0, 0, 1]])
    >>> rows = np.array([[300, 200, 0], [300, 200, 0]])
    >>> room = np.array([100_000, 100_000])
    >>> task = Problem(rows, held, np.array([0, 0, 1]), np.array([0, 0]), 100_000, room, np.array([9999, 9999]), rates)
    >>> made = plan(task)
    >>> made.transfers, made.native_ns, made.modelled_ns
    ((Transfer(expert=0, source=0, destination=1, part=0, parts=1),), 1000000, 550000)
    """
    found, split_EP, sliced_E, transfers, chunks, modelled_ns, native_ns = search(
        problem.rows_PE,
        problem.holds_PE,
        problem.home_E,
        problem.node_P,
        problem.room_P,
        problem.most_rows_P,
        np.append(rates_array(problem.rates), problem.most_parts),
        problem.expert_bytes,
    )
    made = Plan(
        "priced" if found else "native",
        split_EP,
        sliced_E,
        tuple(Transfer(*row) for row in transfers.tolist()),
        int(chunks),
        int(modelled_ns),
        int(native_ns),
    )
    return filled(problem, made) if problem.rates.shared_ps and problem.tokens_P.any() else made
