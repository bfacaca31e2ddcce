"""What `--expert-memory` means for a model: the division of the budget, the policy, and who predicts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..scheduler.placement import slots_needed
from ..scheduler.residency.policies import LFRU, LFU, LRU, DecayedFrequency, PredictedNow, default_policy
from ..scheduler.residency.slots import Budget, Policy
from . import usage
from .config import EngineConfig, format_size, parse_budget
from .expert_files import AlignedBuffer, ExpertFiles
from .experts import ExpertPool, pool_in
from .host_experts import host_budget
from .measure_disk import disk_constants
from .predict.choose import Chosen, predictors_for
from .store_size import StoreSize, choose_size, share_out

if TYPE_CHECKING:
    from .expert_reader import ExpertReader
    from .loader import Blueprint

POLICIES: dict[str, Callable[[Budget], Policy]] = {
    "predicted": PredictedNow,
    "default": default_policy,
    "decayed": DecayedFrequency,
    "lfru": LFRU,
    "lfu": LFU,
    "lru": LRU,
}

log = logging.getLogger("moeyard.offload")


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """The store that the options ask for: its division, and the slots as the policy sees them."""

    size: StoreSize
    budget: Budget
    residency: str
    predictors: Chosen
    shares: bool = False
    """Whether this is one of several ranks, which tell each other what they predict."""
    read_ns_per_byte: float
    """Of the checkpoint's files."""
    used_LE: Any = None
    """How often each expert was used before, None where that is not known."""
    host_bytes: int | None = None
    """Of host memory for experts beside the device's; None where the device is the host."""
    misses: str = "auto"
    """What becomes of experts that are there and not on the device."""
    in_place: bool = False
    """Whether experts are read into their places, where they are then as they are in their files."""

    def pool(self, reader: ExpertReader, device: torch.device) -> ExpertPool:
        """The memory of all places, for the first of the layers, with whom the others share it."""
        if not self.in_place:
            return ExpertPool(reader, self.size.places, device)
        return pool_in(AlignedBuffer(self.size.places * self.size.place), reader)

    def policy(self) -> Policy:
        return POLICIES[self.residency](self.budget)


def plan_offload(config: EngineConfig, blueprint: Blueprint, sharing: int = 1) -> OffloadPlan | None:
    """What `expert_memory` means for a model; None when all experts are to be in memory. `sharing` ranks have this
    machine's memory.

    Each layer keeps as many slots as a token has experts, or its share where there are fewer. Of several ranks it is
    the plan of each, for as many experts as a rank has: the same on all, whoever is lost. Raises ValueError for what
    cannot be.
    """
    if config.expert_memory is None:
        return None
    specs, total, ranks = blueprint.spec.experts, blueprint.footprint.experts, config.ep or 1
    if not specs:
        raise ValueError("expert_memory: this model has no experts; leave it out")
    on_cpu = blueprint.device.type == "cpu"
    if on_cpu and config.host_memory is not None:
        raise ValueError(
            f"host_memory is {config.host_memory}, and on a CPU that is what --expert-memory sets; leave it out"
        )
    if on_cpu and config.misses != "auto":
        raise ValueError(
            f"misses is {config.misses}, and on a CPU missing experts are read and computed in one place; leave it out"
        )
    own = [spec.num_experts for spec in specs]
    if ranks > 1:
        own = [slots_needed(experts, ranks, config.redundant_experts) for experts in own]
        total = sum(blueprint.weights.reader(spec).nbytes * slots for spec, slots in zip(specs, own, strict=True))
    budget = parse_budget(config.expert_memory, total, "expert_memory")
    if budget >= total:
        log.info("expert_memory %s is room for all experts, %s", config.expert_memory, format_size(total))
        return None
    readers = [blueprint.weights.reader(spec) for spec in specs]
    shapes = {tuple((name, r.shape(name), r.dtype(name)) for name in r.parameters) for r in readers}
    if len(shapes) > 1:
        raise ValueError("expert_memory: the experts of this model's layers differ in shape; leave it out")
    with closing(ExpertFiles(readers)) as files:
        disk = disk_constants(files, progress=config.progress).values
        around = files.place_bytes - readers[0].nbytes if on_cpu and files.in_place else None
    # A GPU's slots are filled from host memory: the buffers are there.
    if on_cpu:
        size, in_place = choose_size(budget, readers[0].nbytes, files.buffer_bytes, around, disk.best)
    else:
        size, in_place = share_out(budget, readers[0].nbytes, 0), False
    experts = max(spec.num_experts for spec in specs)
    slots = min(size.slots, len(specs) * experts)
    # A token has that many on a rank, if they are spread evenly; more than it has of its own must not be kept free.
    floor = min(*(-(-spec.top_k // ranks) for spec in specs), slots // len(specs), *own)
    shared = Budget(layers=len(specs), experts=experts, slots=slots, floor=floor)
    fingerprint = blueprint.weights.checkpoint.fingerprint
    predictors = predictors_for(config.predictor, fingerprint, len(specs), experts)
    residency = config.residency
    if residency == "auto":
        residency = "predicted" if predictors.trained else "default"
    elif residency == "predicted" and not predictors.trained:
        raise ValueError(
            "residency is predicted, and no predictor was trained for this model; train one with moeyard"
            " train-predictor, name one with --predictor FILE, or use --residency default"
        )
    host_bytes = None if on_cpu else host_budget(config.host_memory, total, sharing)
    return OffloadPlan(
        size=size,
        budget=shared,
        residency=residency,
        predictors=predictors,
        shares=ranks > 1 and config.predictor != "none",
        read_ns_per_byte=1e9 / disk.bytes_per_s,
        used_LE=usage.load(fingerprint, len(specs), experts) if ranks == 1 else None,
        host_bytes=host_bytes,
        misses=config.misses,
        in_place=in_place,
    )
