"""The memory table, against what loading the model really takes."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from moeyard.__main__ import main
from moeyard.bench.analyze import keep_routing
from moeyard.bench.token_trace import TokenTrace
from moeyard.engine import constants, measure_disk
from moeyard.engine.checkpoint import Checkpoint
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.loader import draw
from moeyard.engine.offload_plan import plan_offload
from moeyard.launch import machine, offload_budgets, plan, profile
from moeyard.launch.plan import run
from moeyard.scheduler.cost import ExpertCost, LinkCost, RankConstants
from moeyard.scheduler.offload_cost import DiskCost, Speed


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing is known of this machine; what is measured takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(measure_disk, "CASE_S", 0.0)
    monkeypatch.setattr(machine, "read_rate", lambda device: 1e9)


def test_the_table_says_what_the_engine_then_takes(tmp_path, capsys):
    for architecture in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        path = tiny.save(architecture, tmp_path / architecture)
        config = EngineConfig(model=str(path), dtype="bfloat16", device="cpu", kv_memory="2MiB", progress=False)
        assert run(config) == 0
        out = capsys.readouterr().out
        engine = Engine(config)
        kept = sum(p.nbytes for p in {id(p): p for p in engine._model.parameters()}.values())
        kept += sum(b.nbytes for n, b in engine._model.state_dict().items() if n in dict(engine._model.named_buffers()))
        pools = sum(layer.pool.nbytes for layer in engine._experts.layers)
        assert engine.info["weights_bytes"] == kept + pools
        assert engine.info["expert_bytes"] == pools
        assert f"{engine.kv_tokens} tokens" in out
        engine.close()


def test_what_does_not_fit_is_said(tmp_path, capsys):
    path = tiny.save("mixtral", tmp_path / "mixtral")
    assert run(EngineConfig(model=str(path), device="cpu", kv_memory="1KiB")) == 1
    assert "does not fit: max_model_len: one request of 512 tokens needs" in capsys.readouterr().out


def test_the_memory_of_each_of_several_ranks(tmp_path, capsys):
    path = tiny.save("qwen3_moe", tmp_path / "model")
    config = EngineConfig(model=str(path), dtype="bfloat16", device="cpu", kv_memory="1MiB")
    rows = {}
    for options in ({}, {"ep": 3}, {"ep": 3, "redundant_experts": 1}):
        assert run(dataclasses.replace(config, **options)) == 0
        lines = capsys.readouterr().out.splitlines()
        rows[len(rows)] = {line[2:22].strip(): line[22:].strip() for line in lines[1:]} | {"title": lines[0]}
    one, three, spare = rows.values()
    layers, experts = 3, 8
    assert one["dense weights"] == three["dense weights"] == spare["dense weights"]
    assert f"{layers * experts} experts in {layers} layers" in one["expert weights"]
    assert f"room for {layers * 3} of {layers * experts} experts" in three["expert weights"]  # of 8 experts, 3 at most
    assert f"room for {layers * 4} of {layers * experts} experts" in spare["expert weights"]
    assert three["title"].endswith("for each of 3 ranks") and "ranks" not in one["title"]
    assert "for 3 ranks on this machine" in three["free RAM"] and "on each rank" in three["KV cache"]


# What memory for experts is worth

OPTIONS = {"dtype": "float32", "device": "cpu", "kv_memory": "1MiB", "threads": 1, "progress": False}
EXPERT = 3 * 48 * 24 * 4
EXPERTS = 3 * 8


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    """A model whose experts take 1 ms to read."""
    path = tiny.save("qwen3_moe", tmp_path / "qwen")
    cost = DiskCost(reads={2: LinkCost(10**6, 0)}, sequential_fs_per_byte=10**6, expert_bytes=EXPERT)
    monkeypatch.setattr(measure_disk, "measure_disk", lambda files, **options: (cost, {2: [[EXPERT, 10**6]]}))
    return path


def table(text):
    """{note or percent: cells} of the budgets."""
    lines = [line for line in text.splitlines() if re.match(r"  [\d.]+ % ", line)]
    return {cells[0]: cells for cells in (re.split(r"  +", line.strip()) for line in lines)}


def test_what_budgets_are_worth(qwen, capsys):
    config = EngineConfig(model=str(qwen), expert_memory="40%", **OPTIONS)
    assert run(config) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows) == ["6 %", "12 %", "25 %", "40 %", "50 %", "75 %", "100 %"]
    assert [name for name, cells in rows.items() if cells[-1] == "asked for"] == ["40 %"]
    dense = int(draw_of(config).footprint.dense)
    compute_s = (dense + 9 * EXPERT) / 1e9
    assert f"computing a token takes {1000 * compute_s:.3g} ms (weights at 1 GB/s)" in out
    assert "reading a missed expert 1 ms (disk, measured " in out
    for share in (25, 40, 75):
        slots = slots_of(config, f"{share}%")
        assert rows[f"{share} %"][2] == f"{slots}"
        low, high = re.match(r"(\d+)(?: to (\d+))? %", rows[f"{share} %"][3]).groups()
        assert int(low) == round(100 * slots / EXPERTS) <= int(high or low) <= 100
        slow, fast = (float(text) for text in rows[f"{share} %"][4].split(" to "))
        assert slow == pytest.approx(1 / (compute_s + 9 * (1 - slots / EXPERTS) / 1000), rel=0.01)
        assert slow < fast < 1 / compute_s
    full = f"{1 / compute_s:,.0f}"
    assert rows["100 %"][2:] == [f"{EXPERTS}", "100 %", full, "-", "-"]
    assert "as published of Mixtral" in out or "as published of Phi" in out or "as published of OLMoE" in out
    assert "not of this model: moeyard analyze MODEL measures it" in out
    last = out.splitlines()[-1]
    assert last.startswith("With 130 KiB for experts (40 %) expect ") and last.endswith(f"would give {full}.")


def test_what_budgets_are_worth_on_each_of_several_ranks(qwen, capsys):
    """Three ranks of one machine have 3 of 8 experts each, and a third of the memory's rate and of the disk's."""
    config = EngineConfig(model=str(qwen), expert_memory="40%", ep=3, **OPTIONS)
    assert run(config) == 0
    out = capsys.readouterr().out
    rows = table(out)
    own = 3 * 3
    dense = int(draw_of(config).footprint.dense)
    compute_s = (dense + 9 * EXPERT) / 1e9 * 3
    assert f"one request on each of 3 ranks, by the model: computing a token takes {1000 * compute_s:.3g} ms" in out
    assert "reading a missed expert 3 ms (disk, shared by 3 ranks, measured " in out
    for share in (40, 75):
        slots = slots_of(config, f"{share}%")
        assert rows[f"{share} %"][2] == f"{slots}" and slots < own
        low, high = re.match(r"(\d+)(?: to (\d+))? %", rows[f"{share} %"][3]).groups()
        assert int(low) == round(100 * slots / own) <= int(high or low) <= 100
        slow = float(rows[f"{share} %"][4].split(" to ")[0])
        assert slow == pytest.approx(1 / (compute_s + 9 * (1 - slots / own) * 3 / 1000), rel=0.01)
    assert rows["100 %"][2:5] == [f"{own}", "100 %", f"{1 / compute_s:,.0f}"]
    assert out.splitlines()[-1].startswith("With 48.6 KiB for experts (40 %) expect ")
    assert " tokens/s for one request on each of 3 ranks" in out.splitlines()[-1]
    # With as many ranks as experts a rank's one expert of a layer is needed at most once a step.
    assert offload_budgets.own_experts(dataclasses.replace(config, ep=8), draw_of(config)).active == 3


def slots_of(config, share):
    return plan_offload(dataclasses.replace(config, expert_memory=share), draw_of(config)).budget.slots


def draw_of(config):
    return draw(config, Path(config.model))


def test_measured_experts_and_recorded_routing_count(qwen, capsys):
    config = EngineConfig(model=str(qwen), expert_memory="50%", **OPTIONS)
    blueprint = draw_of(config)
    reader = blueprint.weights.reader(blueprint.spec.experts[0])
    rank = RankConstants(ExpertCost(10**6, 2 * 10**6, 0), 16)  # three experts: 7 ms a layer
    constants.save("rank", constants.key_of(reader, blueprint.device, 1), rank, {})
    compute_s = 3 * 0.007 + blueprint.footprint.dense / 1e9
    trace = TokenTrace(
        np.zeros((50, 3, 3), dtype=np.int16) + 7, np.array([0]), np.array([0]), ("",), Checkpoint(qwen).fingerprint
    )
    keep_routing(trace, [row_of(0.25, 4.5, 6.0), row_of(0.75, 1.0, 2.0)])
    slots = slots_of(config, "50%")
    for residency, few, many in (("default", 1.0, 4.5), ("lru", 2.0, 6.0)):
        assert run(dataclasses.replace(config, residency=residency)) == 0
        out = capsys.readouterr().out
        assert (
            f"computing a token takes {1000 * compute_s:.3g} ms (experts as measured, other weights at 1 GB/s)" in out
        )
        assert "at most as in this model's routing of 50 tokens, recorded 20" in out and "published" not in out
        misses = np.interp(slots / EXPERTS, [0, 0.25, 0.75, 1], [9, many, few, 0])
        most = max(100 * (1 - misses / 9), 100 * slots / EXPERTS)
        assert table(out)["50 %"][3].endswith(f"{most:.0f} %")
    other = dataclasses.replace(trace, topk_TLK=trace.topk_TLK[:20])
    keep_routing(other, [row_of(0.5, 3.0, 3.0)])  # the newest counts, alone
    assert run(config) == 0
    assert "routing of 20 tokens" in capsys.readouterr().out and len(constants.find("routing")) == 1
    keep_routing(dataclasses.replace(trace, digest=""), [row_of(0.5, 3.0, 3.0)])
    keep_routing(trace, [])
    assert len(constants.find("routing")) == 1


def row_of(share, misses, lru):
    return Speed(share=share, slots=1, resident_bytes=1, misses=misses, lru=lru, least=0.0, read_s=1.0, compute_s=1.0)


def test_what_does_not_fit_gets_a_suggestion(qwen, capsys, monkeypatch):
    config = EngineConfig(model=str(qwen), **OPTIONS)
    size = draw_of(config).footprint

    def free(nbytes):
        monkeypatch.setattr("moeyard.engine.memory.free_memory", lambda device: nbytes)

    free(size.dense + 2**20 + int(0.605 * size.experts))
    assert run(config) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "  with --expert-memory 60% it would fit" in out
    rows = table(out)
    assert rows["60 %"][-1] == "suggested"
    assert [name for name, cells in rows.items() if cells[-1] == "more than is free"] == []  # but for the cache
    assert out.splitlines()[-1].startswith("With 194 KiB for experts (60 %) expect ")

    assert run(dataclasses.replace(config, expert_memory="60%")) == 0  # it does fit
    assert "suggested" not in capsys.readouterr().out
    assert run(dataclasses.replace(config, expert_memory="70%")) == 1
    out = capsys.readouterr().out
    assert table(out)["70 %"][-1] == "asked for" and table(out)["60 %"][-1] == "suggested"

    free(size.dense + size.experts // 2)  # no room for a cache and an expert
    assert run(config) == 1
    assert not table(capsys.readouterr().out)
    free(size.dense + 2**20 + 10)
    assert run(config) == 1
    assert "a part of the experts cannot be in memory: expert_memory gives 10 B" in capsys.readouterr().out
    assert run(dataclasses.replace(config, ep=2)) == 1
    assert "--expert-memory" not in capsys.readouterr().out
    free(2 * (size.dense + 2**20 + int(0.605 * size.experts / 2)))  # two ranks share it
    assert run(dataclasses.replace(config, ep=2)) == 1
    out = capsys.readouterr().out
    assert "  with --expert-memory 60% it would fit" in out and table(out)["60 %"][-1] == "suggested"
    assert run(dataclasses.replace(config, ep=2, expert_memory="60%")) == 0


def test_a_gpu_fills_its_slots_from_host_memory(qwen, monkeypatch):
    """A missed expert takes its copy, and its reading where it is not in host memory."""
    monkeypatch.setattr(machine, "host_to_gpu_rate", lambda: EXPERT * 2000.0)  # half a millisecond
    monkeypatch.setattr(profile, "experts_s", lambda config, blueprint: 0.002)
    blueprint = dataclasses.replace(draw_of(EngineConfig(model=str(qwen), **OPTIONS)), device=torch.device("cuda"))
    for host_memory, missed_s, says in (
        ("100%", 0.0005, "(host memory at 0.0276 GB/s, measured"),
        ("50%", 0.001, "(host memory at 0.0276 GB/s, 50% of them from disk before, measured"),
    ):
        config = EngineConfig(model=str(qwen), expert_memory="50%", host_memory=host_memory, **OPTIONS)
        found = offload_budgets.budgets(config, blueprint, 2**30)
        assert found.need.read_s(found.machine, 2) == pytest.approx(2 * missed_s)
        assert says in next(iter(found.lines()))
        slots = found.chosen.now.slots
        slow = 9 * (1 - slots / EXPERTS) * missed_s + 0.002 + found.need.dense_bytes / 1e9
        assert found.chosen.now.tokens_per_s[0] == pytest.approx(1 / slow)
        rows = plan._below(plan_offload(config, blueprint), blueprint.footprint)
        kept = EXPERTS if host_memory == "100%" else EXPERTS // 2
        assert rows[0] == ("host memory", kept * EXPERT, f"{kept} of {EXPERTS} experts")
        assert [name for name, _, _ in rows[1:]] == ["read from disk"] * (kept < EXPERTS)
    # Two ranks have a GPU each, and share the disk from which half of their experts come.
    found = offload_budgets.budgets(dataclasses.replace(config, ep=2), blueprint, 2**30)
    assert found.need.read_s(found.machine, 2) == pytest.approx(2 * 0.0015) and found.machine.memory == 1e9


def test_a_model_that_fits_is_not_measured(qwen, capsys, monkeypatch):
    monkeypatch.setattr(measure_disk, "measure_disk", lambda *args, **options: pytest.fail("not asked for"))
    assert run(EngineConfig(model=str(qwen), **OPTIONS)) == 0
    out = capsys.readouterr().out
    assert f"  {'disk':<20}not measured yet: moeyard profile" in out and "one request" not in out


def test_too_little_is_shown_as_such(qwen, capsys):
    config = EngineConfig(model=str(qwen), expert_memory=f"{6 * EXPERT}", **OPTIONS)
    assert run(config) == 0
    rows = table(capsys.readouterr().out)
    assert rows["6 %"][2:] == [*"-----", "too little for one expert and one read"]
    assert rows["25 %"][-1] == "asked for"
    assert main(["plan", str(qwen), "--device=cpu", "--expert-memory=1%"]) == 2
    err = capsys.readouterr().err
    assert "expert_memory gives" in err and err.count("\n") == 1


def test_everything_in_memory_is_said(qwen, capsys):
    assert run(EngineConfig(model=str(qwen), expert_memory="100%", **OPTIONS)) == 0
    out = capsys.readouterr().out
    assert table(out)["100 %"][-1] == "asked for" and "nothing is read" in out.splitlines()[-1]


def test_the_next_gigabyte_is_one_of_a_large_model(qwen, capsys, monkeypatch):
    monkeypatch.setattr(offload_budgets, "NEXT_BYTES", 6 * EXPERT)
    assert run(EngineConfig(model=str(qwen), expert_memory="50%", **OPTIONS)) == 0
    out = capsys.readouterr().out
    gain = re.match(r"\+(\d+)(?: to (\d+))? %", table(out)["50 %"][5]).groups("0")
    assert f"{25}" in gain  # 6 of 24 more with even routing
    assert ", with 1 GiB more " in out.splitlines()[-1]
