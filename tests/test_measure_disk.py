"""What a read costs, measured; and `moeyard bench disk`."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import tiny

from moeyard.__main__ import main
from moeyard.engine.config import EngineConfig
from moeyard.engine.expert_files import BLOCK, PIECE_BYTES, ExpertFiles
from moeyard.engine.loader import draw
from moeyard.engine.measure_disk import measure_disk
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
