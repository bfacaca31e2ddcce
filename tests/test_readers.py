"""The readers' order: the most urgent first, in between pieces too; cancelling, promoting, failing and closing."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, wait
from pathlib import Path

import pytest
import tiny
import torch

from moeyard.engine.config import EngineConfig
from moeyard.engine.expert_files import AlignedBuffer, ExpertFiles, ExpertUnreadable
from moeyard.engine.loader import draw
from moeyard.engine.readers import Priority, Read, Readers, ReadersFull

BOUND_S = 60


def room() -> dict[str, torch.Tensor]:
    return {"expert": torch.zeros(2, dtype=torch.int64)}


def readers_of(source: Gated, *, threads: int = 1, spare: int = 1, depth: int = 256, behind: int = 1) -> Readers:
    buffers = [AlignedBuffer(1) for _ in range(threads + spare)]
    return Readers(source, buffers, threads=threads, depth=depth, behind=behind)


class Gated:
    """A source whose every piece waits until the test lets it be read, and which writes down what was read."""

    def __init__(self, pieces: int = 1):
        self.count = pieces
        self.checked: list[int] = []
        self.read: list[tuple[int, int]] = []
        self.allowed = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.fail: set[int] = set()

    def pieces(self, layer: int, expert: int) -> Sequence[int]:
        return range(self.count)

    def read_piece(self, layer: int, expert: int, piece: int, buffer: AlignedBuffer) -> int:
        self.begun.release()
        assert self.allowed.acquire(timeout=BOUND_S)
        if expert in self.fail:
            raise ExpertUnreadable(Path("a.safetensors"), layer, expert, "is no longer there")
        self.read.append((expert, piece))
        return 1

    def check(self, layer: int, expert: int) -> None:
        self.checked.append(expert)

    def copy(self, layer: int, expert: int, buffer: AlignedBuffer, into: Mapping[str, torch.Tensor]) -> None:
        into["expert"].copy_(torch.tensor([layer, expert]))

    def wait_for_a_read(self) -> None:
        assert self.begun.acquire(timeout=BOUND_S)

    def allow(self, pieces: int = 1) -> None:
        for _ in range(pieces):
            self.allowed.release()

    @property
    def experts(self) -> list[int]:
        return list(dict.fromkeys(expert for expert, _ in self.read))


def test_the_most_urgent_first_and_the_oldest_of_them() -> None:
    source = Gated()
    readers = readers_of(source)
    first = readers.submit(0, 0, room(), Priority.BACKGROUND)
    source.wait_for_a_read()
    order = [(1, Priority.BACKGROUND), (2, Priority.LATER), (3, Priority.DEMAND), (4, Priority.NEXT_LAYER)]
    order += [(5, Priority.DEMAND), (6, Priority.LATER)]
    reads = [first, *(readers.submit(0, expert, room(), priority) for expert, priority in order)]
    assert readers.waiting == 6
    source.allow(7)
    assert not wait(reads, BOUND_S).not_done
    assert source.experts == [0, 3, 5, 4, 2, 6, 1]
    assert [r.result()["expert"].tolist() for r in reads] == [[0, e] for e in range(7)]
    readers.close()


def test_demand_overtakes_a_read_between_its_pieces() -> None:
    source = Gated(pieces=3)
    readers = readers_of(source)
    slow = readers.submit(0, 1, room(), Priority.BACKGROUND)
    behind = readers.submit(0, 2, room(), Priority.BACKGROUND)
    source.wait_for_a_read()
    urgent = readers.submit(0, 3, room())
    source.allow(9)
    assert not wait([slow, behind, urgent], BOUND_S).not_done
    assert source.read == [(1, 0), *((3, i) for i in range(3)), (1, 1), (1, 2), *((2, i) for i in range(3))]
    readers.close()


def test_a_promoted_read_is_read_once_and_sooner() -> None:
    source = Gated()
    readers = readers_of(source)
    reads = [readers.submit(0, 0, room())]
    source.wait_for_a_read()
    reads += [readers.submit(0, expert, room(), Priority.NEXT_LAYER) for expert in (1, 2)]
    reads += [readers.submit(0, 3, room(), Priority.BACKGROUND)]
    readers.promote(reads[3])
    readers.promote(reads[3], Priority.LATER)  # no demotion
    readers.promote(reads[0])
    assert readers.waiting == 3
    source.allow(9)
    assert not wait(reads, BOUND_S).not_done
    assert source.read == [(e, 0) for e in (0, 3, 1, 2)]
    readers.promote(reads[3])
    assert readers.waiting == 0
    readers.close()


def test_what_has_not_started_can_be_cancelled() -> None:
    source = Gated()
    readers = readers_of(source)
    started = readers.submit(0, 0, room())
    source.wait_for_a_read()
    dropped, kept = (readers.submit(0, expert, room(), Priority.LATER) for expert in (1, 2))
    assert not started.cancel() and dropped.cancel()
    assert readers.waiting == 1
    source.allow(2)
    assert not wait([started, dropped, kept], BOUND_S).not_done
    assert source.experts == [0, 2]
    with pytest.raises(CancelledError):
        dropped.result()
    readers.close()


def test_the_queue_has_an_end_but_not_for_demand() -> None:
    source = Gated()
    readers = readers_of(source, depth=2)
    readers.submit(0, 0, room())
    source.wait_for_a_read()
    waiting = [readers.submit(0, expert, room(), Priority.LATER) for expert in (1, 2)]
    with pytest.raises(ReadersFull, match="2 reads are waiting"):
        readers.submit(0, 3, room(), Priority.NEXT_LAYER)
    last = readers.submit(0, 4, room())
    assert all(read.cancel() for read in waiting)
    waiting.append(readers.submit(0, 5, room(), Priority.LATER))
    source.allow(9)
    assert not wait([last, *waiting], BOUND_S).not_done
    assert source.experts == [0, 4, 5]
    readers.close()


def test_a_failed_read_raises_and_the_next_goes_on() -> None:
    source = Gated()
    source.fail = {1}
    readers = readers_of(source)
    into = room()
    failed = readers.submit(4, 1, into)
    good = readers.submit(4, 2, room())
    source.allow(2)
    with pytest.raises(ExpertUnreadable, match="expert 1 of MoE layer 4"):
        failed.result(BOUND_S)
    assert good.result(BOUND_S)["expert"].tolist() == [4, 2] and into["expert"].tolist() == [0, 0]
    filled = readers.submit(4, 3, into)
    source.allow()
    assert filled.result(BOUND_S) is into and into["expert"].tolist() == [4, 3]
    readers.close()


@pytest.mark.parametrize(
    ("spare", "order"),
    [(0, "bbbdddnnnlll"), (1, "bllldddnnnbb"), (2, "blnnndddllbb"), (3, "blndddnnllbb")],
)
def test_reads_are_set_aside_while_buffers_are_free(spare: int, order: str) -> None:
    source = Gated(pieces=3)
    readers = readers_of(source, spare=spare)
    reads = []
    for expert, priority in enumerate(reversed(Priority)):
        reads.append(readers.submit(0, expert, room(), priority))
        if expert:
            source.allow()
        source.wait_for_a_read()
    source.allow(9)
    assert not wait(reads, BOUND_S).not_done
    assert "".join("blnd"[expert] for expert, _ in source.read) == order
    assert sorted(source.read) == [(e, i) for e in range(4) for i in range(3)]
    readers.close()


def test_one_that_was_set_aside_goes_on_where_demand_has_no_buffer() -> None:
    source = Gated(pieces=4)
    readers = readers_of(source, threads=2, spare=0, behind=2)
    aside = readers.submit(0, 0, room(), Priority.BACKGROUND)
    for _ in range(2):
        source.wait_for_a_read()
    first, second = (readers.submit(0, expert, room()) for expert in (1, 2))
    for _ in range(4):
        source.allow()
        source.wait_for_a_read()
    assert readers.in_flight(first) == 2 and not readers.in_flight(aside)
    source.allow()
    source.wait_for_a_read()
    assert readers.in_flight(first) == readers.in_flight(aside) == 1 and not readers.in_flight(second)
    source.allow(12)
    assert not wait([aside, first, second], BOUND_S).not_done
    assert sorted(source.read) == [(e, i) for e in range(3) for i in range(4)]
    readers.close()


def test_the_disk_is_demands_and_then_one_others() -> None:
    source = Gated(pieces=2)
    readers = readers_of(source, threads=3, spare=1)
    others = [readers.submit(0, expert, room(), Priority.LATER) for expert in (0, 1)]
    source.wait_for_a_read()
    assert readers.waiting == 1  # there are threads, but only one is for those that nobody waits for
    demand = readers.submit(0, 2, room())
    source.wait_for_a_read()
    source.allow(6)
    assert demand.result(BOUND_S)["expert"].tolist() == [0, 2]
    assert not wait(others, BOUND_S).not_done
    begun, *rest = [piece for piece in source.read if piece[0] != 2]
    assert begun == (0, 0) and rest == [(0, 1), (1, 0), (1, 1)]
    assert source.read[-3:] == rest  # all but the piece that was being read come after the demand
    readers.close()


def test_every_read_ends_once_whatever_overtakes_it() -> None:
    source = Gated(pieces=4)
    source.allow(10_000)
    rng = random.Random(0)
    for threads, spare in ((1, 2), (2, 1), (4, 1), (4, 4)):
        source.read.clear()
        readers = readers_of(source, threads=threads, spare=spare, depth=10_000)
        reads: list[Read] = []
        for expert in range(500):
            reads.append(readers.submit(0, expert, room(), rng.choice(list(Priority))))
            if rng.random() < 0.2:
                readers.promote(rng.choice(reads), rng.choice(list(Priority)))
            if rng.random() < 0.1:
                rng.choice(reads).cancel()
        assert not wait(reads, BOUND_S).not_done
        kept = [e for e, read in enumerate(reads) if not read.cancelled()]
        assert [reads[e].result()["expert"].tolist() for e in kept] == [[0, e] for e in kept]
        assert sorted(source.read) == [(e, i) for e in kept for i in range(4)]
        assert readers.waiting == 0
        readers.close()


def test_several_are_in_flight() -> None:
    source = Gated()
    readers = readers_of(source, threads=3)
    reads = [readers.submit(0, expert, room()) for expert in range(5)]
    for _ in range(3):
        source.wait_for_a_read()
    assert readers.waiting == 2 and not source.read
    source.allow(5)
    assert not wait(reads, BOUND_S).not_done
    readers.close()


def test_threads_share_the_pieces_of_one_read_and_then_of_the_next() -> None:
    source = Gated(pieces=3)
    readers = readers_of(source, threads=2)
    first, second = (readers.submit(0, expert, room()) for expert in (0, 1))
    for _ in range(2):
        source.wait_for_a_read()
    assert readers.in_flight(first) == 2 and not readers.in_flight(second)
    source.allow()
    source.wait_for_a_read()
    assert readers.in_flight(first) == 2 and not readers.in_flight(second)
    source.allow()
    source.wait_for_a_read()
    assert readers.in_flight(first) == readers.in_flight(second) == 1 and not source.checked
    source.allow(4)
    assert first.result(BOUND_S)["expert"].tolist() == [0, 0]
    assert second.result(BOUND_S)["expert"].tolist() == [0, 1]
    assert sorted(source.read) == [(e, i) for e in range(2) for i in range(3)] and sorted(source.checked) == [0, 1]
    readers.close()


@pytest.mark.parametrize("end", ["fails", "is abandoned"])
def test_a_read_at_which_several_are_ends_when_the_last_of_them_does(end: str) -> None:
    source = Gated(pieces=4)
    readers = readers_of(source, threads=2)
    read = readers.submit(0, 1, room())
    for _ in range(2):
        source.wait_for_a_read()
    if end == "fails":
        source.fail = {1}
    else:
        readers.abandon(read)
    source.allow()
    readers.submit(0, 2, room())
    source.wait_for_a_read()  # of the other one
    assert not read.done()
    source.allow(9)
    assert isinstance(read.exception(BOUND_S), ExpertUnreadable if end == "fails" else CancelledError)
    assert not read.into["expert"].any() and source.checked in ([], [2])
    assert not [at for at in source.read if at[0] == 1 and at[1] > 1]
    readers.close()


def test_closing_ends_every_read() -> None:
    source = Gated(pieces=2)
    readers = readers_of(source)
    aside = readers.submit(0, 0, room(), Priority.LATER)
    source.wait_for_a_read()
    running = readers.submit(0, 1, room())
    source.allow()
    source.wait_for_a_read()  # of the second; the first is set aside
    waiting = readers.submit(0, 2, room())
    with pytest.raises(TimeoutError, match=r"after 0 s the disk has not given expert 1 of MoE layer 0$"):
        readers.close(timeout_s=0)
    source.allow()
    readers.close()
    for read in (aside, running, waiting):
        with pytest.raises(CancelledError):
            read.result(BOUND_S)
    assert source.read == [(0, 0), (1, 0)]
    with pytest.raises(RuntimeError, match="closed"):
        readers.submit(0, 3, room())


def test_a_buffer_for_each_thread() -> None:
    for threads in (0, 2):
        with pytest.raises(ValueError, match=rf"threads is {threads}; .* a buffer for each \(here 1\)"):
            Readers(Gated(), [AlignedBuffer(1)], threads=threads)


def test_experts_of_a_checkpoint(tmp_path: Path) -> None:
    path = tiny.save("deepseek_v3", tmp_path / "model", max_shard_size="60KB")
    blueprint = draw(EngineConfig(model=str(path), dtype="bfloat16", device="cpu"), path)
    layers = [blueprint.weights.reader(spec) for spec in blueprint.spec.experts]
    files = ExpertFiles(layers)
    readers = Readers(files, [AlignedBuffer(files.buffer_bytes) for _ in range(5)], threads=3)
    all_ = [(layer, e) for layer, reader in enumerate(layers) for e in range(reader.spec.num_experts)]
    reads = []
    for i, which in enumerate(all_ * 4):
        into = {p: torch.empty(layers[0].shape(p), dtype=torch.bfloat16) for p in layers[0].spec.parameters}
        reads.append(readers.submit(*which, into, list(Priority)[i % 4]))
    for (layer, expert), read in zip(all_ * 4, reads, strict=True):
        wanted = layers[layer].read(expert)
        for name, tensor in read.result(BOUND_S).items():
            assert torch.equal(tensor, wanted[name].to(tensor.dtype)), (layer, expert, name)
    readers.close()
    files.close()


def test_an_abandoned_read_ends_after_its_piece_and_writes_nothing() -> None:
    source = Gated(pieces=3)
    readers = readers_of(source)
    running, waits = (readers.submit(0, expert, room()) for expert in (1, 2))
    source.wait_for_a_read()
    readers.abandon(waits)
    assert waits.cancelled()
    readers.abandon(running)
    assert not running.done()
    source.allow()
    assert isinstance(running.exception(BOUND_S), CancelledError)
    assert source.read == [(1, 0)] and not running.into["expert"].any()
    source.allow(3)
    assert readers.submit(0, 3, room()).result(BOUND_S)["expert"].tolist() == [0, 3]
    readers.abandon(running)  # nothing to end any more
    readers.close()


def test_an_abandoned_read_that_was_set_aside_gives_its_buffer_back_at_once() -> None:
    source = Gated(pieces=2)
    readers = readers_of(source)
    aside = readers.submit(0, 1, room(), Priority.LATER)
    source.wait_for_a_read()
    urgent = readers.submit(0, 2, room())
    source.allow()
    source.wait_for_a_read()
    assert source.read == [(1, 0)]
    readers.abandon(aside)
    assert isinstance(aside.exception(BOUND_S), CancelledError) and len(readers._free) == 1
    source.allow(2)
    assert urgent.result(BOUND_S)["expert"].tolist() == [0, 2]
    source.allow(2)
    assert readers.submit(0, 4, room()).result(BOUND_S)["expert"].tolist() == [0, 4]
    assert source.read == [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)]
    readers.close()
