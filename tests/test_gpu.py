"""What a GPU changes: skipped without one."""

import pytest
import tiny
import torch
from test_parity import generate, prompts, reference

from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_float32_tokens_on_a_gpu_equal_transformers_on_a_cpu(architecture, tmp_path):
    path = tiny.save(architecture, tmp_path / architecture)
    engine = Engine(
        EngineConfig(
            model=str(path), dtype="float32", device="cuda", max_num_seqs=32, max_batched_tokens=96, progress=False
        )
    )
    ids = prompts(engine.vocab_size, 8)
    ours = generate(engine, ids, 16)
    engine.close()
    assert ours == reference(path, ids, 16)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_runs_and_frees_its_blocks(architecture, tmp_path):
    path = tiny.save(architecture, tmp_path / architecture, hidden_size=64, moe_intermediate_size=32)
    engine = Engine(EngineConfig(model=str(path), dtype="bfloat16", device="cuda", progress=False))
    out = generate(engine, prompts(engine.vocab_size, 8), 16)
    assert all(len(tokens) == 16 for tokens in out)
    assert engine.stats(False).kv_blocks_used == 0
    engine.close()
