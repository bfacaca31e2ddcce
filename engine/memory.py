"""How much memory there is, how much a model takes, and how large the KV cache may be."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .config import EngineConfig, format_size, parse_size
from .model import ModelSpec
from .weights import WeightMap


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a model in memory: `dense` (all but experts), `expert` (the largest single one), all `experts`, the
    KV cache's bytes per token, and the states of one request, in a model that has such.
    """

    dense: int
    expert: int
    experts: int
    num_experts: int
    kv_per_token: int
    state_per_request: int = 0

    @property
    def weights(self) -> int:
        return self.dense + self.experts


def footprint(weights: WeightMap, spec: ModelSpec, dtype: torch.dtype) -> Footprint:
    """Computed from names and shapes, before anything is loaded."""
    tied = weights.model.all_tied_weights_keys
    made = {t for recipe in weights.recipes.values() for t in recipe.targets}
    dense = sum(
        tensor.numel() * weights.dtype_of(name).itemsize
        for name, tensor in weights.expected.items()
        if name not in weights.experts and (name in made or name not in tied)
    )
    per_expert = [(weights.reader(layer).nbytes, layer.num_experts) for layer in spec.experts]
    return Footprint(
        dense=dense,
        expert=max((size for size, _ in per_expert), default=0),
        experts=sum(size * count for size, count in per_expert),
        num_experts=sum(count for _, count in per_expert),
        kv_per_token=spec.kv_values_per_token * dtype.itemsize,
        state_per_request=spec.state_bytes,
    )


def give_back() -> None:
    """Returns what this process has freed to the operating system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _group_memory())


def _group_memory() -> float:
    """What a Linux control group (a container's limit) leaves; infinite without one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return max(int(limit) - used, 0) if limit.isdigit() else float("inf")


def check_weights_fit(size: Footprint, device: torch.device, experts: int | None = None, sharing: int = 1) -> None:
    """Raises ValueError when the weights alone need more memory than is free.

    `experts` is the bytes for this rank's experts where it does not have all in memory; `sharing` ranks use the memory
    together.
    """
    free = free_memory(device) / (sharing if device.type == "cpu" else 1)
    needed = size.weights if experts is None else size.dense + experts
    if needed > free:
        raise ValueError(
            f"model: the weights need {format_size(needed)}, and {format_size(free)} is free on {device.type};"
            " free some memory, choose a smaller --dtype, another device, more ranks (--ep), or --expert-memory for a"
            " part of the experts"
        )


def state_room(config: EngineConfig, size: Footprint, free: float) -> int:
    """Bytes of the states of all requests that may run; raises ValueError when they alone are more than is `free`."""
    needed = size.state_per_request * config.max_num_seqs
    if needed > free:
        fits = int(free // size.state_per_request)
        raise ValueError(
            f"max_num_seqs: the states of {config.max_num_seqs} requests need {format_size(needed)}, and"
            f" {format_size(free)} is free once the weights are loaded; set --max-num-seqs {max(fits // 2, 1)} or less"
        )
    return needed


def kv_blocks(config: EngineConfig, device: torch.device, size: Footprint, max_model_len: int, free: float) -> int:
    """KV blocks that the options allow with `free` bytes left after the weights, of which the states of requests are
    taken first: no more than all requests at full length could use. Raises ValueError when not even one request of
    `max_model_len` fits.
    """
    block_bytes = size.kv_per_token * config.block_size
    states = state_room(config, size, free) if size.state_per_request else 0
    if config.kv_memory is not None:
        budget = parse_size(config.kv_memory, "kv_memory")
        if budget > free - states:
            beside = f" beside {format_size(states)} for the states of requests" if states else ""
            raise ValueError(
                f"kv_memory is {config.kv_memory}, and {format_size(free - states)} is free once the weights are"
                f" loaded{beside}; ask for less"
            )
        source = f"kv_memory {config.kv_memory}"
    else:
        fraction = config.memory_fraction or (0.9 if device.type == "cuda" else 0.5)
        budget = max(int(free * fraction) - states, 0)
        source = f"{fraction:g} of {format_size(free)} free memory"
        if states:
            source += f", less {format_size(states)} for the states of {config.max_num_seqs} requests,"
    blocks = budget // block_bytes
    one = -(-max_model_len // config.block_size)
    if config.kv_memory is None:
        blocks = min(blocks, one * config.max_num_seqs)
    if blocks < one:
        fits = blocks * config.block_size
        fewer = ", lower --max-num-seqs," if states else ","
        raise ValueError(
            f"max_model_len: one request of {max_model_len} tokens needs {format_size(one * block_bytes)} of KV cache,"
            f" but {source} gives room for {fits} tokens; set --max-model-len {max(fits, 1)} or less{fewer} or give it"
            " more memory"
        )
    return blocks


def choose_device(option: str, local_rank: int = 0, local_ranks: int = 1) -> torch.device:
    """The device of a rank among the `local_ranks` on this machine.

    Raises ValueError when CUDA is asked for and there is none, or there are fewer devices than ranks.
    """
    has_cuda = torch.cuda.is_available()
    if option == "cuda" and not has_cuda:
        raise ValueError("device: cuda was asked for, but PyTorch sees no CUDA device; use --device cpu")
    if not has_cuda or option == "cpu":
        return torch.device("cpu")
    if local_ranks == 1:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if 1 < count < local_ranks:
        raise ValueError(f"ep: {local_ranks} ranks on this machine need as many CUDA devices, and PyTorch sees {count}")
    device = torch.device("cuda", local_rank % count)  # a launcher may show each rank its own device only
    torch.cuda.set_device(device)
    return device
