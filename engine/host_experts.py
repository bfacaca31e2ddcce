"""The host tier of the experts: what a GPU's slots are filled from, so that the disk is read once.

Each expert has one contiguous piece of host memory in the layout of a slot, pinned where the driver allows it, so that
it crosses the link in one copy for each of its tensors. Experts beyond the budget stay on disk and are read through a
small buffer when they are needed. What is in a slot keeps its piece: a slot is given up without writing back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm import tqdm

from ..scheduler.table import EMPTY
from .config import format_size, parse_budget
from .expert_files import AlignedBuffer, ExpertFiles

if TYPE_CHECKING:
    from .experts import ExpertPool

SHARE = 0.8
"""Of the memory that is free, for experts; the rest is for other programs and for what this one takes meanwhile."""
LOADERS = 4
"""Reads at a time while it is filled."""
ALIGNMENT = 64

log = logging.getLogger("moeyard.host_experts")


def host_budget(option: str | None, total: int, sharing: int = 1) -> int:
    """Bytes for experts in host memory, of `total`; by default what is free, shared by the ranks of the machine.

    Raises ValueError for a budget that is more than what is free.
    """
    free = psutil.virtual_memory().available / sharing
    if option is None:
        return min(total, int(SHARE * free))
    budget = min(parse_budget(option, total, "host_memory"), total)
    if budget > free:
        raise ValueError(
            f"host_memory is {option}, and {format_size(free)} of this machine's memory are free for this rank; ask for"
            " less, or leave it out"
        )
    return budget


class HostExperts:
    """Experts in host memory, as a source of `Readers`: reading one of them from here takes no piece of a file.

    Args:
        files: where they come from, once, and those that have no room each time.
        pools: of the layers, for the layout.
        budget: bytes of experts here; with less than all, the first ones of all layers.
        buffers: reads at a time, when serving.
        own: who may be here, of each layer; None for all. The others are read from files.
    """

    def __init__(
        self,
        files: ExpertFiles,
        pools: Sequence[ExpertPool],
        budget: int,
        buffers: int,
        *,
        own: Sequence[Sequence[int]] | None = None,
        progress: bool = False,
    ) -> None:
        self._files = files
        self._pools = pools
        self._device = pools[0].up_SND.device
        self._stride = -(-sum(_sizes(pools[0])) // ALIGNMENT) * ALIGNMENT
        rows = [range(n) for n in files.num_experts_L] if own is None else own
        experts = [(layer, e) for layer, row in enumerate(rows) for e in row if e != EMPTY]
        experts.sort(key=lambda at: at[::-1])
        kept = experts[: budget // self._stride]
        room = AlignedBuffer(self._stride * (len(kept) + buffers))
        self.pinned = self._pin(room)
        pieces = [room.data_B[i * self._stride :][: self._stride] for i in range(len(kept) + buffers)]
        self._piece = dict(zip(kept, pieces, strict=False))
        self._bounce = pieces[len(kept) :]
        self._bounces = threading.Semaphore(len(self._bounce))
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._computed: torch.cuda.Event | None = None
        self._fill(progress)
        self.ns_per_byte = self._measure()
        """Of copying to a slot."""
        log.info(
            "%d of %d experts in host memory (%s, %s)",
            len(kept),
            len(experts),
            format_size(len(kept) * self._stride),
            "pinned" if self.pinned else "not pinned",
        )

    @property
    def nbytes(self) -> int:
        """Of host memory, with the buffers of those that pass through."""
        return self._stride * (len(self._piece) + len(self._bounce))

    def __contains__(self, at: tuple[int, int]) -> bool:
        """Whether an expert (MoE layer, expert) is here."""
        return at in self._piece

    def steps(self, layer: int, expert: int, buffer: AlignedBuffer) -> Iterator[int]:
        """As `ExpertFiles.steps`; nothing for those that are here."""
        if (layer, expert) not in self._piece:
            yield from self._files.steps(layer, expert, buffer)

    def copy(self, layer: int, expert: int, buffer: AlignedBuffer, into: Mapping[str, torch.Tensor]) -> None:
        """Fills a slot's tensors. On a GPU beside what it computes, after all that was asked of it before `mark`."""
        piece = self._piece.get((layer, expert))
        if piece is not None:
            self._send(self._views(layer, piece), into)
            return
        with self._bounces:
            piece = self._bounce.pop()
            try:
                views = self._views(layer, piece)
                self._files.copy(layer, expert, buffer, views)
                self._send(views, into)
            finally:
                self._bounce.append(piece)

    def mark(self) -> None:
        """The device is asked for no more computation with the place that the next copy writes to."""
        if self._stream is not None:
            self._computed = torch.cuda.Event()
            self._computed.record(torch.cuda.current_stream(self._device))

    def _send(self, views: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
        if self._stream is None:
            for name, tensor in views.items():
                into[name].copy_(tensor)
            return
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            if self._computed is not None:
                self._stream.wait_event(self._computed)
            for name, tensor in views.items():
                into[name].copy_(tensor, non_blocking=True)
            done.record()
        done.synchronize()  # other experts' copies may go on

    def _views(self, layer: int, piece: torch.Tensor) -> dict[str, torch.Tensor]:
        """A piece's parts by parameter, as `ExpertPool.views` gives a slot's."""
        slot, views, start = self._pools[layer].views(0), {}, 0
        for (name, like), size in zip(slot.items(), _sizes(self._pools[layer]), strict=True):
            part = piece[start : start + like.numel() * like.element_size()].view(like.dtype)
            views[name] = part.as_strided(like.shape, like.stride())
            start += size
        return views

    def _fill(self, progress: bool) -> None:
        buffers = [AlignedBuffer(self._files.buffer_bytes) for _ in range(min(LOADERS, len(self._piece)))]

        def read(at: tuple[int, int]) -> None:
            buffer = buffers.pop()  # there are as many as threads
            try:
                for _ in self._files.steps(*at, buffer):
                    pass
                self._files.copy(*at, buffer, self._views(at[0], self._piece[at]))
            finally:
                buffers.append(buffer)

        if not self._piece:
            return
        with (
            tqdm(total=len(self._piece), desc="experts to host memory", unit="expert", disable=not progress) as bar,
            ThreadPoolExecutor(len(buffers)) as pool,
        ):
            for _ in pool.map(read, self._piece):
                bar.update()

    def _measure(self) -> float:
        """Copies a piece a few times to where the slots are: the least time counts."""
        into = torch.empty(self._stride, dtype=torch.uint8, device=self._device)
        times = []
        for _ in range(3):
            begun = time.perf_counter_ns()
            self._send({"": self._bounce[0]}, {"": into})
            times.append(time.perf_counter_ns() - begun)
        return min(times) / self._stride

    def _pin(self, room: AlignedBuffer) -> bool:
        """Page-locks the memory, without which copies to a GPU are slow and not beside computation."""
        if self._device.type != "cuda":
            return False
        error = int(torch.cuda.cudart().cudaHostRegister(room.data_B.data_ptr(), room.nbytes, 0))
        if error:
            log.warning(
                "the driver refuses to pin %s of host memory (error %d): experts are copied more slowly; raise the"
                " limit of locked memory (ulimit -l), or lower --host-memory",
                format_size(room.nbytes),
                error,
            )
        return not error


def _sizes(pool: ExpertPool) -> list[int]:
    """Bytes of each parameter's part of a piece."""
    return [-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in pool.views(0).values()]
