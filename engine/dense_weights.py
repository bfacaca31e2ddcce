"""Loads everything of a model but its experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from .weights import WeightMap


def load_dense(weights: WeightMap, device: torch.device) -> Iterator[int]:
    """Reads every parameter and buffer but the experts' into the model, on `device`; yields bytes read as it goes."""
    model = weights.model
    loaded = set()
    for recipe in weights.dense:
        tensors = {p: [weights.read(n) for n in names] for p, names in recipe.sources.items()}
        for target, tensor in recipe.convert(tensors, model.config).items():
            weights.check_made(recipe, target, tuple(tensor.shape), tuple(weights.expected[target].shape))
            kept = tensor.to(device=device, dtype=weights.dtype_of(target))
            # A part of a larger tensor would keep all of that alive.
            whole = kept.is_contiguous() and kept.untyped_storage().nbytes() == kept.nbytes
            _assign(model, target, kept if whole else kept.clone(memory_format=torch.contiguous_format))
            loaded.add(target)
        yield sum(weights.nbytes_of(n) for n in recipe.names)
    _tie(model, loaded)
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta and buffer.device != device:
            _assign(model, name, buffer.to(device))
    left = [n for n, t in model.state_dict().items() if t.is_meta and n not in weights.experts]
    assert not left, f"not loaded: {left}"


def _tie(model: PreTrainedModel, loaded: set[str]) -> None:
    """Parameters that the checkpoint leaves out because they are another one's."""
    tied = model.all_tied_weights_keys
    for target in tied:
        if target in loaded:
            continue
        source = target
        while source in tied and source not in loaded:
            source = tied[source]
        _assign(model, target, model.get_parameter(source))


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
