"""The memory table, against what loading the model really takes."""

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
