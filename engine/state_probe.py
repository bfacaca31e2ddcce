"""Which layers of a model keep a state, of which sizes, seen while the model is probed on the meta device."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Cache, PreTrainedConfig

from .states import StateKey, StateSpec

ATTENTION_KINDS = {"full_attention", "sliding_attention", "attention"}
STATE_KINDS = {"linear_attention", "conv"}
"""Layer types of transformers' configurations that keep a state; it calls state spaces linear attention, too."""
STATELESS_KINDS = {"moe", "mlp"}
"""Layer types that only look at single tokens."""
FIRST_VERSION = "5.21"
"""Of transformers, in which a cache is asked for states: before, models read them off the cache's own layers."""


def keeps_states(config: PreTrainedConfig, name: str) -> bool:
    """Whether the model of this name has layers that keep a state, by its configuration. Raises ValueError for layers
    that hold something else, and where the installed transformers cannot be given states.
    """
    kinds = {str(t) for t in getattr(config, "layer_types", None) or []}
    unknown = sorted(kinds - ATTENTION_KINDS - STATE_KINDS - STATELESS_KINDS)
    if unknown:
        why = "which need state or masks that are not managed yet"
        if "indexed_attention" in unknown or any("sparse" in kind for kind in unknown):
            why = "sparse attention to keys that an indexer chooses, which is not managed yet"
        raise ValueError(
            f"model: {name} cannot be served: it has layers of {', '.join(unknown)}, {why}; layers of full, sliding and"
            " linear attention are"
        )
    if kinds & STATE_KINDS and not hasattr(Cache, "get_conv_state"):
        raise ValueError(
            f"model: {name} has layers of {', '.join(sorted(kinds & STATE_KINDS))}, whose states transformers hands out"
            f" from version {FIRST_VERSION} on; this is {transformers.__version__}, install a newer one"
        )
    return bool(kinds & STATE_KINDS)


class StateProbe:
    """Stands behind the cache while the model is probed as at the start of a sequence, and notes what is written.

    A context: between its ends it sees which module runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.specs: dict[StateKey, StateSpec] = {}
        self._model = model
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> StateProbe:
        for path, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self._running.append(path)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _leave(self) -> None:
        self._running.pop()

    def read(self, key: StateKey) -> torch.Tensor | None:
        return None

    def write(self, key: StateKey, state: torch.Tensor) -> None:
        if state.shape[0] != 1:
            raise ValueError(f"layer {key.layer} keeps a {key.kind} state that is not one per sequence")
        spec = StateSpec(key=key, shape=tuple(state.shape[1:]), dtype=state.dtype, module=self._running[-1])
        if self.specs.setdefault(key, spec) != spec:
            raise ValueError(f"layer {key.layer} writes its {key.kind} state more than once, in different sizes")
