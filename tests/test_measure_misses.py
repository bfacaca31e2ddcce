"""What missing experts cost: measured with the CPU in the GPU's place, kept, and shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import tiny
import torch

from moeyard.__main__ import main
from moeyard.engine import measure_misses
from moeyard.engine.config import EngineConfig
from moeyard.engine.host_compute import HostCompute
from moeyard.engine.host_experts import HostPool
from moeyard.engine.loader import draw, load
from moeyard.engine.measure_misses import fit, miss_constants
from moeyard.engine.moe import MoELayer
from moeyard.engine.store import ExpertLate
from moeyard.kernels.threads import set_threads
from moeyard.launch import machine
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.misses import MissCosts

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture
def parts(model, tmp_path, monkeypatch):
    """A layer, its experts in host memory too, and who computes those."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure_misses, "_ROWS_PER_EXPERT", (1, 4, 8))
    monkeypatch.setattr(measure_misses, "_REPEATS", 2)
    set_threads(1)  # numba's own number otherwise, from its first parallel loop on
    blueprint = draw(EngineConfig(model=str(model), dtype="float32", device="cpu"), model)
    layer = load(blueprint, progress=False).layers[0]
    pool = HostPool(layer.pool.reader, 6, blueprint.device)
    for slot in range(6):
        pool.fill(slot, slot)
    compute = HostCompute([MoELayer(blueprint.model.get_submodule(pool.spec.module), pool)], pool, 4)
    with torch.inference_mode():
        yield layer, pool, compute
    assert compute.close(30)
    pool.close()


def test_they_are_measured_once_and_shown(parts, model, capsys, monkeypatch):
    record = miss_constants(*parts, 6)
    assert isinstance(record.values, MissCosts) and record.values.expert_bytes == parts[1].reader.nbytes
    assert record.key["pinned"] is False and record.key["device"] == "cpu"
    assert {name: len(rows[0]) for name, rows in record.samples.items()} == {
        "copy": 2,
        "device": 3,
        "host": 3,
        "both": 2,
    }
    assert {tuple(row[:2]) for row in record.samples["host"]} == {(1, 1), (1, 4), (1, 8), (4, 4), (4, 16), (4, 32)}
    with monkeypatch.context() as patched:
        patched.setattr(measure_misses, "time_misses", lambda *args: pytest.fail("there is a file"))
        assert miss_constants(*parts, 6).values == record.values
    assert miss_constants(*parts, 6, force=True).samples != record.samples

    monkeypatch.setattr(machine, "rates", lambda: iter(()))
    assert main(["doctor", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["constants"]
    assert shown["title"].startswith("missing experts: 8 experts of 48 x 24 in float32, top-3, on ")
    assert shown["facts"]["copies"].endswith(", not pinned") and "per row" in shown["facts"]["on the CPU"]
    assert shown["facts"]["of 1, 2, ... misses"].startswith("the CPU computes ")
    assert main(["plan", str(model), "--device=cpu", "--dtype=float32", "--no-progress", "--threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "missing experts: 8 experts" in shown and "both at once" in shown
    assert "constants           not measured yet" in shown  # the rank's own, which this is not


def test_one_expert_in_host_memory_is_enough(parts):
    record = miss_constants(*parts, 1)
    assert record.values.copy.alpha_ns == 0 < record.values.copy_ns


def test_what_they_are_made_of():
    copies = [[n * MIB, 5000 + n * 100_000] for n in (1, 4)]
    experts = [[n, n * rows, 7000 + max(n * 50_000, n * rows * 2000)] for n in (1, 4) for rows in (1, 16, 64)]
    both = [[10, 900_000], [10, 800_005]]
    samples = {"copy": copies, "device": experts, "host": [[n, r, 10 * ns] for n, r, ns in experts], "both": both}
    costs = fit(samples, MIB)
    assert costs.copy.alpha_ns == 5000 and costs.copy_ns == pytest.approx(100_000, abs=2)
    assert costs.device_ns([1]) == pytest.approx(57_000, rel=0.02)
    assert costs.host_ns([64, 64]) == pytest.approx(10 * (7000 + 2 * 128_000), rel=0.02)
    assert costs.both_ns == 80_001
    assert fit({**samples, "copy": copies[:1]}, MIB).copy == LinkCost(0, -(-105_000 * 10**6 // MIB))
    assert MissCosts.from_dict(asdict(costs)) == costs


def test_rows_that_a_device_does_not_send_are_not_waited_for_without_end(parts, monkeypatch):
    layer, _, compute = parts
    compute.timeout_s = 0.02
    never = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(compute, "_send", lambda x_TD, token_R, rows: (x_TD, token_R, never))
    x_TD, token_R = torch.ones(1, layer.pool.down_SDI.shape[1]), torch.zeros(1, dtype=torch.int32)
    job = compute.start(0, [7], [2], [0, 1], x_TD, token_R)
    with pytest.raises(
        ExpertLate, match=r"experts 7 of MoE layer 0: their rows did not come from the device within 0.02"
    ):
        job.wait(30)
