"""The disk tier of the experts: one expert at a time, straight from the checkpoint's own safetensors files.

An expert's bytes are read by offset into a buffer that is used again and again, past the page cache where the file
system allows it (`O_DIRECT`), so that the cache does not become a second, hidden budget of memory. A file that was
removed, replaced, cut or written to since its header was read is an error that names it, never other bytes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .checkpoint import Entry, stamp_of
from .expert_reader import ExpertReader

BLOCK = 4096
"""Offsets, lengths and addresses of reads are multiples of this: what `O_DIRECT` asks for on today's disks, and a
page of the cache elsewhere."""
PIECE_BYTES = 2**20
"""Of one read, about. More urgent reads are let in between two of them, so a slow disk wants them short; a fast one
wants them long enough that a call's own cost does not count."""
_HUGE_PAGE = 2**21
_GRAIN = 2**15
"""Elements that torch converts on the calling thread alone. For more it would start a team of threads per reader."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

log = logging.getLogger("moeyard.expert_files")


class ExpertUnreadable(OSError):
    """An expert cannot be read from its file now: removed, replaced, cut, written to, or the disk's own error."""

    def __init__(self, file: Path, layer: int, expert: int, reason: str):
        super().__init__(
            f"checkpoint: expert {expert} of MoE layer {layer} cannot be read: {file.name} {reason}; put the file back"
            " as it was and start again"
        )
        self.file, self.layer, self.expert = file, layer, expert


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes of one file that are read together."""

    file: Path
    begin: int
    nbytes: int

    @property
    def first(self) -> int:
        """Where the blocks that enclose it begin."""
        return self.begin // BLOCK * BLOCK

    @property
    def last(self) -> int:
        """Where they end; beyond the file's end, if that is within a block."""
        return _whole_blocks(self.begin + self.nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one call reads: blocks of a file from `begin` to `end`, the last of which may be beyond the file's end, to a
    place in the expert's buffer. Of these bytes the first `needed` must be there.
    """

    file: Path
    begin: int
    end: int
    needed: int
    place: int


class AlignedBuffer:
    """Memory for blocks of files, allocated once. It counts `nbytes` whether something is in it or not."""

    def __init__(self, nbytes: int):
        self.nbytes = max(_whole_blocks(nbytes), BLOCK)
        pages = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and self.nbytes >= _HUGE_PAGE:
            # For a direct read the system looks up and locks each page: with small ones that takes half its time.
            with contextlib.suppress(OSError):  # a system that was built without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        self.room = memoryview(pages)
        self.data_B = torch.frombuffer(pages, dtype=torch.uint8)

    def split(self, nbytes: int) -> list[AlignedBuffer]:
        """Buffers of `nbytes` each, whole blocks, that are parts of this one."""
        assert nbytes % BLOCK == 0
        parts = []
        for start in range(0, self.nbytes - nbytes + 1, nbytes):
            part = object.__new__(AlignedBuffer)
            part.nbytes, part.room = nbytes, self.room[start : start + nbytes]
            part.data_B = self.data_B[start : start + nbytes]
            parts.append(part)
        return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """A tensor in a buffer."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def in_buffer(entry: Entry, start: int) -> _View:
        assert entry.torch_dtype is not None
        return _View(start=start, nbytes=entry.nbytes, dtype=entry.torch_dtype, shape=entry.shape)

    @property
    def suits(self) -> bool:
        """Whether it begins where a tensor of its type may."""
        return self.start % self.dtype.itemsize == 0

    def of(self, data_B: torch.Tensor) -> torch.Tensor:
        return data_B[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


class ExpertFiles:
    """Reads single experts of MoE layers; a layer is its position in `readers`. Any thread may read, each into a
    buffer of its own of `buffer_bytes`.

    `direct` says whether reads go past the page cache. Where they cannot (or `direct=False` is asked for), what was
    read is dropped from the cache at once.

    Raises ExpertUnreadable when a file is not the one that the checkpoint's headers were read from, and ValueError for
    a checkpoint whose conversion mixes experts.
    """

    def __init__(self, readers: Sequence[ExpertReader], *, direct: bool = True):
        self._readers = list(readers)
        self._stamps = dict(self._readers[0].checkpoint.stamps) if self._readers else {}
        experts = [(layer, e) for layer, r in enumerate(self._readers) for e in range(r.spec.num_experts)]
        self._files: dict[Path, int] = {}
        self._extents: dict[tuple[int, int], list[Extent]] = {}
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        self._placed: dict[tuple[int, int], dict[str, list[_View]] | None] = {}
        self.buffer_bytes = BLOCK
        """Of a buffer that has room for any of the experts."""
        where: dict[Path, tuple[int, int]] = {}
        for layer, expert in experts:
            extents = self.extents(layer, expert)
            self.buffer_bytes = max(self.buffer_bytes, sum(e.last - e.first for e in extents))
            where |= {e.file: (layer, expert) for e in extents if e.file not in where}
        self.direct = direct and _reads_directly(list(where))
        flags = os.O_RDONLY | (os.O_DIRECT if self.direct else 0)
        try:
            for file, (layer, expert) in where.items():
                try:
                    self._files[file] = os.open(file, flags)
                except OSError as error:
                    raise ExpertUnreadable(file, layer, expert, _reason(error)) from error
                if not self.direct:
                    advise(self._files[file], "POSIX_FADV_RANDOM")  # no reading ahead
                self._check(file, layer, expert)
        except ExpertUnreadable:
            self.close()
            raise
        _tell(tuple(self._files), self.direct)

    @property
    def readers(self) -> list[ExpertReader]:
        """Of each layer."""
        return list(self._readers)

    @property
    def num_experts_L(self) -> list[int]:
        """Experts of each layer."""
        return [r.spec.num_experts for r in self._readers]

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    def extents(self, layer: int, expert: int) -> list[Extent]:
        """What is read for one expert, in file order. Tensors whose blocks touch are one extent."""
        known = self._extents.get((layer, expert))
        if known is None:
            known = self._extents[layer, expert] = self._find_extents(layer, expert)
        return known

    def _find_extents(self, layer: int, expert: int) -> list[Extent]:
        parts = {
            (part.file, part.begin, part.nbytes)
            for stored in self._readers[layer].parts(expert).values()
            for part in stored.values()
        }
        extents: list[Extent] = []
        for file, begin, nbytes in sorted(parts):
            here = Extent(file=file, begin=begin, nbytes=nbytes)
            if extents and extents[-1].file == file and here.first <= extents[-1].last:
                start = extents.pop().begin
                here = Extent(file=file, begin=start, nbytes=begin + nbytes - start)
            extents.append(here)
        return extents

    def pieces(self, layer: int, expert: int) -> list[Piece]:
        """What to read for one expert: in any order, by any threads, all into one buffer."""
        known = self._pieces.get((layer, expert))
        if known is None:
            known = self._pieces[layer, expert] = list(self._cut(layer, expert))
        return known

    def _cut(self, layer: int, expert: int) -> Iterator[Piece]:
        """Each extent in pieces of about the same size, so that several reads of them end together."""
        place = 0
        for extent in self.extents(layer, expert):
            nbytes = extent.last - extent.first
            count = max(round(nbytes / PIECE_BYTES), 1)
            ends = [extent.first + _whole_blocks(nbytes * (i + 1) // count) for i in range(count)]
            for begin, end in itertools.pairwise([extent.first, *ends]):
                needed = min(end, extent.begin + extent.nbytes) - begin
                yield Piece(file=extent.file, begin=begin, end=end, needed=needed, place=place + begin - extent.first)
            place += nbytes

    def read_piece(self, layer: int, expert: int, piece: Piece, buffer: AlignedBuffer) -> int:
        """Reads a piece to its place in `buffer`, and gives the bytes. An expert is there when all its pieces are, and
        good if `check` says so then.

        Raises ExpertUnreadable.
        """
        assert piece.place + piece.end - piece.begin <= buffer.nbytes, "the buffer is smaller than buffer_bytes"
        file, got = self._files[piece.file], 0
        while got < piece.needed:
            start = got // BLOCK * BLOCK  # after a read that ended within a block, that block is read again
            room = buffer.room[piece.place + start : piece.place + piece.end - piece.begin]
            try:
                count = self._pread(file, room, piece.begin + start)
            except OSError as error:
                self._check(piece.file, layer, expert)
                raise ExpertUnreadable(piece.file, layer, expert, _reason(error)) from error
            if start + count <= got:
                self._check(piece.file, layer, expert)
                raise ExpertUnreadable(
                    piece.file, layer, expert, f"ends at byte {piece.begin + got} in the middle of a tensor"
                )
            got = start + count
        if not self.direct:
            advise(file, "POSIX_FADV_DONTNEED", piece.begin, piece.end - piece.begin)
        return got

    def check(self, layer: int, expert: int) -> None:
        """After reading: whatever was done to the files before or meanwhile shows now. Raises ExpertUnreadable."""
        for file in dict.fromkeys(extent.file for extent in self.extents(layer, expert)):
            self._check(file, layer, expert)

    def load(self, layer: int, expert: int, buffer: AlignedBuffer) -> None:
        """Reads one expert into `buffer` now. Raises ExpertUnreadable."""
        for piece in self.pieces(layer, expert):
            self.read_piece(layer, expert, piece, buffer)
        self.check(layer, expert)

    def tensors(self, layer: int, expert: int, buffer: AlignedBuffer) -> dict[str, torch.Tensor]:
        """What `ExpertReader.read` gives, from a buffer that the expert was read into: views of it where the
        checkpoint's layout allows, else new memory.
        """
        return self._readers[layer].tensors(self._stored(layer, expert, buffer))

    def copy(self, layer: int, expert: int, buffer: AlignedBuffer, into: Mapping[str, torch.Tensor]) -> None:
        """Writes the parameters of an expert that is in `buffer` into CPU tensors of `ExpertReader.shape`, of any
        strides and float type, on this thread alone and without a copy in between where no more is asked for than
        putting tensors side by side.
        """
        for room, part in self._readers[layer].copies(self._stored(layer, expert, buffer), into):
            _copy(room, part)

    @property
    def in_place(self) -> bool:
        """Whether every expert, once read, is in its buffer just as layers compute with it (`placed`)."""
        return all(
            self._find_views(layer, e) is not None for layer, n in enumerate(self.num_experts_L) for e in range(n)
        )

    @property
    def place_bytes(self) -> int:
        """Of a place that any expert can be read into, whole blocks."""
        return _whole_blocks(max(self.buffer_bytes, *(r.nbytes + BLOCK // 8 for r in self._readers)))

    def placed(self, layer: int, expert: int, buffer: AlignedBuffer) -> dict[str, tuple[torch.Tensor, ...]]:
        """Views of a buffer: blocks of rows, which one after the other are what `tensors` gives when the expert was
        read into it, if they are `in_place`.
        """
        views = self._find_views(layer, expert)
        assert views is not None
        return {name: tuple(block.of(buffer.data_B) for block in blocks) for name, blocks in views.items()}

    def read(self, layer: int, expert: int, buffer: AlignedBuffer) -> dict[str, torch.Tensor]:
        """Reads one expert now and gives its `tensors`. Raises ExpertUnreadable."""
        self.load(layer, expert, buffer)
        return self.tensors(layer, expert, buffer)

    def drop_cached_pages(self) -> None:
        """Asks the system to forget what the page cache has of these files, from loading the rest of the model."""
        for file in self._files.values():
            advise(file, "POSIX_FADV_DONTNEED")

    def close(self) -> None:
        """Closes the files. No read may be under way."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _pread(self, file: int, room: memoryview, begin: int) -> int:
        return os.preadv(file, [room], begin)

    def _stored(self, layer: int, expert: int, buffer: AlignedBuffer) -> dict[str, dict[str, torch.Tensor]]:
        """The stored tensors in `buffer`, as `ExpertReader.parts` names them."""

        def view(part: Entry) -> torch.Tensor:
            start = self._start_of(part, layer, expert)
            data_B = buffer.data_B[start : start + part.nbytes]
            # Old files' headers have any length, so that a tensor's place in the file need not suit its type.
            return part.view(data_B if start % part.itemsize == 0 else data_B.clone())

        parts = self._readers[layer].parts(expert)
        return {name: {p: view(part) for p, part in stored.items()} for name, stored in parts.items()}

    def _start_of(self, part: Entry, layer: int, expert: int) -> int:
        """Where in the expert's buffer a stored tensor begins."""
        place = 0
        for extent in self.extents(layer, expert):
            if extent.file == part.file and 0 <= part.begin - extent.begin < max(extent.nbytes, 1):
                return place + part.begin - extent.first
            place += extent.last - extent.first
        raise AssertionError(f"{part.name} is not of expert {expert} of MoE layer {layer}")

    def _find_views(self, layer: int, expert: int) -> dict[str, list[_View]] | None:
        if (layer, expert) not in self._placed:
            stored = self._readers[layer].as_stored(expert) or {}
            views = {
                name: [_View.in_buffer(entry, self._start_of(entry, layer, expert)) for entry in entries]
                for name, entries in stored.items()
            }
            suits = views and all(view.suits for blocks in views.values() for view in blocks)
            self._placed[layer, expert] = views if suits else None
        return self._placed[layer, expert]

    def _check(self, file: Path, layer: int, expert: int) -> None:
        """Raises ExpertUnreadable if the file is not what it was when its header was read."""
        try:
            found, opened = stamp_of(file), stamp_of(self._files[file])
        except OSError as error:
            raise ExpertUnreadable(file, layer, expert, _reason(error)) from error
        expected = self._stamps[file]
        if found[:2] != expected[:2] or opened[:2] != expected[:2]:
            raise ExpertUnreadable(file, layer, expert, "was replaced by another file since its header was read")
        if found != expected:
            raise ExpertUnreadable(
                file,
                layer,
                expert,
                f"was changed since its header was read: it had {expected[2]} bytes and now has {found[2]}",
            )


def _whole_blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def _reads_directly(files: Sequence[Path]) -> bool:
    """Whether every file can be opened and read past the page cache. What cannot be opened at all is named later."""
    if not hasattr(os, "O_DIRECT"):
        return False
    buffer = AlignedBuffer(BLOCK)
    for path in files:
        try:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except FileNotFoundError:
            continue
        except OSError:
            return False
        try:
            os.preadv(file, [buffer.room], 0)
        except OSError:
            return False
        finally:
            os.close(file)
    return True


@functools.cache
def _tell(files: tuple[Path, ...], direct: bool) -> None:
    """Once: a start opens them to plan, to measure and to read."""
    how = "past the page cache (O_DIRECT)" if direct else "through the page cache, and dropped from it"
    log.info("experts are read from %d files %s", len(files), how)


def advise(file: int, advice: str, begin: int = 0, nbytes: int = 0) -> None:
    """`posix_fadvise` by name; `nbytes` 0: to the end. Systems without such advice keep what they like."""
    if hasattr(os, advice):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, begin, nbytes, getattr(os, advice))


def _copy(into: torch.Tensor, part: torch.Tensor) -> None:
    """`into.copy_(part)` on this thread alone."""
    assert into.shape == part.shape, (into.shape, part.shape)
    if into.dtype == part.dtype:
        bits = _BITS[into.dtype.itemsize]
        np.copyto(into.view(bits).numpy(), part.view(bits).numpy())
        return
    rows = max(_GRAIN * len(into) // max(into.numel(), 1), 1)
    for room, source in zip(into.split(rows), part.split(rows), strict=True):
        room.copy_(source)


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is no longer there"
    return f"gave an error: {error.strerror or error}"
