"""A checkpoint directory's safetensors files: what is in them, checked against their own headers before anything is
read.

Only headers are read when a checkpoint is opened. Data is read straight into the tensor that is returned, whole or a
slice of the first dimension: a mapped file would count as this process's memory for as long as it is mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

OPEN_FILES = 8
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLES, SAMPLE_BYTES = 256, 64
"""How many tensors a fingerprint looks into, and how far: trained further, a checkpoint differs nearly everywhere."""

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_TYPES |= {"I64": torch.int64}  # tables, such as which experts a token id has
QUANTISED_TYPES = {"U8": torch.uint8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}
"""Of parts of quantised weights."""
_TYPES |= QUANTISED_TYPES


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int  # of its data, in bytes from the start of the file

    @property
    def itemsize(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a type that nothing is made of."""
        return _TYPES.get(self.dtype)

    def row(self, index: int) -> Entry:
        """Row `index` of the first dimension, kept as a dimension of 1."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=(1, *self.shape[1:]), nbytes=nbytes, begin=self.begin + index * nbytes)

    def view(self, data_B: torch.Tensor) -> torch.Tensor:
        """This tensor's bytes as the tensor that they are."""
        return data_B.view(_TYPES[self.dtype]).view(self.shape)


Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change: what tells that a file is no longer the one that was looked into."""


def stamp_of(file: Path | int) -> Stamp:
    """Raises OSError for a file that is no longer there."""
    found = os.stat(file)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class Checkpoint:
    """The tensors of a checkpoint directory. Raises ValueError naming file, expected and found when it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.stamps: dict[Path, Stamp] = {}
        """Each file as it was before its header was read."""
        self._open: OrderedDict[Path, Any] = OrderedDict()
        files, expected = _files_of(path)
        for file in files:
            self.stamps[file] = stamp_of(file)
            for entry in read_header(file):
                if entry.name in self.entries:
                    other = self.entries[entry.name].file.name
                    raise ValueError(f"checkpoint: tensor {entry.name} is in both {other} and {file.name}")
                if entry.dtype not in _TYPES:
                    raise ValueError(
                        f"checkpoint: tensor {entry.name} in {file.name} has type {entry.dtype}; expected one of"
                        f" {', '.join(sorted(_TYPES))}"
                    )
                self.entries[entry.name] = entry
        for name, file in expected.items():
            if name not in self.entries or self.entries[name].file != file:
                raise ValueError(f"checkpoint: tensor {name} is missing: {INDEX} expects it in {file.name}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(e.nbytes for e in self.entries.values())

    @property
    def fingerprint(self) -> str:
        """The same for equal headers, configuration and a sample of the weights: reading all would take too long."""
        digest = hashlib.blake2b(digest_size=16)
        entries = sorted(self.entries.values(), key=lambda e: e.name)
        for i, entry in enumerate(entries):
            digest.update(repr((entry.name, entry.file.name, entry.dtype, entry.shape)).encode())
            if i % math.ceil(len(entries) / SAMPLES) == 0:
                file = self._file(entry.file)
                file.seek(entry.begin + entry.nbytes // 2)
                digest.update(file.read(min(SAMPLE_BYTES, entry.nbytes - entry.nbytes // 2)))
        config = self.path / "config.json"
        if config.is_file():
            digest.update(config.read_bytes())
        return digest.hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor, in memory of its own."""
        return self.read_part(self.entries[name])

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def read_part(self, entry: Entry) -> torch.Tensor:
        """A stored tensor or a row of one, in memory of its own."""
        tensor = torch.empty(entry.shape, dtype=_TYPES[entry.dtype])
        data: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        room = memoryview(data)
        try:
            file = self._file(entry.file)
            file.seek(entry.begin)
            got = 0
            while got < len(room) and (count := file.readinto(room[got:])):
                got += count
        except OSError as error:
            raise ValueError(f"checkpoint: {entry.file.name} cannot be read: {error.strerror or error}") from error
        if got < len(room):
            raise ValueError(f"checkpoint: {entry.file.name} ends within tensor {entry.name}; it was cut while in use")
        return tensor

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[path] = path.open("rb", buffering=0)
        self._open.move_to_end(path)
        return self._open[path]


def read_header(file: Path) -> list[Entry]:
    """The tensors that a safetensors file says it holds, checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise ValueError(
                f"checkpoint: {file.name} is truncated or not safetensors: {size} bytes, header of {length}"
            )
        try:
            header = json.loads(stream.read(length))
            entries = [_entry(file, name, info, 8 + length) for name, info in header.items() if name != "__metadata__"]
            header.pop("__metadata__", None)
            places = sorted((*map(int, info["data_offsets"]), name) for name, info in header.items())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"checkpoint: {file.name} has a damaged header: {error}") from error
    position = 0
    for begin, end, name in places:
        if begin != position:
            raise ValueError(
                f"checkpoint: {file.name} has a damaged header: tensor {name} expected at byte {position}, found"
                f" at {begin}"
            )
        position = end
    expected = 8 + length + position
    if size < expected:
        cut = next(name for _, end, name in places if 8 + length + end > size)
        raise ValueError(
            f"checkpoint: {file.name} is truncated in tensor {cut}: expected {expected} bytes, found {size}"
        )
    if size > expected:
        raise ValueError(f"checkpoint: {file.name} is too long: expected {expected} bytes, found {size}")
    return entries


def _entry(file: Path, name: str, info: dict[str, Any], start: int) -> Entry:
    shape = tuple(int(n) for n in info["shape"])
    begin, end = (int(n) for n in info["data_offsets"])
    if info["dtype"] not in _ITEM_BYTES:
        raise ValueError(f"tensor {name} has the unknown type {info['dtype']}")
    needed = math.prod(shape) * _ITEM_BYTES[info["dtype"]]
    if begin < 0 or end - begin != needed:
        raise ValueError(f"tensor {name} of shape {list(shape)} needs {needed} bytes, found {end - begin}")
    return Entry(name=name, file=file, dtype=info["dtype"], shape=shape, nbytes=needed, begin=start + begin)


def _files_of(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The directory's safetensors files, and which tensor the index expects in which."""
    index, single = path / INDEX, path / SINGLE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            expected = {str(name): path / str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"checkpoint: {index} is damaged: {error}") from error
        files = sorted(set(expected.values()))
        for file in files:
            if file.parent != path or not file.is_file():
                raise ValueError(f"checkpoint: {INDEX} expects {file.name}, which is not in {path}")
        return files, expected
    if single.is_file():
        return [single], {}
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    hint = f"; {pickles[0]} is a pickle, save it again as safetensors" if pickles else ""
    raise ValueError(f"checkpoint: {path} has neither {SINGLE} nor {INDEX}{hint}")
