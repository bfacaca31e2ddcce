"""What a balancing planner knows: who has rows for which expert, who has which expert, and what work and moves cost.

P: ranks, E: experts. A row is one (token, expert) pair. Times are integers (ns, or ps and fs per unit), so that every
rank computes the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

PS = 1000
"""Picoseconds in a nanosecond; femtoseconds in a picosecond."""
FS = 1000 * 1000
"""Femtoseconds in a nanosecond."""


@dataclass(frozen=True)
class Rates:
    """What work and moves cost on one kind of machine.

    Experts: `base_ns + max(expert_ps * experts, row_ps * rows, wire_ps * rows)`: the flat part is the weights' way
    from memory, the first slope arithmetic, the second the way of the rows between ranks (TEMPO's max-affine model).
    Where rows do not travel beside the computing, `row_ps` holds both and `wire_ps` is 0.

    A weight transfer takes `alpha + bytes * rate`, one at a time per link: each rank has a sending and a receiving
    link to the ranks of its node, and each node a bundle of links to the other nodes (the bundle's rate: a transfer
    is striped over all of it).
    """

    base_ns: int
    expert_ps: int
    row_ps: int
    wire_ps: int = 0
    near_alpha_ns: int = 0
    near_fs_per_byte: int = 0
    far_alpha_ns: int = 0
    far_fs_per_byte: int = 0
    hidden_ns: int = 0
    """How long transfers are under way before the experts could begin anyway: dispatch, shared experts, attention."""
    guest_ns: int = 0
    """What each expert that is computed apart from the resident ones costs extra (a call of its own)."""
    plan_ns: int = 0
    """What any plan costs that computes rows elsewhere than at home: another exchange of counts, other splits."""
    shared_ps: int = 0
    """A token's shared experts. This and what follows is not in `model.rates_array`: the search knows nothing of it."""
    shared_wire_ps: int = 0
    """A token's way to the rank that computes its shared experts for it, and back: at both ranks, beside nothing."""
    shared_ns: int = 0
    """What it costs that any such tokens travel: two more exchanges, another call of the shared experts."""

    def __post_init__(self) -> None:
        for it in fields(self):
            value = getattr(self, it.name)
            if value < 0 or int(value) != value:
                raise ValueError(f"{it.name} is {value}; it must be an integer from 0 up")
            object.__setattr__(self, it.name, int(value))


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer of one step.

    Args:
        rows_PE: rows that each rank's own tokens have for each expert (the counts exchange).
        holds_PE: 1 where a rank has an expert's weights already, by placement or as a guest it kept; every expert
            with rows has a holder. The first holder, by `home_E`, is the native one.
        home_E: the rank that computes an expert when nothing is done; it holds it.
        node_P: the node of each rank, 0 .. nodes-1.
        expert_bytes: of one expert's weights.
        room_P: bytes for guests that a rank has free.
        most_rows_P: rows that fit into a rank's memory at a time; a layer with more runs in chunks of tokens.
        most_parts: into how many column parts an expert may be cut; 1 where it cannot be.
        tokens_P: tokens of each rank that go through the layer's shared experts, which every rank has; zeros, or
            nothing given, where there are none or where they must stay at home.
    """

    rows_PE: Integers
    holds_PE: Integers
    home_E: Integers
    node_P: Integers
    expert_bytes: int
    room_P: Integers
    most_rows_P: Integers
    rates: Rates
    most_parts: int = 63
    tokens_P: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if self.most_parts < 1:
            raise ValueError(f"most_parts is {self.most_parts}; it must be at least 1")
        ranks, experts = self.rows_PE.shape
        if not np.size(self.tokens_P):
            object.__setattr__(self, "tokens_P", np.zeros(ranks, dtype=np.int64))
        for name, shape in (
            ("rows_PE", (ranks, experts)),
            ("holds_PE", (ranks, experts)),
            ("home_E", (experts,)),
            ("node_P", (ranks,)),
            ("room_P", (ranks,)),
            ("most_rows_P", (ranks,)),
            ("tokens_P", (ranks,)),
        ):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
            if array.size and array.min() < 0:
                raise ValueError(f"{name} has {array.min()}; nothing in it can be below 0")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if experts and not self.holds_PE[self.home_E, np.arange(experts)].all():
            raise ValueError("home_E names a rank that does not hold the expert")
        if ranks and self.most_rows_P.min() < 1:
            raise ValueError("most_rows_P must be at least 1 on every rank")

    @property
    def ranks(self) -> int:
        return self.rows_PE.shape[0]

    @property
    def experts(self) -> int:
        return self.rows_PE.shape[1]

    @property
    def loads_E(self) -> Integers:
        """Rows of each expert from all ranks."""
        return self.rows_PE.sum(0)
