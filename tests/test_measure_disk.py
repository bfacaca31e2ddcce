"""What a read costs, measured; and `moeyard bench disk`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest
import tiny

from moeyard.__main__ import main
from moeyard.engine import constants
from moeyard.engine import measure_disk as measure_disk_module
from moeyard.engine.config import EngineConfig
from moeyard.engine.expert_files import BLOCK, PIECE_BYTES, ExpertFiles
from moeyard.engine.loader import draw
from moeyard.engine.measure_disk import IN_FLIGHT, disk_constants, disk_of, measure_disk
from moeyard.engine.offload_plan import plan_offload
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_experts_blocks_and_whole_files_are_timed(direct: bool, tmp_path: Path) -> None:
    path = tiny.save("qwen3_moe", tmp_path / "model", max_shard_size="60KB")
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    readers = [blueprint.weights.reader(spec) for spec in blueprint.spec.experts]
    files = ExpertFiles(readers, direct=direct)
    cost, samples = measure_disk(files, in_flight=(1, 3), case_s=0.01, rounds=2)
    assert cost.expert_bytes == readers[0].nbytes
    assert {n: [nbytes for nbytes, _ in s] for n, s in samples.items() if n} == {
        n: [readers[0].nbytes, BLOCK] * 2 for n in (1, 3)
    }
    assert all(0 < nbytes <= PIECE_BYTES and ns > 0 for nbytes, ns in samples[0]) and len(samples[0]) == 2
    assert set(cost.reads) == {1, 3} and cost.sequential_fs_per_byte > 0 and cost.best in (1, 3)


def test_several_reads_are_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.save("mixtral", tmp_path / "model")
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    files = ExpertFiles([blueprint.weights.reader(spec) for spec in blueprint.spec.experts])
    together = threading.Barrier(3, timeout=60)
    original = files._pread

    def all_three(file: int, room: memoryview, begin: int) -> int:
        together.wait()
        return original(file, room, begin)

    monkeypatch.setattr(files, "_pread", all_three)
    measure_disk(files, in_flight=(3,), case_s=0.0, rounds=1)  # would break the barrier with fewer


def test_the_best_number_in_flight_is_the_fewest_that_are_soonest() -> None:
    def cost(reads: dict[int, LinkCost], expert_bytes: int) -> DiskCost:
        return DiskCost(reads=reads, sequential_fs_per_byte=1, expert_bytes=expert_bytes)

    reads = {1: LinkCost(100, 10**6), 4: LinkCost(50, 10**6), 8: LinkCost(50, 10**6)}
    assert cost(reads, 1000).best == 4
    assert cost(reads, 1000).time_ns(3, 1) == 3 * 1100
    assert cost(reads | {2: LinkCost(900, 10**5)}, 1000).best == 2


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExpertFiles]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(measure_disk_module, "CASE_S", 0.0)
    path = tiny.save("qwen3_moe", tmp_path / "model")
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    with closing(ExpertFiles([blueprint.weights.reader(spec) for spec in blueprint.spec.experts])) as opened:
        yield opened


def no_measuring(*args: object, **kwargs: object) -> NoReturn:
    pytest.fail("there is a file")


def test_it_is_measured_once_and_kept(files: ExpertFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    record = disk_constants(files)
    assert record.path.exists() and set(record.values.reads) == set(IN_FLIGHT)
    assert set(record.samples) == {"sequential", *map(str, IN_FLIGHT)}
    assert record.key["disk"] == disk_of(files.files[0]) and record.key["direct"] == files.direct
    assert record.key["expert_bytes"] == record.values.expert_bytes == 3 * 48 * 24 * 4
    later = constants._now() + 2 * constants.MAX_AGE
    with monkeypatch.context() as patched:
        patched.setattr(measure_disk_module, "measure_disk", no_measuring)
        assert disk_constants(files).values == record.values
        for stale in ({"force": True}, {}):
            patched.setattr(constants, "_now", lambda stale=stale: later if not stale else later - constants.MAX_AGE)
            with pytest.raises(BaseException, match="there is a file"):
                disk_constants(files, **stale)
    assert disk_constants(files).samples != record.samples  # `force` has removed it


def test_reads_in_flight_are_the_best_number_measured(files: ExpertFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    key = measure_disk_module.key_of(files)
    for best in IN_FLIGHT:
        reads = {n: LinkCost(0 if n == best else 10**9, 10) for n in IN_FLIGHT}
        constants.forget("disk")
        constants.save("disk", key, DiskCost(reads=reads, sequential_fs_per_byte=1, expert_bytes=9), {})
        assert disk_constants(files).values.best == best


def test_a_start_reads_as_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are the readers of its store, as far as its memory goes; from the file, or measured for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = tiny.save("qwen3_moe", tmp_path / "model", num_experts=32)
    config = EngineConfig(model=str(path), dtype="float32", device="cpu", expert_memory="50%", progress=False)
    blueprint = draw(config, path)
    for best in (1, 2):
        reads = {n: LinkCost(0 if n == best else 10**9, 10) for n in IN_FLIGHT}
        cost = DiskCost(reads=reads, sequential_fs_per_byte=1, expert_bytes=9)
        monkeypatch.setattr(measure_disk_module, "measure_disk", lambda files, cost=cost, **options: (cost, {}))
        constants.forget("disk")
        for _ in range(2):
            plan = plan_offload(config, blueprint)
            assert plan is not None and plan.size.readers == best
            monkeypatch.setattr(measure_disk_module, "measure_disk", no_measuring)


def test_what_cannot_be_kept_is_measured_once_by_a_process(
    files: ExpertFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_disk_module, "_unsaved", {})
    (tmp_path / "home").write_text("not a directory")
    record = disk_constants(files)
    assert not record.path.exists()
    monkeypatch.setattr(measure_disk_module, "measure_disk", no_measuring)
    assert disk_constants(files) is record


def test_no_round_begins_after_the_budget(files: ExpertFiles) -> None:
    cost, samples = measure_disk(files, in_flight=(1,), case_s=0.0, rounds=5, budget_s=0.0)
    assert len(samples[1]) == 2 and len(samples[0]) == 1 and cost.best == 1


def test_the_disk_is_named_by_the_innermost_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    table = (
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 0:5 / {escaped} rw shared:3 - nfs4 server:/old rw\n"
        f"3 1 0:6 / {escaped} rw - nfs4 server:/x\\040y rw\n"
        f"4 1 0:7 / {escaped}2 rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, *args, **kwargs: table)
    assert disk_of(folder / "file") == f"nfs4 (server:/x y at {folder})"
    assert disk_of(tmp_path / "file") == "ext4 (/dev/sda1 at /)"

    def missing(self: Path) -> NoReturn:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert disk_of(folder) == f"device {folder.stat().st_dev}"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.save("qwen3_moe", tmp_path / "model")
    command = ["bench", "disk", str(path), "--seconds", "0.01", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    assert main([*command, "--in-flight", "1,2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["sequential_mb_per_s"] > 0 and figures["expert_mb_per_s_2"] > 0 and figures["block_us_1"] > 0
    assert figures["expert_bytes"] == 3 * 48 * 24 * 4
    assert set(json.loads((tmp_path / "out.json").read_text())["samples"]) == {"sequential", "1", "2"}
    assert main([*command, "--cached", "--in-flight", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["direct"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--in-flight", "1,1"], "--in-flight is '1,1'; give different numbers"),
        (["--in-flight", "x"], "--in-flight is 'x'"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--seconds", "0"], "--seconds is 0"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "disk", *options]) == 2
    assert message in capsys.readouterr().err
