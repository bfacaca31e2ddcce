"""The same bfloat16 weights as a GGUF file, which llama.cpp reads: for checkpoints of the architecture qwen3_moe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ARCHITECTURE = "qwen3_moe"


def check_installed() -> None:
    """Raises ValueError with the remedy where what `--against llama.cpp` needs is not there."""
    from importlib.util import find_spec

    for module in ("llama_cpp", "gguf"):
        if find_spec(module) is None:
            raise ValueError(
                f"--against llama.cpp needs {module}, which is not installed; pip install 'moeyard[llama]'"
            )


def gguf_of(model: Path, folder: Path) -> Path:
    """The GGUF file of a checkpoint, written to `folder` unless it is there and newer than the checkpoint's files.

    Raises ValueError for another architecture.
    """
    from transformers import AutoConfig

    from ..engine.checkpoint import Checkpoint

    config = AutoConfig.from_pretrained(model).get_text_config()
    if config.model_type != ARCHITECTURE:
        raise ValueError(
            f"--against llama.cpp: a GGUF file is written for {ARCHITECTURE} only, not for {config.model_type};"
            " leave out MODEL, for the checkpoint that is made here"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model.name}.gguf"
    newest = max(file.stat().st_mtime_ns for file in model.iterdir())
    if not path.exists() or path.stat().st_mtime_ns < newest:
        partial = path.with_suffix(".partial")
        _write(config, Checkpoint(model), partial)
        partial.rename(path)
    return path


def _write(config: Any, checkpoint: Any, path: Path) -> None:
    import gguf
    import torch

    layers = config.num_hidden_layers
    arch = gguf.MODEL_ARCH.QWEN3MOE
    names = gguf.get_tensor_name_map(arch, layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    def add(name: str, tensor: Any) -> None:
        stem, _, kind = name.rpartition(".")
        known = names.get_name(stem)
        if known is None:
            raise ValueError(f"--against llama.cpp: gguf has no name for the tensor {name!r} of this checkpoint")
        # Vectors and routers are float32 in GGUF files that llama.cpp's own converter writes.
        if tensor.dim() == 1 or ".mlp.gate." in name:
            writer.add_tensor(f"{known}.{kind}", tensor.float().numpy())
            return
        data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(f"{known}.{kind}", data, raw_dtype=gguf.GGMLQuantizationType.BF16)

    experts: dict[str, list[Any]] = {}
    for name in sorted(checkpoint.entries):
        if ".mlp.experts." in name:
            experts.setdefault(name.split(".mlp.experts.")[0], []).append(name)
        else:
            add(name, checkpoint.read(name))
    for prefix in experts:
        for part in ("gate_proj", "up_proj", "down_proj"):
            each = [checkpoint.read(f"{prefix}.mlp.experts.{e}.{part}.weight") for e in range(config.num_experts)]
            add(f"{prefix}.mlp.experts.{part}.weight", torch.stack(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    theta: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(theta)
