"""The decode tokens that are ready, which missing experts each will probably read, and what an order of steps costs.

R: ready tokens, one of each request, in order of admission. X: experts of all layers in a row, layer by layer. A
*schedule* is a tuple of steps, each a tuple of rows; together they have every row once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Step = tuple[int, ...]
Schedule = tuple[Step, ...]

FS_PER_NS = 10**6


@dataclass(frozen=True, eq=False, kw_only=True)
class Ready:
    """What a choice is made from. Raises ValueError for values that cannot be.

    Attributes:
        needs_RX: which experts each token is predicted to use.
        missing_bytes_X: what reading an expert takes, 0 for a resident one.
        passed_over_R: how many steps in a row a token was ready and not run.
        most: tokens that a step may have.
        most_waits: how many steps in a row a token may be passed over.
        read_fs_per_byte: of missing experts.
        step_ns: a step in which no expert is missing.
    """

    needs_RX: Bools
    missing_bytes_X: Integers
    passed_over_R: Integers
    most: int
    most_waits: int
    read_fs_per_byte: int
    step_ns: int = 0

    def __post_init__(self) -> None:
        rows, experts = self.needs_RX.shape
        if self.missing_bytes_X.shape != (experts,) or self.passed_over_R.shape != (rows,):
            raise ValueError(
                f"needs_RX is {self.needs_RX.shape}; missing_bytes_X {self.missing_bytes_X.shape} and passed_over_R"
                f" {self.passed_over_R.shape} must have a value for each expert and for each row of it"
            )
        for name, least in (("most", 1), ("most_waits", 0), ("read_fs_per_byte", 0), ("step_ns", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if (self.missing_bytes_X < 0).any() or (self.passed_over_R < 0).any():
            raise ValueError("missing_bytes_X and passed_over_R must not be negative")

    @property
    def rows(self) -> int:
        return len(self.needs_RX)

    @cached_property
    def order(self) -> Step:
        """Rows as they are served without any choice: longest passed over first, then in order of admission."""
        return tuple(np.argsort(-self.passed_over_R, kind="stable").tolist())

    @cached_property
    def in_order(self) -> Schedule:
        return cut(self.order, self.most)

    @cached_property
    def missing_needs(self) -> tuple[Bools, Integers]:
        """[R, M] needs and [M] bytes of those experts only that are missing and that a token needs."""
        columns = np.flatnonzero((self.missing_bytes_X > 0) & self.needs_RX.any(0))
        return np.ascontiguousarray(self.needs_RX[:, columns]), self.missing_bytes_X[columns]

    @cached_property
    def due(self) -> Step:
        """The rows that this step must have, so that none is ever passed over more than `most_waits` times.

        Those that may be passed over j more times and no more have to fit into j + 1 steps, this one included, and
        what does not fit into the later ones is due. Where all together have more rows than `most_waits` + 1 steps, all
        of the step is due: the order of service then, in which a row waits as short as it can.
        """
        left_R = np.maximum(self.most_waits - self.passed_over_R, 0)
        within = np.cumsum(np.bincount(left_R, minlength=1))
        due = int((within - self.most * np.arange(len(within))).max()) if self.rows else 0
        return self.order[: min(due, self.most)] if due > 0 else ()

    def bytes_of(self, step: Step) -> int:
        """Bytes of missing experts that the rows of a step read, each expert once."""
        needs_RM, bytes_M = self.missing_needs
        return int(bytes_M[needs_RM[list(step)].any(0)].sum())

    def step_times_ns(self, schedule: Schedule) -> tuple[int, ...]:
        """Of each step. What one step reads does not count as resident in the next: it may be gone by then."""
        return tuple(self.step_ns + self.bytes_of(step) * self.read_fs_per_byte // FS_PER_NS for step in schedule)

    def ends_ns(self, schedule: Schedule) -> Integers:
        """[R] when each row's step has ended."""
        ends_R = np.zeros(self.rows, dtype=np.int64)
        for step, end in zip(schedule, np.cumsum(self.step_times_ns(schedule), dtype=np.int64), strict=True):
            ends_R[list(step)] = end
        return ends_R


def cut(rows: Step, most: int) -> Schedule:
    return tuple(rows[at : at + most] for at in range(0, len(rows), most))
