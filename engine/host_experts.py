"""The host tier of the experts: what a GPU's slots are filled from, so that the disk is read once.

Host memory has slots of its own, in the layout of the device's and pinned where the driver allows it, so that an expert
crosses the link in one copy for each of its tensors, and the CPU can compute it where it is. Experts beyond the budget
stay on disk and are read through a small buffer when they are needed. What is in a device's slot keeps its place here:
a slot is given up without writing back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from tqdm import tqdm

from ..scheduler.table import EMPTY
from .config import format_size, parse_budget
from .expert_files import AlignedBuffer, ExpertFiles, Piece
from .expert_reader import ExpertReader
from .experts import ExpertPool

SHARE = 0.8
"""Of the memory that is free, for experts; the rest is for other programs and for what this one takes meanwhile."""
LOADERS = 4
"""Reads at a time while it is filled."""

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


class HostPool(ExpertPool):
    """Slots in host memory, pinned where the driver allows it, for experts that go to a device or are computed here.

    The layout is that of the device's slots, so that a CPU kernel takes its weights from here as they are.
    """

    def __init__(self, reader: ExpertReader, num_slots: int, device: torch.device) -> None:
        super().__init__(reader, num_slots, torch.device("cpu"))
        self.device = device
        """Where its experts are sent."""
        self.pinned = self._pin()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._computed: torch.cuda.Event | None = None

    def send(self, slot: int, into: Mapping[str, torch.Tensor]) -> None:
        """Copies an expert to tensors of the device, beside what that computes, after all that was asked of it before
        `mark`. Returns when the copy is made.
        """
        views = self.views(slot)
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

    def mark(self) -> None:
        """The device is asked for no more computation with the place that the next copy writes to."""
        if self._stream is not None:
            self._computed = torch.cuda.Event()
            self._computed.record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        """Unlocks the memory. Nothing may be on its way."""
        if self.pinned:
            for tensor in self._tensors():
                torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
            self.pinned = False

    def _pin(self) -> bool:
        """Page-locks the memory, without which copies to a GPU are slow and not beside computation."""
        if self.device.type != "cuda":
            return False
        locked: list[torch.Tensor] = []
        for tensor in self._tensors():
            if error := int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
                log.warning(
                    "the driver refuses to pin %s of host memory (error %d): experts are copied more slowly; raise the"
                    " limit of locked memory (ulimit -l), or lower --host-memory",
                    format_size(self.nbytes),
                    error,
                )
                for other in locked:
                    torch.cuda.cudart().cudaHostUnregister(other.data_ptr())
                return False
            locked.append(tensor)
        return True


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
        rows = [range(n) for n in files.num_experts_L] if own is None else own
        experts = [(layer, e) for layer, row in enumerate(rows) for e in row if e != EMPTY]
        experts.sort(key=lambda at: at[::-1])
        reader = pools[0].reader
        kept = experts[: budget // reader.nbytes]
        self.pool = HostPool(reader, len(kept) + buffers, pools[0].up_SND.device)
        self._slot = {at: slot for slot, at in enumerate(kept)}
        self._bounce = list(range(len(kept), self.pool.num_slots))
        self._bounces = threading.Semaphore(len(self._bounce))
        self._fill(progress)
        self.ns_per_byte = self._measure()
        """Of copying to a slot."""
        log.info(
            "%d of %d experts in host memory (%s, %s)",
            len(kept),
            len(experts),
            format_size(len(kept) * reader.nbytes),
            "pinned" if self.pool.pinned else "not pinned",
        )

    @property
    def nbytes(self) -> int:
        """Of host memory, with the buffers of those that pass through."""
        return self.pool.nbytes

    @property
    def pinned(self) -> bool:
        return self.pool.pinned

    def __contains__(self, at: tuple[int, int]) -> bool:
        """Whether an expert (MoE layer, expert) is here."""
        return at in self._slot

    @property
    def kept(self) -> int:
        """How many experts are here, in the first slots of `pool`."""
        return len(self._slot)

    def slot(self, layer: int, expert: int) -> int:
        """Where in `pool` an expert is that is here."""
        return self._slot[layer, expert]

    def pieces(self, layer: int, expert: int) -> Sequence[Piece]:
        """As `ExpertFiles.pieces`, and so are the next two; nothing is read for those that are here."""
        return () if (layer, expert) in self._slot else self._files.pieces(layer, expert)

    def read_piece(self, layer: int, expert: int, piece: Piece, buffer: AlignedBuffer) -> int:
        return self._files.read_piece(layer, expert, piece, buffer)

    def check(self, layer: int, expert: int) -> None:
        if (layer, expert) not in self._slot:
            self._files.check(layer, expert)

    def copy(self, layer: int, expert: int, buffer: AlignedBuffer, into: Mapping[str, torch.Tensor]) -> None:
        """Fills a slot's tensors, as `HostPool.send` does."""
        slot = self._slot.get((layer, expert))
        if slot is not None:
            self.pool.send(slot, into)
            return
        with self._bounces:
            slot = self._bounce.pop()
            try:
                self._files.copy(layer, expert, buffer, self.pool.views(slot))
                self.pool.send(slot, into)
            finally:
                self._bounce.append(slot)

    def mark(self) -> None:
        """As `HostPool.mark`."""
        self.pool.mark()

    def close(self) -> None:
        self.pool.close()

    def _fill(self, progress: bool) -> None:
        buffers = [AlignedBuffer(self._files.buffer_bytes) for _ in range(min(LOADERS, len(self._slot)))]

        def read(at: tuple[int, int]) -> None:
            buffer = buffers.pop()  # there are as many as threads
            try:
                self._files.load(*at, buffer)
                self._files.copy(*at, buffer, self.pool.views(self._slot[at]))
            finally:
                buffers.append(buffer)

        if not self._slot:
            return
        with (
            tqdm(total=len(self._slot), desc="experts to host memory", unit="expert", disable=not progress) as bar,
            ThreadPoolExecutor(len(buffers)) as pool,
        ):
            for _ in pool.map(read, self._slot):
                bar.update()

    def _measure(self) -> float:
        """Copies an expert's bytes a few times to where the slots are: the least time counts."""
        views = self.pool.views(self._bounce[0])
        into = {name: torch.empty_like(tensor, device=self.pool.device) for name, tensor in views.items()}
        times = []
        for _ in range(3):
            begun = time.perf_counter_ns()
            self.pool.send(self._bounce[0], into)
            times.append(time.perf_counter_ns() - begun)
        return min(times) / self.pool.reader.nbytes
