"""The memory table, against what loading the model really takes."""

import dataclasses

import tiny

from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.launch.plan import run


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
