"""Where the experts of a store come from: a checkpoint's files, or host memory in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from .expert_files import PIECE_BYTES, AlignedBuffer, ExpertFiles
from .experts import ExpertPool, ExpertWeights
from .host_experts import HostExperts
from .readers import Priority, Read, Readers
from .store_size import StoreSize


class Source(Protocol):
    """Where experts that have no place are: a checkpoint, or a stand-in for tests."""

    def fetch(self, layer: int, expert: int, place: int, priority: Priority) -> Future[Any]:
        """Starts to write an expert of MoE layer `layer` into a place, whose contents are not used before the end.

        The read raises what ends the visit, `expert_files.ExpertUnreadable`.
        """
        ...

    def promote(self, read: Future[Any], priority: Priority) -> None:
        """Makes a read more urgent."""
        ...

    def abandon(self, read: Future[Any]) -> None:
        """Ends a read soon, if it has not ended: nobody wants it any more."""
        ...

    def nbytes(self, layer: int, expert: int) -> int:
        """Bytes that are read for an expert."""
        ...

    def bytes_read(self, read: Future[Any]) -> int:
        """How many of them there are already, of a read that has not ended."""
        ...

    def in_the_way(self, read: Future[Any]) -> int:
        """For how many bytes of a read that has not ended a more urgent one waits, on average; 0: it may begin."""
        ...

    def close(self, timeout_s: float) -> None:
        """Raises TimeoutError for reads that did not end."""
        ...


class CheckpointSource:
    """Experts from the checkpoint's own files, past the page cache where that is possible, the most urgent first. With
    `host` from host memory, and from the files those that are not there.
    """

    def __init__(
        self, files: ExpertFiles, pools: Sequence[ExpertPool], size: StoreSize, host: HostExperts | None = None
    ) -> None:
        assert host is None or pools[0].memory is None, "what comes from host memory is copied to slots"
        self.host = host
        self._files = files
        self._pools = pools
        self._places: list[AlignedBuffer] | None = None
        buffers: list[AlignedBuffer] = []
        if pools[0].memory is None:
            self._weights = [pools[0].weights(place) for place in range(size.places)]
            buffers = [AlignedBuffer(files.buffer_bytes) for _ in range(size.buffers)]
        else:
            self._places = pools[0].memory.split(size.place)
            nothing = torch.empty(0)
            self._weights = [ExpertWeights(up_PND=(nothing,), down_DI=nothing)] * size.places
        self._readers = Readers(host or files, buffers, threads=size.readers)
        self.nbytes_LE = [
            [sum(extent.nbytes for extent in files.extents(layer, expert)) for expert in range(experts)]
            for layer, experts in enumerate(files.num_experts_L)
        ]

    def fetch(self, layer: int, expert: int, place: int, priority: Priority) -> Read:
        """As `Source` says, and so are the others."""
        if self.host is not None:
            self.host.mark()
        if self._places is None:
            return self._readers.submit(layer, expert, self._pools[layer].views(place), priority)
        buffer = self._places[place]
        self._weights[place] = self._pools[layer].named(self._files.placed(layer, expert, buffer))
        return self._readers.submit(layer, expert, {}, priority, buffer)

    def weights(self, place: int) -> ExpertWeights:
        """What layers compute with, once the expert that is on its way to a place has been read."""
        return self._weights[place]

    def promote(self, read: Future[Any], priority: Priority) -> None:
        assert isinstance(read, Read)
        self._readers.promote(read, priority)

    def abandon(self, read: Future[Any]) -> None:
        assert isinstance(read, Read)
        self._readers.abandon(read)

    def nbytes(self, layer: int, expert: int) -> int:
        return self.nbytes_LE[layer][expert]

    def bytes_read(self, read: Future[Any]) -> int:
        assert isinstance(read, Read)
        return read.bytes_read

    def in_the_way(self, read: Future[Any]) -> int:
        assert isinstance(read, Read)
        nbytes = self.nbytes(read.layer, read.expert)
        return self._readers.in_flight(read) * (nbytes if self.host is not None else min(nbytes, PIECE_BYTES)) // 2

    def close(self, timeout_s: float) -> None:
        self._readers.close(timeout_s)
        self._files.close()
