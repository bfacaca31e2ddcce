"""From a checkpoint directory to a model that runs: built, probed, loaded, and with our attention and experts plugged
in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..scheduler.table import EMPTY
from .checkpoint import Checkpoint
from .config import EngineConfig
from .dense_weights import load_dense
from .experts import ExpertPool, load_experts
from .memory import Footprint, choose_device, footprint
from .model import ModelSpec, build, choose_dtype, choose_max_model_len, load_config, probe
from .moe import MoEFunction, MoELayer
from .offload_plan import OffloadPlan
from .quantised_layouts import take_layout
from .quantised_reader import check_quantised, reader_for
from .weights import WeightMap


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


def draw(config: EngineConfig, path: Path, local_rank: int = 0, local_ranks: int = 1) -> Blueprint:
    """Reads configuration and tensor headers. Raises ValueError for the user.

    `local_rank` of the `local_ranks` on this machine decides the device.
    """
    device = choose_device(config.device, local_rank, local_ranks)
    model_config = load_config(path, trust_remote_code=config.trust_remote_code)
    layout = take_layout(model_config)
    dtype = choose_dtype(model_config, config.dtype)
    max_model_len = choose_max_model_len(model_config, config.max_model_len)
    model = build(model_config, dtype, trust_remote_code=config.trust_remote_code)
    spec = probe(model)
    readers = reader_for(config.expert_dtype, layout)
    weights = WeightMap(model, Checkpoint(path), spec.experts, readers, layout)
    check_quantised(config.expert_dtype, weights, spec, device)
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


def load(
    blueprint: Blueprint,
    *,
    progress: bool,
    slots: Sequence[Sequence[int]] | None = None,
    offload: OffloadPlan | None = None,
) -> MoEFunction:
    """Loads dense weights and experts; returns the experts function with its layers.

    `slots` says for each MoE layer which expert goes to each of this rank's slots (-1: none); None: all of them.
    With `offload` the layers share one set of empty slots, and no expert is read.
    """
    model, weights = blueprint.model, blueprint.weights
    experts = MoEFunction()
    if offload is not None:
        slots = [[EMPTY] * offload.size.places for _ in blueprint.spec.experts]
    elif slots is None:
        slots = [range(spec.num_experts) for spec in blueprint.spec.experts]
    readers = [weights.reader(spec) for spec in blueprint.spec.experts]
    own = sum(r.nbytes * sum(e >= 0 for e in row) for r, row in zip(readers, slots, strict=True))
    stored = weights.checkpoint.nbytes
    if blueprint.footprint.experts:
        # What other ranks have is not read here.
        share = own / blueprint.footprint.experts
        stored = int(stored - (1 - share) * stored * blueprint.footprint.experts / blueprint.footprint.weights)
    bar = tqdm(
        total=stored,
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
        if own:
            scale = left / own
        shared: ExpertPool | None = None
        for spec, reader, row in zip(blueprint.spec.experts, readers, slots, strict=True):
            if offload is None:
                pool = ExpertPool(reader, len(row), blueprint.device)
            elif shared is not None:
                pool = ExpertPool(reader, shared.num_slots, blueprint.device, shared)
                row = ()
            else:
                pool = shared = offload.pool(reader, blueprint.device)
                pool.zero()  # so that its memory is taken now, not while serving
                row = ()
            for nbytes in load_experts(pool, row):
                bar.update(int(nbytes * scale))
            module = model.get_submodule(spec.module)
            experts.add(module, MoELayer(module, pool))
            for name in list(module._parameters):
                module._parameters[name] = None
        bar.update(bar.total - bar.n)
    weights.checkpoint.close()
    return experts
