"""Experts of other ranks that this one computes in a layer: their weights, whole or a part of their columns.

D: hidden size, I: expert width, N: rows of the up projection (2I with a gate), R: rows, K: experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..kernels.expert_loop import expert_loop, plain
from .dispatch import LocalDispatcher
from .experts import ExpertPool, Matrix

MOST_PARTS = 8
"""Into how many column parts a plan may cut an expert."""
ALIGNMENT = 64
"""Every tensor of a packed guest starts at a multiple of this many bytes."""


@dataclass(frozen=True, kw_only=True)
class Guest:
    """Weights of one expert or of a column part of it: views of the bytes that came."""

    up_ND: Matrix
    down_DI: Matrix
    up_bias_N: torch.Tensor | None
    down_bias_D: torch.Tensor | None


class Cutter:
    """Cuts a layer's experts into column parts whose outputs add up, and packs and unpacks them for the way.

    Part i of k has the columns from I*i/k to I*(i+1)/k of the expert's intermediate vector: those of its gate and up
    rows, and of its down projection. The bias of the down projection is in part 0.
    """

    def __init__(self, pool: ExpertPool, gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._pool = pool
        self.width = pool.down_SDI.shape[2] if pool.format is None else pool.width
        # Scales are of many columns: a part of quantised weights would not have the values of the whole.
        self.layout = _layout(gate, pool.up_SND.shape[1], self.width) if pool.format is None else ""

    @property
    def most_parts(self) -> int:
        """Into how many parts an expert may be cut; 1 where its activation or its format does not allow any."""
        return min(MOST_PARTS, self.width) if self.layout else 1

    def nbytes(self, part: int = 0, parts: int = 1) -> int:
        """Of one packed part, a multiple of `ALIGNMENT`."""
        return sum(_aligned(shape.numel() * dtype.itemsize) for shape, dtype in self._shapes(part, parts))

    def pack(self, slot: int, part: int = 0, parts: int = 1) -> torch.Tensor:
        """A copy of a slot's weights, or a part of them, as bytes."""
        pool = self._pool
        if pool.format is not None:
            assert parts == 1
            packed = torch.empty(self.nbytes(), dtype=torch.uint8, device=pool.up_SND.device)
            for place, tensor in zip(self._views(packed), pool.tensors(slot), strict=True):
                place.copy_(tensor)
            return packed
        whole = Guest(
            up_ND=pool.up_SND[slot],
            down_DI=pool.down_SDI[slot],
            up_bias_N=pool.up_bias_SN[slot] if pool.up_bias_SN is not None else None,
            down_bias_D=pool.down_bias_SD[slot] if pool.down_bias_SD is not None else None,
        )
        return self._pack(whole, part, parts)

    def cut(self, packed: torch.Tensor, part: int, parts: int) -> torch.Tensor:
        """A part of a whole expert that `pack` gave, packed."""
        return self._pack(self.unpack(packed), part, parts)

    def _pack(self, whole: Guest, part: int, parts: int) -> torch.Tensor:
        assert isinstance(whole.up_ND, torch.Tensor) and isinstance(whole.down_DI, torch.Tensor)
        packed = torch.empty(self.nbytes(part, parts), dtype=torch.uint8, device=whole.up_ND.device)
        place = self.unpack(packed, part, parts)
        low, high = self._columns(part, parts)
        assert isinstance(place.up_ND, torch.Tensor) and isinstance(place.down_DI, torch.Tensor)
        place.up_ND.copy_(self._rows(whole.up_ND, low, high))
        place.down_DI.copy_(whole.down_DI[:, low:high])
        if place.up_bias_N is not None and whole.up_bias_N is not None:
            place.up_bias_N.copy_(self._rows(whole.up_bias_N, low, high))
        if place.down_bias_D is not None and whole.down_bias_D is not None:
            place.down_bias_D.copy_(whole.down_bias_D if not part else torch.zeros_like(whole.down_bias_D))
        return packed

    def unpack(self, packed: torch.Tensor, part: int = 0, parts: int = 1) -> Guest:
        """Views of what `pack` gave."""
        views = self._views(packed, part, parts)
        if self._pool.format is not None:
            weights = self._pool.weights_in(views)
            return Guest(
                up_ND=weights.up_PND[0],
                down_DI=weights.down_DI,
                up_bias_N=weights.up_bias_N,
                down_bias_D=weights.down_bias_D,
            )
        up_bias, down_bias = (views[2], views[3]) if len(views) == 4 else (None, None)
        return Guest(up_ND=views[0], down_DI=views[1], up_bias_N=up_bias, down_bias_D=down_bias)

    def _views(self, packed: torch.Tensor, part: int = 0, parts: int = 1) -> list[torch.Tensor]:
        views, start = [], 0
        for shape, dtype in self._shapes(part, parts):
            size = shape.numel() * dtype.itemsize
            views.append(packed[start : start + size].view(dtype).view(shape))
            start += _aligned(size)
        return views

    def _columns(self, part: int, parts: int) -> tuple[int, int]:
        return self.width * part // parts, self.width * (part + 1) // parts

    def _rows(self, up: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """The rows of the up projection, or of its bias, that make these columns."""
        if high - low == self.width:
            return up
        if self.layout == "halves":
            return torch.cat([up[low:high], up[self.width + low : self.width + high]])
        return up[2 * low : 2 * high] if self.layout == "pairs" else up[low:high]

    def _shapes(self, part: int, parts: int) -> list[tuple[torch.Size, torch.dtype]]:
        pool = self._pool
        if pool.format is not None:
            assert parts == 1
            return [(tensor.shape, tensor.dtype) for tensor in pool.tensors(0)]
        low, high = self._columns(part, parts)
        hidden = pool.down_SDI.shape[1]
        rows = pool.up_SND.shape[1] // self.width * (high - low)
        shapes = [
            (torch.Size((rows, hidden)), pool.up_SND.dtype),
            (torch.Size((hidden, high - low)), pool.down_SDI.dtype),
        ]
        if pool.up_bias_SN is not None and pool.down_bias_SD is not None:
            shapes += [
                (torch.Size((rows,)), pool.up_bias_SN.dtype),
                (torch.Size((hidden,)), pool.down_bias_SD.dtype),
            ]
        return shapes


class GuestRoom:
    """Slots for guests, of one whole expert each, shared by all layers: as many as `nbytes` has room for.

    Of the guests that come for one layer of one step, whole ones lie in slots 0, 1, ..., and parts side by side in
    the slots behind them. A slot is a little larger than an expert, for parts that are not equal and for alignment:
    parts of which a plan may put any number into so many experts' bytes have room in as many slots. `cutter` is of the
    layer with the largest experts.
    """

    def __init__(self, nbytes: int, cutter: Cutter, device: torch.device) -> None:
        self.expert_bytes = expert = cutter.nbytes()
        self.slots = nbytes // expert
        self.most_used = 0
        self._stride = expert
        if cutter.most_parts > 1:
            self._stride += MOST_PARTS * (cutter.nbytes(0, cutter.width) + 5 * ALIGNMENT)
        self._buffer = torch.empty(self.slots * self._stride, dtype=torch.uint8, device=device)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def whole(self, slot: int, nbytes: int) -> torch.Tensor:
        """The bytes of a slot's expert."""
        return self._take(slot * self._stride, nbytes)

    def first_part(self, slot: int) -> None:
        """Parts lie from this slot on."""
        self._used = slot * self._stride

    def part(self, nbytes: int) -> torch.Tensor:
        """The bytes of the next part."""
        start, self._used = self._used, self._used + _aligned(nbytes)
        return self._take(start, nbytes)

    def copy(self, from_slot: int, to_slot: int) -> None:
        """An expert goes to another slot."""
        if from_slot != to_slot:
            self.whole(to_slot, self._stride).copy_(self.whole(from_slot, self._stride))

    def slots_for(self, nbytes: int) -> int:
        """How many slots so many bytes of parts take, alignment included."""
        return -(-nbytes // self._stride)

    def _take(self, start: int, nbytes: int) -> torch.Tensor:
        assert start + nbytes <= self._buffer.numel(), "the plan's guests do not fit into their room"
        self.most_used = max(self.most_used, start + nbytes)
        return self._buffer[start : start + nbytes]


def run_guests(
    x_RD: torch.Tensor,
    numbers_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    guests: Mapping[int, Guest],
    gate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Weighted sums [R, D] over the guests that each row names by their number; other numbers add nothing."""
    present = list(guests.values())
    last = max(guests)
    index_N = torch.full((last + 2,), -1)
    index_N[list(guests)] = torch.arange(len(present))
    guests_RK = index_N.to(x_RD.device)[numbers_RK.clamp(-1, last + 1)]  # -1 is the last, of which there is none
    dispatcher = LocalDispatcher(len(present))
    token_R, counts_S, state = dispatcher.route(guests_RK, weights_RK)
    up: Any = [guest.up_ND for guest in present]
    down: Any = [guest.down_DI for guest in present]
    up_bias: Any = [guest.up_bias_N for guest in present] if present[0].up_bias_N is not None else None
    down_bias: Any = [guest.down_bias_D for guest in present] if up_bias is not None else None
    y_RD = expert_loop(x_RD, token_R[: int(counts_S.sum())], counts_S, up, down, gate, up_bias, down_bias)
    return dispatcher.combine(y_RD, state)


def run_guests_on_all(
    x_RD: torch.Tensor,
    numbers_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    guests: Mapping[int, Guest],
    gate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The same by computing every guest for every row. For a GPU and few rows: an expert's time is that of its weights
    then, and nobody waits to learn which rows are whose.
    """
    sums_RD = torch.zeros_like(x_RD)
    for number, guest in guests.items():
        named_RK = numbers_RK == number
        weights_R = torch.where(named_RK, weights_RK, 0).sum(1, keepdim=True).to(x_RD.dtype)
        h = gate(F.linear(x_RD, plain(guest.up_ND, x_RD.dtype), guest.up_bias_N))
        y_RD = F.linear(h, plain(guest.down_DI, x_RD.dtype), guest.down_bias_D)
        # Not multiplied by 0: what another expert's row gives need not be finite.
        sums_RD += torch.where(named_RK.any(1, keepdim=True), weights_R * y_RD, 0)
    return sums_RD


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _layout(gate: Callable[[torch.Tensor], torch.Tensor], rows: int, width: int) -> str:
    """How columns follow from rows of the up projection, tried on numbers rather than read off a name.

    `halves` (all gates, then all ups), `pairs` (gate and up in turn), `plain` (no gate), or "" where a part of the
    rows does not give the same columns.
    """
    sample = torch.randn(3, rows, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.5], [4.0], [40.0]])
    low, high = width // 3, width // 3 + max(1, width // 4)
    whole = gate(sample)[:, low:high]
    if rows == width:
        ways = {"plain": sample[:, low:high]}
    else:
        halves = torch.cat([sample[:, low:high], sample[:, width + low : width + high]], dim=1)
        ways = {"halves": halves, "pairs": sample[:, 2 * low : 2 * high]}
    for name, part in ways.items():
        if torch.allclose(gate(part.contiguous()), whole, rtol=1e-5, atol=1e-6):
            return name
    return ""
