"""`moeyard profile`: measures this machine's constants for a model's experts and their disk, and shows where they are
kept.

One rank needs a part of one layer's experts only. With `--ep N` the ranks are started as `serve` would start them: they
measure each other and end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..engine.config import EngineConfig, format_size
from ..kernels.environment import ENVIRONMENT
from ..scheduler.cost import FREE, NO_LIMIT, Constants, ExpertCost, LinkCost, RankConstants
from ..scheduler.misses import MissCosts, choose_ways
from ..scheduler.offload_cost import DiskCost

if TYPE_CHECKING:
    from ..engine.constants import Record
    from ..engine.expert_files import ExpertFiles
    from ..engine.expert_reader import ExpertReader
    from ..engine.loader import Blueprint
    from ..engine.moe import MoELayer

POOL_BYTES = 2**28
"""Experts that are loaded for one rank's measurement, at least: more than caches hold."""

CLOSE_S = 60.0
"""How long the CPU may take to end what it computes."""
MOST_MISSES = 8
"""Of a layer, in the table that is shown."""

NOT_MEASURED = "not measured yet: moeyard profile"


def run(config: EngineConfig, args: argparse.Namespace) -> int:
    """The command. With `args.force` it measures although there are fresh files."""
    for name, value in ENVIRONMENT.items():  # a rank has these from its launcher; torch is not loaded yet
        os.environ.setdefault(name, value)
    from ..engine.loader import draw
    from ..engine.resolve import resolve_model

    blueprint = draw(config, resolve_model(config.model, config.revision, remote_code=config.trust_remote_code))
    if not blueprint.spec.experts:
        raise ValueError("model: it has no experts; there is nothing to measure")
    records: list[Record[Any]] = []
    if (config.ep or 1) == 1:
        records += _measure_here(config, blueprint, args.force)
    else:
        records += _start_ranks(config, blueprint, args.force)
    blueprint.weights.checkpoint.close()
    records.append(_measure_disk(config, blueprint, args.force))
    for record in records:
        print(f"{heading(record)}\n" + "\n".join(f"  {name:<20}{value}" for name, value in facts(record)))
        print(f"  {'file':<20}{record.path if record.path.exists() else 'none: it could not be written'}")
    return 0


# Measuring


def _measure_here(config: EngineConfig, blueprint: Blueprint, force: bool) -> list[Record[Any]]:
    """One rank's constants, of each shape of experts that the model has; on a GPU those of missing experts too."""
    import torch

    from ..engine.experts import ExpertPool, load_experts
    from ..engine.measure import TRIAL_EXPERTS, rank_constants
    from ..engine.moe import MoELayer
    from ..kernels.threads import set_threads

    set_threads(_threads(config))
    if blueprint.device.type == "cpu":
        from ..kernels.warm_up import warm_up

        warm_up()
    records: list[Record[Any]] = []
    with torch.inference_mode():
        for reader in _shapes(blueprint):
            count = max(TRIAL_EXPERTS, -(-POOL_BYTES // reader.nbytes))
            pool = ExpertPool(reader, min(reader.spec.num_experts, count), blueprint.device)
            load = load_experts(pool, range(pool.num_slots))
            for _ in tqdm(
                load, "loading experts", pool.num_slots, leave=False, disable=None if config.progress else True
            ):
                pass
            layer = MoELayer(blueprint.model.get_submodule(reader.spec.module), pool)
            records.append(rank_constants(layer, force=force, progress=config.progress))
            if blueprint.device.type == "cuda":
                records.append(_measure_misses(config, blueprint, layer, force))
    return records


def _measure_misses(config: EngineConfig, blueprint: Blueprint, layer: MoELayer, force: bool) -> Record[MissCosts]:
    """With the layer's experts in host memory too."""
    from ..engine.experts import load_experts
    from ..engine.host_compute import HostCompute
    from ..engine.host_experts import HostPool
    from ..engine.measure import few_rows_of
    from ..engine.measure_misses import miss_constants
    from ..engine.moe import MoELayer
    from ..kernels.warm_up import warm_up

    warm_up()
    pool = HostPool(layer.pool.reader, layer.pool.num_slots, blueprint.device)
    for _ in load_experts(pool, range(pool.num_slots)):
        pass
    on_cpu = MoELayer(blueprint.model.get_submodule(pool.spec.module), pool)
    compute = HostCompute([on_cpu], pool, few_rows_of(on_cpu, config.progress))
    try:
        return miss_constants(layer, pool, compute, pool.num_slots, force=force, progress=config.progress)
    finally:
        if compute.close(CLOSE_S):
            pool.close()


def _measure_disk(config: EngineConfig, blueprint: Blueprint, force: bool) -> Record[DiskCost]:
    from ..engine.measure_disk import disk_constants

    with closing(_files(blueprint)) as files:
        return disk_constants(files, force=force, progress=config.progress)


def _files(blueprint: Blueprint) -> ExpertFiles:
    from ..engine.expert_files import ExpertFiles

    return ExpertFiles([blueprint.weights.reader(spec) for spec in blueprint.spec.experts])


def _start_ranks(config: EngineConfig, blueprint: Blueprint, force: bool) -> list[Record[Any]]:
    """The constants of each rank and of the group, measured by the ranks where they have no fresh files."""
    from ..engine import constants

    if force:
        for reader in _shapes(blueprint):
            key, group_key = _keys(config, blueprint, reader)
            constants.forget("rank", **key)
            constants.forget("group", **group_key)
    asyncio.run(_start(config))
    records = [record for found in known(config, blueprint) for record in found]
    if not any(isinstance(record.values, Constants) and not record.stale for record in records):
        raise OSError(f"the ranks measured, but left no file in {constants.directory()} on this machine; see their log")
    return records


async def _start(config: EngineConfig) -> None:
    from .frontend import FrontEnd

    frontend = FrontEnd(config)
    try:
        start = asyncio.ensure_future(frontend.start())
        text = f"starting {config.ep} ranks, which measure"
        with tqdm(desc=text, bar_format="{desc}: {elapsed}", disable=None if config.progress else True) as bar:
            while not start.done():
                await asyncio.wait({start}, timeout=0.5)
                bar.refresh()
        await start
    finally:
        await frontend.close()


# What is known already


def known(config: EngineConfig, blueprint: Blueprint) -> list[list[Record[Any]]]:
    """For each shape of experts of a model the files for these options, of this machine: the newest of each kind."""
    from ..engine import constants

    found = []
    for reader in _shapes(blueprint):
        key, group_key = _keys(config, blueprint, reader)
        records = constants.find("rank", **key)[:1]
        if (config.ep or 1) > 1:
            records += constants.find("group", **group_key)[:1]
        records += constants.find("misses", **key)[:1]
        found.append(records)
    return found


def known_disk(blueprint: Blueprint) -> Record[DiskCost] | None:
    """The file of the disk that the model's experts are on."""
    from ..engine import constants
    from ..engine.measure_disk import key_of

    with closing(_files(blueprint)) as files:
        return next(iter(constants.find("disk", **key_of(files))), None)


def experts_s(config: EngineConfig, blueprint: Blueprint) -> float | None:
    """Seconds that computing one token's experts takes, of all layers; None where that has not been measured."""
    from ..engine import constants

    found: dict[str, int] = {}
    total = 0
    for spec in blueprint.spec.experts:
        reader = blueprint.weights.reader(spec)
        key = constants.key_of(reader, blueprint.device, _threads(config))
        name = str(key)
        if name not in found:
            records: list[Record[RankConstants]] = [r for r in constants.find("rank", **key) if not r.stale]
            if not records:
                return None
            found[name] = records[0].values.experts.time_ns(spec.top_k, spec.top_k)
        total += found[name]
    return total / 1e9


def _shapes(blueprint: Blueprint) -> list[ExpertReader]:
    """A layer of each shape of experts, in order of layers."""
    from ..engine import constants

    shapes: dict[str, ExpertReader] = {}
    for spec in blueprint.spec.experts:
        reader = blueprint.weights.reader(spec)
        shapes.setdefault(str(constants.key_of(reader, blueprint.device, 0)), reader)
    return list(shapes.values())


def _threads(config: EngineConfig) -> int:
    """Of each rank, where all are on this machine."""
    from ..kernels.environment import usable_cores

    return config.threads or max(1, usable_cores() // (config.ep or 1))


def _keys(config: EngineConfig, blueprint: Blueprint, reader: ExpertReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a rank's file has, and a group's; on how many machines its ranks are is not known here."""
    from ..engine import constants

    key = constants.key_of(reader, blueprint.device, _threads(config))
    group_key = {name: value for name, value in key.items() if name != "threads" or config.threads}
    return key, group_key | {"ranks": config.ep or 1}


# Text


def heading(record: Record[Any]) -> str:
    """What was measured, on what and when: one line."""
    key = record.key
    stale = f"; {record.stale}, will be measured again" if record.stale else ""
    if isinstance(record.values, DiskCost):
        way = "past" if key["direct"] else "through"
        return (
            f"reading {key['experts']} experts of {key['hidden']} x {key['width']}, {format_size(key['expert_bytes'])}"
            f" each, {way} the page cache from {key['disk']}, measured {record.date:%Y-%m-%d}{stale}"
        )
    ranks = f", {key['ranks']} ranks on {_machines(key)}" if "ranks" in key else ""
    where = key["cpu"] if key["device"] == "cpu" else key["device"]
    threads = f"{key['threads']} thread{'s' if key['threads'] > 1 else ''}"
    what = "missing experts: " if isinstance(record.values, MissCosts) else ""
    experts = (
        f"{what}{key['experts']} experts of {key['hidden']} x {key['width']} in {key['dtype']}, top-{key['top_k']}"
    )
    return f"{experts}, on {where} with {threads}{ranks}, measured {record.date:%Y-%m-%d}{stale}"


def _machines(key: Mapping[str, Any]) -> str:
    counts = str(key["machines"]).split("+")
    return f"{len(counts)} machines ({', '.join(counts)})" if len(counts) > 1 else "one machine"


def facts(record: Record[Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of each constant, for people."""
    values: RankConstants | Constants | DiskCost | MissCosts = record.values
    if isinstance(values, DiskCost):
        several = f"{values.best} read{'s' if values.best > 1 else ''} in flight"
        each = f"{_microseconds(values.time_ns(1, values.best))} each with {several}"
        yield "experts", f"{each}, {values.bytes_per_s / 1e9:.3g} GB/s"
        yield "whole files", f"{1e6 / values.sequential_fs_per_byte:.3g} GB/s"
        return
    if isinstance(values, MissCosts):
        each = (
            f"{_microseconds(values.copy.time_ns(values.expert_bytes))} each, {_microseconds(values.copy_ns)} one more"
        )
        yield "copies", f"{each}, {'' if record.key['pinned'] else 'not '}pinned"
        yield "on the device", _expert_text(values.device)
        yield "on the CPU", _expert_text(values.host)
        yield "both at once", f"{_microseconds(values.both_ns)} each"
        shares = [len(choose_ways(values, [1] * misses).on_cpu) for misses in range(1, MOST_MISSES + 1)]
        yield "of 1, 2, ... misses", f"the CPU computes {', '.join(map(str, shares))} (of one token)"
        return
    if isinstance(values, RankConstants):
        yield "experts", _expert_text(values.experts)
        yield "compiled kernels", f"up to {values.few_rows} rows per expert" if values.few_rows else "not used"
        limit = "any number of" if values.panel_rows == NO_LIMIT else f"up to {values.panel_rows}"
        yield "with packed weights", f"beyond, {limit} rows per expert" if values.panel_rows else "not used"
        if values.host != FREE:
            yield "host and device", _link_text(values.host)
        return
    yield "experts, all ranks", _expert_text(values.experts)
    for field, name in {
        "small": "counts exchange",
        "all_gather": "all-gather",
        "reduce_scatter": "reduce-scatter",
        "all_to_all": "all-to-all",
        "near": "weights, near",
        "far": "weights, far",
    }.items():
        if field == "far" and "+" not in record.key["machines"]:
            continue
        yield name, _link_text(getattr(values, field))
    if values.shared.ps_per_row:
        yield "shared experts", _shared_text(values.shared)
    if values.planner_ns:
        yield "balancing plan", _microseconds(values.planner_ns)


def lines(config: EngineConfig, blueprint: Blueprint, disk: Record[DiskCost] | None = None) -> list[str]:
    """The rows of `moeyard plan` about constants; of `disk` if it has just been measured."""
    rows = []

    def show(record: Record[Any]) -> None:
        rows.append(f"  {'constants':<20}{heading(record)}")
        rows.extend(f"    {name:<20}{value}" for name, value in facts(record))

    for records in known(config, blueprint):
        for record in records:
            show(record)
        if sum(not isinstance(record.values, MissCosts) for record in records) < (1 if (config.ep or 1) == 1 else 2):
            several = f" --ep {config.ep}" if (config.ep or 1) > 1 else ""
            rows.append(f"  {'constants':<20}{NOT_MEASURED}{several}")
    if blueprint.spec.experts:
        disk = disk or known_disk(blueprint)
        if disk is not None:
            show(disk)
        else:
            rows.append(f"  {'disk':<20}{NOT_MEASURED}")
    return rows


def _expert_text(cost: ExpertCost) -> str:
    row = f"{cost.ps_per_row / 1e6:.3g} us per row"
    return f"{_microseconds(cost.base_ns)} + the larger of {_microseconds(cost.per_expert_ns)} per expert and {row}"


def _shared_text(cost: ExpertCost) -> str:
    token = f"{cost.ps_per_row / 1e6:.3g} us per token"
    return f"{_microseconds(cost.base_ns)} + the larger of {_microseconds(cost.per_expert_ns)} and {token}"


def _link_text(link: LinkCost) -> str:
    rate = f", {1e6 / link.fs_per_byte:.3g} GB/s" if link.fs_per_byte else ""
    return f"{_microseconds(link.alpha_ns)}{rate}"


def _microseconds(ns: int) -> str:
    return f"{ns / 1000:.3g} us"
