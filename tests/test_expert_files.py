"""Experts read straight from their files: the same bytes, past the page cache, and no others after a change."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import random
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from moeyard.engine import expert_files
from moeyard.engine.config import EngineConfig
from moeyard.engine.expert_files import BLOCK, AlignedBuffer, ExpertFiles, ExpertUnreadable
from moeyard.engine.expert_reader import ExpertReader
from moeyard.engine.loader import draw

DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])


def readers_of(path: Path, dtype: str = "float32") -> list[ExpertReader]:
    blueprint = draw(EngineConfig(model=str(path), dtype=dtype, device="cpu"), path)
    return [blueprint.weights.reader(spec) for spec in blueprint.spec.experts]


def stored_as(path: Path, dtype: torch.dtype) -> Path:
    for file in path.glob("*.safetensors"):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return path


def dirty(files: ExpertFiles) -> AlignedBuffer:
    """A buffer that has something else in it."""
    buffer = AlignedBuffer(files.buffer_bytes)
    buffer.data_B.fill_(0x5A)
    return buffer


def assert_equal(read: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(read) == list(wanted)
    for name in wanted:
        assert read[name].dtype == wanted[name].dtype and torch.equal(read[name], wanted[name]), name


REARRANGED = {"gpt_oss"}
"""Architectures whose experts are not stored as layers compute with them."""


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@DIRECT
def test_every_expert_of_every_architecture(architecture: str, direct: bool, tmp_path: Path) -> None:
    path = tiny.save(architecture, tmp_path / "model", max_shard_size="60KB")
    readers = readers_of(path)
    files = ExpertFiles(readers, direct=direct)
    assert len(files.files) > 1 and (direct or not files.direct)
    buffer = dirty(files)
    for layer, reader in enumerate(readers):
        for expert in range(reader.spec.num_experts):
            wanted = reader.read(expert)
            assert_equal(files.read(layer, expert, buffer), wanted)
            if files.in_place:
                placed = files.placed(layer, expert, buffer)
                assert_equal({name: torch.cat(blocks) for name, blocks in placed.items()}, wanted)
                begin, end = buffer.data_B.data_ptr(), buffer.data_B.data_ptr() + buffer.nbytes
                assert all(begin <= block.data_ptr() < end for blocks in placed.values() for block in blocks)
                assert files.place_bytes >= reader.nbytes and files.place_bytes % BLOCK == 0
    assert files.in_place == (architecture not in REARRANGED)
    assert files.num_experts_L == [r.spec.num_experts for r in readers]
    files.close()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_files_and_what_they_are_copied_into(architecture: str, dtype: str, tmp_path: Path) -> None:
    path = stored_as(tiny.save(architecture, tmp_path / "model"), torch.bfloat16)
    readers = readers_of(path, dtype)
    files = ExpertFiles(readers)
    buffer = dirty(files)
    for expert in (0, 4, 5):
        wanted = readers[1].read(expert)
        assert_equal(files.read(1, expert, buffer), wanted)
        for transposed in (False, True):
            into = {}
            for name, tensor in wanted.items():
                room = torch.empty(tensor.shape[::-1] if transposed else tensor.shape, dtype=readers[1].dtype(name))
                into[name] = room.t() if transposed and room.dim() == 2 else room
            files.copy(1, expert, buffer, into)
            assert_equal(into, {name: tensor.to(readers[1].dtype(name)) for name, tensor in wanted.items()})


def test_what_is_copied_is_not_assembled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = readers_of(tiny.save("qwen3_moe", tmp_path / "model"))
    files = ExpertFiles(readers)
    buffer = dirty(files)
    wanted = files.read(0, 3, buffer)
    joined: list[str] = []
    original = ExpertReader.assemble

    def noted(reader: ExpertReader, parameter: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        joined.append(parameter)
        return original(reader, parameter, stored)

    monkeypatch.setattr(ExpertReader, "assemble", noted)
    into = {name: torch.zeros(t.shape) for name, t in wanted.items()}
    files.copy(0, 3, buffer, into)
    assert_equal(into, wanted)
    assert "gate_up_proj" not in joined


def test_an_expert_whose_parts_lie_together_is_one_extent(tmp_path: Path) -> None:
    readers = readers_of(tiny.save("qwen3_moe", tmp_path / "model"))
    files = ExpertFiles(readers)
    for layer, reader in enumerate(readers):
        (extent,) = files.extents(layer, 2)
        assert extent.nbytes == reader.nbytes
        assert extent.first % BLOCK == extent.last % BLOCK == 0
        assert files.buffer_bytes >= extent.last - extent.first


def test_what_is_not_in_place(tmp_path: Path) -> None:
    """Other types than the model's are converted; and a file whose header ends anywhere aligns nothing."""
    path = tiny.save("qwen3_moe", tmp_path / "model")
    assert ExpertFiles(readers_of(path)).in_place
    assert not ExpertFiles(readers_of(path, "bfloat16")).in_place
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    assert not ExpertFiles(readers_of(path)).in_place


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@DIRECT
def test_headers_of_any_length(architecture: str, direct: bool, tmp_path: Path) -> None:
    """Older writers did not pad headers, so that no tensor lies at a multiple of its item's size."""
    path = tiny.save(architecture, tmp_path / "model")
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for pad in (1, 2, 3):
        file.write_bytes((length + pad).to_bytes(8, "little") + data[8 : 8 + length] + b" " * pad + data[8 + length :])
        readers = readers_of(path)
        files = ExpertFiles(readers, direct=direct)
        assert_equal(files.read(1, 5, dirty(files)), readers[1].read(5))


@DIRECT
def test_reads_that_end_early_go_on(direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may give less than was asked for, at any byte, and pieces are smaller than an expert."""
    monkeypatch.setattr(expert_files, "PIECE_BYTES", 2 * BLOCK)
    readers = readers_of(tiny.save("mixtral", tmp_path / "model"))
    files = ExpertFiles(readers, direct=direct)
    rng = random.Random(0)
    original = files._pread
    counts = []

    def short(file: int, room: memoryview, begin: int) -> int:
        assert begin % BLOCK == len(room) % BLOCK == 0 and len(room) <= 2 * BLOCK
        counts.append(min(original(file, room, begin), rng.randint(BLOCK, 2 * BLOCK)))
        room[counts[-1] :] = bytes(len(room) - counts[-1])
        return counts[-1]

    monkeypatch.setattr(files, "_pread", short)
    for expert in range(6):
        assert_equal(files.read(2, expert, dirty(files)), readers[2].read(expert))
    assert any(count % BLOCK for count in counts)


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    readers = readers_of(tiny.save("olmoe", tmp_path / "model", max_shard_size="40KB"))
    files = ExpertFiles(readers)
    wanted = {(layer, e): readers[layer].read(e) for layer in range(3) for e in range(8)}

    def some(seed: int) -> None:
        order = random.Random(seed).sample(sorted(wanted), len(wanted))
        buffer = dirty(files)
        for layer, expert in order:
            assert_equal(files.read(layer, expert, buffer), wanted[layer, expert])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(8)))


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def _replace(file: Path) -> None:
    copy = file.with_suffix(".new")
    shutil.copy2(file, copy)
    copy.rename(file)


def _overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\1\2\3\4")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, "is no longer there"),
    "cut": (_cut, "was changed .* it had .* bytes and now has"),
    "replaced": (_replace, "was replaced by another file"),
    "overwritten": (_overwrite, "was changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("when", ["before opening", "before reading", "while reading"])
@DIRECT
def test_damage_while_serving_is_named(
    kind: str, when: str, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.save("qwen3_moe", tmp_path / "model", max_shard_size="60KB")
    readers = readers_of(path)
    damage, reason = DAMAGE[kind]
    message = rf"^checkpoint: expert \d of MoE layer \d cannot be read: model-.*safetensors {reason}"
    if when == "before opening":
        damage(readers[1].checkpoint.entries["model.layers.1.mlp.experts.3.up_proj.weight"].file)
        with pytest.raises(ExpertUnreadable, match=message):
            ExpertFiles(readers, direct=direct)
        return
    files = ExpertFiles(readers, direct=direct)
    buffer = AlignedBuffer(files.buffer_bytes)
    files.read(1, 3, buffer)
    victim = files.extents(1, 3)[0].file
    if when == "before reading":
        damage(victim)
    else:
        original = files._pread

        def meanwhile(file: int, room: memoryview, begin: int) -> int:
            count = original(file, room, begin)
            monkeypatch.undo()
            damage(victim)
            return count

        monkeypatch.setattr(files, "_pread", meanwhile)
    with pytest.raises(ExpertUnreadable, match=message) as error:
        files.read(1, 3, buffer)
    assert (error.value.file, error.value.layer, error.value.expert) == (victim, 1, 3)
    other = next(e for e in range(8) if all(x.file != victim for x in files.extents(0, e)))
    assert_equal(files.read(0, other, buffer), readers[0].read(other))  # other files are read still


@pytest.mark.parametrize("given", [0, BLOCK], ids=["nothing", "a block"])
def test_a_disk_that_gives_less(given: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = readers_of(tiny.save("mixtral", tmp_path / "model"))
    files = ExpertFiles(readers)
    original = files._pread
    first = files.extents(0, 0)[0].first
    monkeypatch.setattr(
        files, "_pread", lambda file, room, begin: original(file, room[:given], begin) if begin == first else 0
    )
    with pytest.raises(ExpertUnreadable, match=f"ends at byte {first + given} in the middle of a tensor"):
        files.read(0, 0, AlignedBuffer(files.buffer_bytes))


def test_an_error_of_the_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ExpertFiles(readers_of(tiny.save("mixtral", tmp_path / "model")))

    def broken(file: int, room: memoryview, begin: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_pread", broken)
    with pytest.raises(ExpertUnreadable, match=r"model.safetensors gave an error: Input/output error"):
        files.read(0, 0, AlignedBuffer(files.buffer_bytes))


def test_where_reads_cannot_be_direct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readers = readers_of(tiny.save("mixtral", tmp_path / "model"))
    opened = os.open

    def refuses(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refuses)
    with caplog.at_level(logging.INFO, "moeyard.expert_files"):
        files = ExpertFiles(readers)
    assert not files.direct and "through the page cache, and dropped" in caplog.text
    assert_equal(files.read(0, 1, dirty(files)), readers[0].read(1))


def cached_pages(file: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    size = file.stat().st_size
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start
        if failed:
            pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
        return sum(p & 1 for p in pages)


@DIRECT
def test_the_page_cache_does_not_grow(direct: bool, tmp_path: Path) -> None:
    path = tiny.save("mixtral", tmp_path / "model", intermediate_size=400)
    file = path / "model.safetensors"
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    readers = readers_of(path)
    files = ExpertFiles(readers, direct=direct)
    if direct and not files.direct:
        pytest.skip("this file system has no O_DIRECT")
    readers[0].read(0)
    assert cached_pages(file) > 0  # what ordinary reading leaves behind
    files.drop_cached_pages()
    if cached_pages(file):
        pytest.skip("this file system keeps pages although it is told not to")
    buffer = AlignedBuffer(files.buffer_bytes)
    for layer in range(len(readers)):
        for expert in range(readers[layer].spec.num_experts):
            files.read(layer, expert, buffer)
    assert cached_pages(file) == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_large_buffers_ask_for_huge_pages() -> None:
    def flags(buffer: AlignedBuffer) -> list[str]:
        """Of the mapping that the buffer is in, as Linux shows them."""
        address, inside = buffer.data_B.data_ptr(), False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, *rest = line.split()
            if first == "VmFlags:":
                if inside:
                    return rest
            elif "-" in first and not first.endswith(":"):
                low, high = (int(end, 16) for end in first.split("-"))
                inside = low <= address < high
        return []

    assert "hg" in flags(AlignedBuffer(4 * 2**20))
    assert "hg" in flags(AlignedBuffer(4 * 2**20).split(2**20)[1])
    assert "hg" not in flags(AlignedBuffer(BLOCK))
