"""`moeyard plan`: what a checkpoint takes and what fits, from its headers alone, before anything is loaded.

With `--expert-memory`, or where only that would make it fit, it says what speed to expect by how much of the experts is
in memory; for that it measures the memory, and the disk if that has not been. With `--ep N` all is said of each of N
ranks on this machine: all dense weights, its share of the experts, its own KV cache, its own requests. The constants
that were measured for this model are shown, too. A Hub id is downloaded first, as `serve` would.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

import psutil

from ..engine.config import EngineConfig, format_size
from . import offload_budgets, profile

if TYPE_CHECKING:
    from ..engine.loader import Blueprint
    from ..engine.memory import Footprint
    from ..engine.offload_plan import OffloadPlan


def run(config: EngineConfig, args: argparse.Namespace | None = None) -> int:
    """Prints the memory table and the measured constants. Exit code 0 when the model can be served with these options,
    1 when it does not fit.
    """
    from ..engine.loader import draw
    from ..engine.memory import free_memory
    from ..engine.resolve import resolve_model

    path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
    blueprint = draw(config, path)
    ranks = config.ep or 1
    free = free_memory(blueprint.device) / (ranks if blueprint.device.type == "cpu" else 1)  # they share its RAM
    code = _show_memory(config, blueprint, free)
    suggested, worth = None, None
    if code and blueprint.spec.experts:
        try:
            suggested = offload_budgets.suggestion(config, blueprint, free)
        except ValueError as error:
            print(f"  a part of the experts cannot be in memory: {error}")
    if suggested is not None:
        print(f"  with --expert-memory {suggested} it would fit")
    if suggested is not None or config.expert_memory is not None:
        worth = offload_budgets.budgets(config, blueprint, free, suggested)
    for line in profile.lines(config, blueprint, worth.disk if worth else None):
        print(line)
    for line in worth.lines() if worth else ():
        print(line)
    return code


def _show_memory(config: EngineConfig, blueprint: Blueprint, free: float) -> int:
    """The table; the exit code."""
    from ..engine.memory import kv_blocks
    from ..engine.offload_plan import plan_offload

    size = blueprint.footprint
    ranks, on_cpu = config.ep or 1, blueprint.device.type == "cpu"
    experts, slots, note = size.experts, size.num_experts, f"{size.num_experts} experts"
    if ranks > 1:
        own = offload_budgets.own_experts(config, blueprint)
        experts, slots = own.nbytes, own.experts
        note = f"room for {slots} of {size.num_experts} experts"
    offload = plan_offload(config, blueprint, ranks)
    below: list[tuple[str, float, str]] = []
    if offload is not None:
        store = offload.size
        experts = store.nbytes
        of = f"{slots} experts" if ranks == 1 else f"the {slots} that a rank has"
        note = f"{store.slots} of {of} stay, {store.staging} at a time pass through,"
        below += _below(offload, dataclasses.replace(size, num_experts=slots))
    left = free - size.dense - experts
    where = "RAM" if on_cpu else "GPU"
    total = f"of {format_size(_total(blueprint.device.type))}"

    rows = [
        ("dense weights", size.dense, ""),
        (
            "expert memory" if offload else "expert weights",
            experts,
            f"{note} in {len(blueprint.spec.experts)} layers, {format_size(size.expert)} each",
        ),
        *below,
        (f"free {where}", free, f"{total}, for {ranks} ranks on this machine" if on_cpu and ranks > 1 else total),
        ("left for KV cache", max(left, 0), f"{format_size(size.kv_per_token)} per token"),
    ]
    kind = f"{blueprint.spec.architecture} in {str(blueprint.dtype).removeprefix('torch.')}"
    if config.expert_dtype != "auto":
        kind += f", experts in {config.expert_dtype},"
    print(f"{kind} on {blueprint.device.type}" + (f", for each of {ranks} ranks" if ranks > 1 else ""))
    for name, value, note in rows:
        print(f"  {name:<20}{format_size(value):>10}  {note}".rstrip())
    if left <= 0:
        print(f"  does not fit: the weights need {format_size(-left)} more than is free")
        return 1
    try:
        blocks = kv_blocks(config, blueprint.device, size, blueprint.max_model_len, left)
    except ValueError as error:
        print(f"  does not fit: {error}")
        return 1
    tokens = blocks * config.block_size
    if size.state_per_request:
        states = size.state_per_request * config.max_num_seqs
        each = format_size(size.state_per_request)
        print(f"  {'request states':<20}{format_size(states):>10}  {config.max_num_seqs} requests, {each} each")
    print(
        f"  {'KV cache':<20}{format_size(tokens * size.kv_per_token):>10}  {tokens} tokens:"
        f" {tokens // blueprint.max_model_len} requests of {blueprint.max_model_len} tokens at once"
        f"{' on each rank' if ranks > 1 else ''}"
    )
    return 0


def _below(offload: OffloadPlan, size: Footprint) -> list[tuple[str, float, str]]:
    """The rows of the experts that have no place on the device: in a GPU's host memory, and on disk."""
    if offload.host_bytes is None:
        others = size.num_experts - offload.budget.slots
        return [("read from disk", others * size.expert, f"the other {others} experts, when they are needed")]
    kept = min(offload.host_bytes // size.expert, size.num_experts)
    rows: list[tuple[str, float, str]] = [("host memory", kept * size.expert, f"{kept} of {size.num_experts} experts")]
    if others := size.num_experts - kept:
        rows.append(("read from disk", others * size.expert, f"the other {others} experts, when they are needed"))
    return rows


def _total(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().total
