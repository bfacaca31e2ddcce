"""From a checkpoint directory to a model that runs: built, probed, loaded, and with our attention and experts plugged
in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .checkpoint import Checkpoint
from .config import EngineConfig
from .experts import ExpertPool, load_experts
from .memory import Footprint, choose_device, footprint
from .model import ModelSpec, build, choose_dtype, choose_max_model_len, load_config, probe
from .moe import MoEFunction, MoELayer
from .weights import WeightMap, load_dense


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A model known but not loaded: what `plan` shows and `load` loads."""

    path: Path
    model: PreTrainedModel
    spec: ModelSpec
    weights: WeightMap
    footprint: Footprint
    dtype: torch.dtype
    device: torch.device
    max_model_len: int


def draw(config: EngineConfig, path: Path) -> Blueprint:
    """Reads configuration and tensor headers, and checks that they fit. Raises ValueError for the user."""
    device = choose_device(config.device)
    model_config = load_config(path, trust_remote_code=config.trust_remote_code)
    dtype = choose_dtype(model_config, config.dtype)
    max_model_len = choose_max_model_len(model_config, config.max_model_len)
    model = build(model_config, dtype, trust_remote_code=config.trust_remote_code)
    spec = probe(model)
    weights = WeightMap(model, Checkpoint(path), spec.experts)
    return Blueprint(
        path=path,
        model=model,
        spec=spec,
        weights=weights,
        footprint=footprint(weights, spec, dtype),
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
    )


def load(blueprint: Blueprint, *, progress: bool) -> MoEFunction:
    """Loads dense weights and experts; returns the experts function with its layers."""
    model, weights = blueprint.model, blueprint.weights
    experts = MoEFunction()
    bar = tqdm(
        total=weights.checkpoint.nbytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc="loading weights",
        disable=None if progress else True,
    )
    scale = 1.0
    with bar:
        for nbytes in load_dense(weights, blueprint.device):
            bar.update(nbytes)
        left = bar.total - bar.n
        if blueprint.footprint.experts:
            scale = left / blueprint.footprint.experts
        for spec in blueprint.spec.experts:
            pool = ExpertPool(weights.reader(spec), spec.num_experts, blueprint.device)
            for nbytes in load_experts(pool):
                bar.update(int(nbytes * scale))
            module = model.get_submodule(spec.module)
            experts.add(module, MoELayer(module, pool))
            for name in list(module._parameters):
                module._parameters[name] = None
        bar.update(bar.total - bar.n)
    weights.checkpoint.close()
    return experts
