"""A transformers model on the meta device, asked what it is instead of guessed at.

`build` makes the model from its config without memory; `probe` runs it once on the meta device with our functions in
the place of its attention and its experts, and so learns from the model itself which layers attend, with how many
heads, over which window, with sinks or a logit cap, which keep a state instead, and where its experts are. What cannot
be served is refused here, by name and reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface

from .state_probe import STATELESS_KINDS, StateProbe, keeps_states
from .states import StateCache, StateSpec

_PROBE = "moeyard_probe"
_PROBE_TOKENS = 5
_FAR = 2**17
"""Position at which a mask function is asked how far back it sees; a longer window counts as none."""

_TENSOR_ARGUMENTS = {"s_aux", "position_ids", "cache_position"}
"""Tensors that models hand to attention functions and that ours honours or has from elsewhere."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention layer: what the KV cache and the attention function must know about it.

    `window` is the number of keys a query sees, itself included (0: all before it). `softcap` is 0 without a logit cap.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0
    sinks: bool = False
    softcap: float = 0.0
    module: str = ""
    """Its path in the model."""

    @property
    def values_per_token(self) -> int:
        """Cached numbers per token: keys and values of all KV heads."""
        return self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """One MoE layer's experts: `module` is its path in the model, `parameters` the names of its stacked tensors."""

    module: str
    num_experts: int
    top_k: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    parameters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What `probe` found. `experts` is in the order in which the layers run; `states` are those of layers with linear
    attention, state spaces or convolutions.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    attention: tuple[AttentionSpec, ...]
    experts: tuple[ExpertsSpec, ...] = ()
    states: tuple[StateSpec, ...] = ()

    @property
    def kv_values_per_token(self) -> int:
        return sum(a.values_per_token for a in self.attention)

    @property
    def state_bytes(self) -> int:
        """Of one request, however long."""
        return sum(state.nbytes for state in self.states)


def load_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The checkpoint's text config. Raises ValueError when it cannot be read or is not a model we know."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and huggingface_hub raise kinds of their own
        raise ValueError(f"model: cannot read the configuration in {path}: {_first_line(error)}") from error
    return config.get_text_config(decoder=True)


def choose_dtype(config: PreTrainedConfig, option: str) -> torch.dtype:
    """The type that `--dtype` asks for; `auto` is the checkpoint's own."""
    if option != "auto":
        return DTYPES[option]
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: the checkpoint's type {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    return dtype


def choose_max_model_len(config: PreTrainedConfig, option: int | None) -> int:
    """Longest sequence. Raises ValueError when the option is beyond the model, or its rotary scaling depends on length.

    `dynamic` and `longrope` scalings change with the longest position in the batch, so that one request's result would
    depend on its neighbours; they are served up to the original length, where they do not change.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or 2**20)
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = int(original or getattr(config, "original_max_position_embeddings", None) or limit)
            wanted = option or limit
            if wanted > original:
                raise ValueError(
                    f"max_model_len: this model's rotary scaling ({rope['rope_type']}) depends on the longest sequence"
                    f" in the batch beyond {original} tokens; set --max-model-len {original} or less"
                )
    if option is not None and option > limit:
        raise ValueError(f"max_model_len is {option}; this model's limit is {limit}")
    return option or limit


def build(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device, with the buffers that no checkpoint holds (rotary tables) computed on the CPU."""
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config
        method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise ValueError(f"model: the checkpoint is quantised ({method}); the model is built as a plain one")
    AttentionInterface.register(_PROBE, _unplugged)
    ExpertsInterface.register(_PROBE, _unplugged)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=_PROBE,
                experts_implementation=_PROBE,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        raise ValueError(f"model: {_name(config)} cannot be built: {_first_line(error)}") from error
    model.eval()
    model.requires_grad_(False)
    _compute_buffers(model)
    return model


def probe(model: PreTrainedModel) -> ModelSpec:
    """Runs the model once on the meta device. Raises ValueError, with the architecture's name and the reason, if it
    cannot be served.
    """
    found = _Findings(model)
    AttentionInterface.register(_PROBE, found.attention)
    ExpertsInterface.register(_PROBE, found.experts)
    AttentionMaskInterface.register(_PROBE, found.mask)
    ids_T = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    name = _name(model.config)
    states = StateProbe(model)
    # A mask is asked for either way: without a cache, one of no padding, whose contents are not looked at then.
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids_T)}
    if keeps_states(model.config, name):
        given = {"attention_mask": None, "past_key_values": StateCache(states)}
    try:
        with torch.no_grad(), _buffers_on_meta(model), states:
            logits = model(
                input_ids=ids_T,
                position_ids=torch.arange(_PROBE_TOKENS, device="meta")[None],
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.long, device="meta"),
                **given,
            ).logits
    except _Refusal as refusal:
        raise ValueError(f"model: {name} cannot be served: {refusal}") from None
    except Exception as error:
        raise ValueError(f"model: {name} does not run with paged attention: {_first_line(error)}") from error
    finally:
        for interface in (AttentionInterface, ExpertsInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_PROBE, None)
    layers = int(model.config.num_hidden_layers)
    attending = sorted(found.attending)
    if not attending:
        raise ValueError(f"model: {name} cannot be served: it does not use transformers' attention interface")
    kinds = getattr(model.config, "layer_types", None) or []
    stateless = {i for i, kind in enumerate(kinds) if kind in STATELESS_KINDS}
    without = set(range(layers)) - set(attending) - {key.layer for key in states.specs} - stateless
    if without:
        of = {str(kind) for i, kind in enumerate(kinds) if i in without}
        what = f" ({', '.join(sorted(of))})" if of else ""
        raise ValueError(
            f"model: {name} cannot be served: {len(without)} of its {layers} layers{what} keep a state other than keys"
            " and values, and do not read it from the cache that they are given"
        )
    return ModelSpec(
        architecture=name,
        hidden_size=int(model.config.hidden_size),
        vocab_size=int(logits.shape[-1]),
        attention=tuple(found.attending[i] for i in attending),
        experts=tuple(found.expert_layers),
        states=tuple(states.specs.values()),
    )


def plug(model: PreTrainedModel, name: str, attention: Any, experts: Any) -> None:
    """Puts our functions in the place of the model's attention and experts, under a name of this engine's own."""
    AttentionInterface.register(name, attention)
    ExpertsInterface.register(name, experts)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name
            config._experts_implementation = name


def unplug(name: str) -> None:
    """Forgets the functions that `plug` registered, so that the engine behind them can be freed."""
    AttentionInterface._global_mapping.pop(name, None)
    ExpertsInterface._global_mapping.pop(name, None)


class _Refusal(Exception):
    """A reason why a model cannot be served, met while probing it."""


@dataclass
class _Findings:
    """Stands in for attention, experts and mask while the model is probed, and notes what it is called with."""

    model: PreTrainedModel
    attending: dict[int, AttentionSpec] = field(default_factory=dict)
    expert_layers: list[ExpertsSpec] = field(default_factory=list)
    windows: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = {id(module): path for path, module in self.model.named_modules()}

    def mask(self, *args: Any, mask_function: Any, q_length: Any = None, **kwargs: Any) -> torch.Tensor:
        """A marker in the place of a mask, remembered with the window that the model asked for."""
        marker = torch.empty(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, device="meta")
        self.windows[id(marker)] = (marker, _window_of(mask_function))
        return marker

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise _Refusal(f"{type(module).__name__} attends without a layer index")
        if attention_mask is not None and id(attention_mask) not in self.windows:
            raise _Refusal(f"{type(module).__name__} makes its own attention mask (sparse attention)")
        if not getattr(module, "is_causal", True):
            raise _Refusal(f"{type(module).__name__} is not causal")
        unknown = [n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and n not in _TENSOR_ARGUMENTS]
        if unknown:
            raise _Refusal(f"{type(module).__name__} gives attention more than we know ({', '.join(unknown)})")
        windows = {kwargs.get("sliding_window") or 0}
        if attention_mask is not None:
            windows.add(self.windows[id(attention_mask)][1])
        windows.discard(0)
        if -1 in windows:
            raise _Refusal(f"layer {layer} uses an attention mask that is neither causal nor a sliding window")
        if len(windows) > 1:
            raise _Refusal(f"layer {layer} asks for different windows ({sorted(windows)})")
        spec = AttentionSpec(
            layer=int(layer),
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=key.shape[3],
            value_dim=value.shape[3],
            window=windows.pop() if windows else 0,
            sinks=kwargs.get("s_aux") is not None,
            softcap=float(kwargs.get("softcap") or 0.0),
            module=self.paths[id(module)],
        )
        if self.attending.setdefault(spec.layer, spec) != spec or key.shape[2] != _PROBE_TOKENS:
            raise _Refusal(f"layer {layer} attends more than once, or to other tokens than its own")
        return query.new_empty(1, _PROBE_TOKENS, spec.heads, spec.value_dim), None

    def experts(self, module: nn.Module, hidden_TH: torch.Tensor, ids_TK: Any, weights_TK: Any, **kw: Any) -> Any:
        if kw:
            raise _Refusal(f"its experts take more than tokens, ids and weights ({', '.join(kw)})")
        if getattr(module, "has_post_expert_norm", False):
            raise _Refusal(f"{type(module).__name__} normalises each expert's output, which is not supported yet")
        stacked = tuple(n for n, p in module.named_parameters() if p.dim() and p.shape[0] == module.num_experts)
        others = [n for n, _ in module.named_parameters() if n not in stacked]
        if others:
            raise _Refusal(f"{type(module).__name__} has parameters that are not one per expert ({', '.join(others)})")
        spec = ExpertsSpec(
            module=self.paths[id(module)],
            num_experts=int(module.num_experts),  # type: ignore[arg-type]
            top_k=int(ids_TK.shape[-1]),
            has_gate=bool(module.has_gate),
            has_bias=bool(module.has_bias),
            is_transposed=bool(module.is_transposed),
            is_concatenated=bool(module.is_concatenated),
            parameters=stacked,
        )
        self.expert_layers.append(spec)
        return torch.empty_like(hidden_TH)


def _window_of(mask_function: Any) -> int:
    """How many keys the query at a far position sees under a mask function of transformers: 0 for all, -1 when it is
    neither causal nor a sliding window."""
    zero = torch.zeros((), dtype=torch.long)
    seen = []
    for far in (_FAR, _FAR + 1):
        keys = torch.arange(far + 1)
        allowed = mask_function(zero, zero, torch.tensor(far), keys)
        allowed = allowed if isinstance(allowed, torch.Tensor) else torch.tensor(bool(allowed))
        seen.append((int(allowed.expand(far + 1).sum()), bool(allowed.expand(far + 1)[-1])))
    (first, itself), (second, _) = seen
    if (first, second) == (_FAR + 1, _FAR + 2):
        return 0
    return first if first == second and itself else -1


def _compute_buffers(model: PreTrainedModel) -> None:
    """Computes the non-persistent buffers, which `from_config` left on the meta device, through the model's own
    initialiser. Parameters stay on the meta device."""
    for path, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        buffers = {n: b for n, b in buffers.items() if n in module._non_persistent_buffers_set}
        if not buffers:
            continue
        for name, meta in buffers.items():
            fill = float("nan") if meta.is_floating_point() else 0
            module._buffers[name] = torch.full_like(meta, fill, device="cpu")
        model._init_weights(module)
        for name in buffers:
            buffer = module._buffers[name]
            assert buffer is not None
            if buffer.is_floating_point() and buffer.isnan().any():
                raise ValueError(
                    f"model: transformers does not compute the buffer {path}.{name} of {_name(model.config)}"
                )


class _buffers_on_meta:
    """Moves the computed buffers to the meta device for the time of a probe."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.kept = [(m, n, b) for m in self.model.modules() for n, b in m._buffers.items() if b is not None]
        for module, name, buffer in self.kept:
            module._buffers[name] = buffer.to("meta")

    def __exit__(self, *exc: object) -> None:
        for module, name, buffer in self.kept:
            module._buffers[name] = buffer


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    return nested or [rope]


def _unplugged(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the model was run before the engine plugged its attention and experts in")


def _name(config: PreTrainedConfig) -> str:
    architectures = getattr(config, "architectures", None) or []
    return architectures[0] if architectures else str(config.model_type)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
