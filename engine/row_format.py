"""How a token travels between ranks: one row of bytes.

R: rows (one per token and rank), D: hidden size, K: experts per token, B: bytes of a row.
"""

from __future__ import annotations

import torch

from .dispatch import Arrived


class RowFormat:
    """How a token travels: its hidden vector, then the slots of its experts at the destination, then their weights.

    One row of bytes, so that one collective carries all three.
    """

    def __init__(self, hidden: int, choices: int, dtype: torch.dtype):
        self.dtype = dtype
        self.hidden_bytes = hidden * dtype.itemsize
        ends = [self.hidden_bytes, 0, 0, 0]
        ends[1] = -(-ends[0] // 4) * 4
        ends[2] = ends[1] + 4 * choices
        ends[3] = ends[2] + 2 * choices
        self._hidden, self._weights, self._slots = slice(0, ends[0]), slice(ends[1], ends[2]), slice(ends[2], ends[3])
        # Every row starts where a float or two int16 may.
        self.nbytes = -(-ends[3] // 8) * 8

    def pack(self, x_RD: torch.Tensor, slots_RK: torch.Tensor, weights_RK: torch.Tensor) -> torch.Tensor:
        """Bytes [R, nbytes]."""
        rows = x_RD.shape[0]
        packed = torch.empty(rows, self.nbytes, dtype=torch.uint8, device=x_RD.device)
        if rows:
            packed[:, self._hidden].view(self.dtype).copy_(x_RD)
            packed[:, self._weights].view(torch.float32).copy_(weights_RK)
            packed[:, self._slots].view(torch.int16).copy_(slots_RK)
        return packed

    def unpack(self, packed_RB: torch.Tensor) -> Arrived:
        """Views of the bytes; the slots are widened."""
        return Arrived(
            x_RD=packed_RB[:, self._hidden].view(self.dtype),
            slots_RK=packed_RB[:, self._slots].view(torch.int16).long(),
            weights_RK=packed_RB[:, self._weights].view(torch.float32),
        )
