"""Which experts to fill empty slots with at start: those that were used most, each layer's share first."""

from __future__ import annotations

import numpy as np

from .slots import Budget, Integers, Place


def preload_order(counts_LE: Integers, budget: Budget) -> list[Place]:
    """As many experts as there are slots, the most used first; of equals the lower layer, then the lower expert.

    Every layer gets its floor, and the rest of the slots go to who was used most in any layer. Experts that were never
    used get none.

    >>> preload_order(np.array([[5, 9, 7], [1, 0, 3]]), Budget(layers=2, experts=3, slots=3, floor=1))
    [(0, 1), (0, 2), (1, 2)]
    """
    assert counts_LE.shape == (budget.layers, budget.experts)
    rank_LE = np.argsort(np.argsort(-counts_LE, axis=1, kind="stable"), axis=1, kind="stable")
    first_LE = rank_LE < budget.floor
    # Those of the floors, then the others, each by use
    order_N = np.lexsort((-counts_LE.ravel(), ~first_LE.ravel()))[: budget.slots]
    chosen = [(int(n) // budget.experts, int(n) % budget.experts) for n in order_N.tolist()]
    used = [at for at in chosen if counts_LE[at] > 0]
    return sorted(used, key=lambda at: (-int(counts_LE[at]), at))
