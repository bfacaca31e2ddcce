"""What every predictor of routing is asked and told.

T: tokens of a step, L: MoE layers, E: experts of a layer (the most of any), K: experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A sequence's tokens in a step: rows `first` to `first + len(token_ids)` of its batch.

    `start` is the place of the first of them in the sequence. A sequence that was preempted starts at 0 again.
    """

    request_id: str
    first: int
    token_ids: Sequence[int]
    start: int


class Predictor:
    """One that knows nothing. Told how a step goes, in the order of these methods, asked at any time. One thread.

    It may know nothing of some layers or of the future (None). What it says changes no result, so it may be wrong; it
    must not raise for any tokens or routing.
    """

    name: str = ""
    """In metrics and logs, with underscores: `next_use`."""
    ordered: bool = False
    """Whether it looks at the order of a token's experts: to sort them by their weights takes time."""
    exact: bool = False
    """Whether what it says of a layer is known, not guessed: nobody else is asked about that layer then."""

    reach: int = 4
    """How many layers ahead it is asked at first; fewer where asking takes long."""

    def begin_step(self, rows: Sequence[Rows]) -> None:
        """A step begins. Its tokens are known, its routing is not."""

    def routed(self, layer: int, ids_TK: Array) -> None:
        """A layer's router has chosen, for all rows of the step: ids, -1 for none; in the order of its weights if the
        predictor is `ordered`, else in any.

        Layers come in ascending order. All of a step's predictions for this layer are over.
        """

    def end_step(self) -> None:
        """All layers have run."""

    def forget(self, request_id: str) -> None:
        """A sequence has ended. It may be unknown here."""

    def upcoming(self, layer: int) -> Floats | None:
        """[E] how probable it is that any token of this step uses each expert of a layer whose router has not chosen
        yet; asked after `begin_step` and again after each `routed`. 0 to 1.
        """
        return None

    def future(self) -> Floats | None:
        """[L, E] discounted uses of each expert after this step (see `NextUse`), summed over the sequences that run,
        also those that are not in this step; asked after `routed`, while the step runs, and after `end_step`. Larger is
        wanted more or sooner. To be read only, and only until the predictor is told something.
        """
        return None

    def next_of(self, request_id: str) -> Floats | None:
        """[L, E] how probable it is that a sequence's next token uses each expert, 0 to 1; asked between steps, also
        about sequences that were not in the last one.
        """
        return None
