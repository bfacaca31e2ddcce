"""How a rank's expectations travel: a note of a few bytes beside an exchange that the ranks make anyway.

A: layers ahead, E: experts of a layer (the most of any), N: bytes of a note, P: ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .base import Array, Floats

Bytes = npt.NDArray[np.uint8]

STEPS = 255
"""A probability travels as so many parts of 1."""
MOST_USES = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False, kw_only=True)
class Said:
    """What all ranks say after a layer: with which probability their tokens use each expert of the layers ahead
    [P, A, E], by which of their predictors [P, A], and the discounted uses of the layer itself [P, E].
    """

    chance_PAE: Floats
    by_PA: Array
    future_PE: Floats


class NoteFormat:
    """A note of `nbytes`, a multiple of 8: probabilities as bytes, who says so as a byte for each layer ahead, and
    discounted uses as float16.
    """

    def __init__(self, depth: int, experts: int) -> None:
        self.depth, self.experts = depth, experts
        self._uses = -(-depth * (experts + 1) // 2) * 2  # where a float16 may begin
        self._end = self._uses + 2 * experts
        self.nbytes = -(-self._end // 8) * 8

    def pack(self, chance_AE: Floats, by_A: Array, future_E: Floats | None) -> Bytes:
        """[N]; `future_E` None for none."""
        note_N = np.zeros(self.nbytes, dtype=np.uint8)
        size = self.depth * self.experts
        note_N[:size] = np.rint(chance_AE.ravel() * STEPS)
        note_N[size : size + self.depth] = by_A
        if future_E is not None:
            note_N[self._uses : self._end].view(np.float16)[:] = future_E.clip(-MOST_USES, MOST_USES)
        return note_N

    def unpack(self, notes_PN: Bytes) -> Said:
        """The notes of all ranks."""
        ranks, size = len(notes_PN), self.depth * self.experts
        chance_PAE = notes_PN[:, :size].reshape(ranks, self.depth, self.experts).astype(np.float32) / np.float32(STEPS)
        future_PE = np.ascontiguousarray(notes_PN[:, self._uses : self._end]).view(np.float16).astype(np.float32)
        return Said(chance_PAE=chance_PAE, by_PA=notes_PN[:, size : size + self.depth], future_PE=future_PE)
