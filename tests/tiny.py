"""Tiny random checkpoints of the architectures that the engine promises to serve, saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.7,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 20},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 32, "norm_topk_prob": True},
    "qwen3_moe": QWEN | {"head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": DEEPSEEK | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK | {"norm_topk_prob": True},
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 12,
        "num_hidden_layers": 4,
    },
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 18},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "glm4_moe": DEEPSEEK | {"head_dim": 16, "num_key_value_heads": 2, "use_qk_norm": True},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16},
    "dots1": DEEPSEEK | {"num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2},
}

DELTA_NET = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4}
BETWEEN = ["linear_attention", "full_attention", "linear_attention"]

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": QWEN | DELTA_NET | {"norm_topk_prob": True},
    "qwen3_5_moe_text": QWEN | DELTA_NET,
    "kimi_linear": MLA
    | {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "linear_head_dim": 12,
        "linear_num_heads": 4,
        "layer_types": BETWEEN,
    },
    "minimax": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "block_size": 16,
        "layer_types": BETWEEN,
    },
    "granitemoehybrid": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 6,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "position_embedding_type": "rope",
        "residual_multiplier": 0.5,
        "layer_types": BETWEEN,
    },
    "jamba": {
        "num_experts": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": QWEN | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "nemotron_h": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
        "head_dim": 16,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
    },
    "bailing_hybrid": MLA
    | {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "head_dim": 12,
        "layer_types": BETWEEN,
    },
}
"""Models whose layers keep states beside keys and values."""


def config_of(architecture: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        architecture, **{**COMMON, **ARCHITECTURES.get(architecture, {}), **HYBRIDS.get(architecture, {}), **changes}
    )


def save(architecture: str, path: Path, *, seed: int = 0, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A random float32 checkpoint in `path`, with router biases that are not all zero."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(architecture, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "e_score_correction_bias", "sinks", "statics")):
                tensor.normal_(std=0.3)
            elif tensor.dim() == 1 and "norm" in name:
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path
