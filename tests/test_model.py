"""What a model says of itself when it is probed, and which models are refused."""

import pytest
import tiny
import torch

from moeyard.engine.model import build, choose_dtype, choose_max_model_len, load_config, probe
from moeyard.engine.state_probe import keeps_states


def probed(architecture, **changes):
    config = tiny.config_of(architecture, **changes)
    return probe(build(config.get_text_config(decoder=True), torch.float32))


def test_windows_come_from_the_model_itself():
    assert [a.window for a in probed("gpt_oss").attention] == [12, 0, 12, 0]
    assert [a.window for a in probed("mixtral").attention] == [20] * 3
    # phimoe never passes its window to attention; only its mask knows.
    assert [a.window for a in probed("phimoe").attention] == [18] * 3
    assert [a.window for a in probed("phimoe", sliding_window=None).attention] == [0] * 3
    assert [a.window for a in probed("qwen2_moe").attention] == [0] * 3


def test_heads_and_latent_dimensions():
    mla = probed("deepseek_v3").attention[0]
    assert (mla.heads, mla.kv_heads, mla.head_dim, mla.value_dim) == (4, 4, 20, 10)
    grouped = probed("qwen3_moe").attention[0]
    assert (grouped.heads, grouped.kv_heads, grouped.head_dim, grouped.values_per_token) == (4, 2, 16, 64)
    assert probed("gpt_oss").attention[0].sinks


def test_experts_and_their_flags():
    oss = probed("gpt_oss").experts[0]
    assert (oss.has_bias, oss.is_transposed, oss.is_concatenated, oss.top_k) == (True, True, False, 2)
    deepseek = probed("deepseek_v2").experts
    assert [e.module for e in deepseek] == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert deepseek[0].num_experts == 8


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("deepseek_v32", "indexed_attention, sparse attention to keys that an indexer chooses"),
        ("glm_moe_dsa", "indexed_attention, sparse attention to keys that an indexer chooses"),
        ("llama4_text", "chunked_attention"),
        ("mamba", "state|attention|built"),
        ("rwkv", "state|attention|built"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_and_reason(architecture, reason):
    config = tiny.config_of(architecture, num_hidden_layers=4)
    with pytest.raises(ValueError, match=reason) as error:
        probe(build(config, torch.float32))
    assert str(error.value).startswith("model: ")


def test_hybrid_models_with_sparse_attention_are_refused_by_their_configuration():
    config = tiny.config_of("qwen4_exp_text", num_hidden_layers=4)
    with pytest.raises(ValueError, match="Q cannot be served: it has layers of indexed_attention, sparse attention"):
        keeps_states(config, "Q")


def test_states_of_hybrid_models_come_from_the_model_itself():
    spec = probed("qwen3_next")
    assert [a.layer for a in spec.attention] == [3]
    sizes = {(s.key.layer, s.key.kind): s.shape for s in spec.states}
    assert sizes == {(i, kind): size for i in range(3) for kind, size in (("conv", (80, 4)), ("recurrent", (4, 8, 12)))}
    assert spec.state_bytes == 3 * 4 * (80 * 4 + 4 * 8 * 12)
    assert {s.module for s in spec.states} == {f"model.layers.{i}.linear_attn" for i in range(3)}
    assert [s.key.kind for s in probed("lfm2_moe").states] == ["conv", "conv"]
    assert [(s.key.layer, s.key.kind) for s in probed("minimax").states] == [(0, "recurrent"), (2, "recurrent")]
    assert probed("qwen3_moe").states == ()


def test_a_hybrid_model_needs_a_transformers_that_hands_out_states(monkeypatch):
    from transformers import Cache

    monkeypatch.delattr(Cache, "get_conv_state")
    with pytest.raises(ValueError, match=r"qwen3_next has layers of linear_attention.* from version 5\.21 on"):
        probed("qwen3_next")
    assert probed("mixtral").states == ()


def test_nothing_stays_registered_after_a_probe():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    probed("mixtral")
    assert "moeyard_probe" not in AttentionInterface._global_mapping
    assert "moeyard_probe" not in AttentionMaskInterface._global_mapping


def test_rotary_scaling_that_depends_on_neighbours_is_limited():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = tiny.config_of("qwen3_moe", rope_parameters=rope | {"original_max_position_embeddings": 128})
    with pytest.raises(ValueError, match="--max-model-len 128 or less"):
        choose_max_model_len(config, None)
    assert choose_max_model_len(config, 128) == 128


def test_length_and_type_options():
    config = tiny.config_of("qwen3_moe")
    assert choose_max_model_len(config, None) == 512
    assert choose_max_model_len(config, 100) == 100
    with pytest.raises(ValueError, match="max_model_len is 513; this model's limit is 512"):
        choose_max_model_len(config, 513)
    config.dtype = torch.bfloat16
    assert choose_dtype(config, "auto") == torch.bfloat16
    assert choose_dtype(config, "float32") == torch.float32


def test_a_quantised_checkpoint_is_refused():
    config = tiny.config_of("qwen3_moe")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantised \\(fp8\\)"):
        build(config, torch.float32)


def test_a_directory_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path)
