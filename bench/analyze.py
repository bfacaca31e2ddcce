"""`moeyard analyze`: how local a model's routing is on given texts, and what offloading its experts would cost here.

The engine runs the texts and records which experts each token uses; or a recorded trace is read. The measures are in
`scheduler/locality.py`, the modelled times in `scheduler/offload_cost.py`; the misses at each budget are those of the
engine's policies, replayed, and are kept for `moeyard plan`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ..engine.config import FOR_SEVERAL_RANKS, EngineConfig, parse_size
from ..kernels.environment import ENVIRONMENT, usable_cores
from ..launch.cli import add_options, config_from
from ..scheduler import locality
from ..scheduler.offload_cost import Machine, Need, RoutingSummary, Speed, speed
from ..scheduler.residency.slots import Budget
from . import analyze_report
from .analyze_report import LENGTHS, RATIOS, RULES, Locality
from .offload_speed import verdict
from .quantised_error import error_table, format_errors
from .replay import Task, replayed, shares
from .report import emit
from .token_trace import TokenTrace, read_token_trace, write_token_trace

T = TypeVar("T")
OTHER_OPTIONS = {
    *FOR_SEVERAL_RANKS, "ep", "launcher", "cluster_port", "on_rank_loss", "trace", "placement",
    "max_num_seqs", "prefix_cache", "generation_config",
}  # fmt: skip
"""Of the engine, which mean nothing here: one rank runs one sequence after the other."""
ENGINE_OPTIONS = tuple(f.name for f in dataclasses.fields(EngineConfig) if f.name not in OTHER_OPTIONS)
POLICIES = ("lru", "default", "belady-bypass")
LENGTH = 512
"""Tokens of a sequence, as in the study whose measures these are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="texts to run, UTF-8")
    parser.add_argument("--from-trace", metavar="FILE", help="read recorded routing (.npz) instead of running a model")
    parser.add_argument("--trace", dest="trace_file", metavar="FILE", help="keep the recorded routing here, .npz")
    parser.add_argument("--tokens", type=int, metavar="N", help="only the first N of each text, or of the trace")
    parser.add_argument(
        "--sequence-tokens", type=int, metavar="N", help=f"cut texts into sequences of so many (default: {LENGTH})"
    )
    parser.add_argument(
        "--generate", type=int, metavar="N", help="let the model go on for N tokens after each sequence (default: 0)"
    )
    parser.add_argument(
        "--residents",
        default="0.0625,0.125,0.25,0.5,0.75",
        metavar="SHARE,SHARE",
        help="budgets: shares of the experts that are resident (default: 0.0625,0.125,0.25,0.5,0.75)",
    )
    parser.add_argument(
        "--bandwidth",
        metavar="SIZE",
        help="bytes per second at which missed experts come, as 12GB (default: measured: the host's memory to a GPU, or"
        " the checkpoint's disk)",
    )
    parser.add_argument("--expert-bytes", metavar="SIZE", help="of one expert, for a trace that does not say it")
    parser.add_argument("--dense-bytes", metavar="SIZE", help="of all other weights, for a trace that does not say it")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that replay (default: one for each core)")
    parser.add_argument("--picture", metavar="FILE", help="draw all measures here, an SVG")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, and print them as one JSON line")
    add_options(parser, EngineConfig, model_positional=True, only=ENGINE_OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    residents = shares(args.residents)
    _check(args)
    for name, value in ENVIRONMENT.items():  # a rank has these from its launcher; torch is not loaded yet
        os.environ.setdefault(name, value)
    device, free = _device(args)  # before a model takes a part of it
    if args.from_trace:
        trace, config = read_token_trace(args.from_trace), None
        trace = trace if args.tokens is None else trace.first(args.tokens)
    else:
        config = config_from(argparse.Namespace(**vars(args), max_num_seqs=1), EngineConfig)
        trace = _record(args, config)
    progress = config is None or config.progress
    found = measure(trace, progress)
    errors = format_errors(config) if config is not None else []
    setting = _setting(args, config, trace, device, free)
    rows = _speeds(args, trace, residents, *setting, progress) if setting is not None else []
    keep_routing(trace, rows)
    name = trace.model.name or Path(args.from_trace or "the embedded checkpoint").name
    print(
        f"{name}: {len(trace.topk_TLK)} tokens in {len(trace.start_S)} sequences; {trace.layers} MoE layers of"
        f" {trace.experts} experts, {_active(trace) / trace.layers:.3g} of them for a token\n"
    )
    print(analyze_report.locality_tables(found))
    print()
    if errors:
        print(f"{error_table(errors)}\n")
    if setting is not None:
        need, machine = setting
        print(analyze_report.speed_table(rows, machine))
        print()
        print(verdict(rows, need, machine))
    else:
        print("The expected speed is left out: the trace does not say everything; give --expert-bytes and --bandwidth.")
    if args.picture:
        try:
            Path(args.picture).write_text(analyze_report.picture(name, found, rows), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--picture {args.picture}: {error.strerror}; give a file that can be written") from error
    if args.json:
        samples = {"skew": [dataclasses.asdict(s) for s in found.skew], "rows": [dataclasses.asdict(r) for r in rows]}
        figures = analyze_report.figures(found, rows) | {f"error_{e.name}": e.outputs for e in errors[1:]}
        emit("analyze", figures, samples, args.json)
    return 0


def _check(args: argparse.Namespace) -> None:
    given = [name for name in ("text", "trace_file", "sequence_tokens", "generate") if getattr(args, name)]
    given += [name for name in ENGINE_OPTIONS if name in args and name != "device"]
    given += ["model"] if args.model_positional is not None else []
    if args.from_trace and given:
        name = {"trace_file": "trace"}.get(given[0], given[0]).replace("_", "-")
        raise ValueError(f"--{name} is of no use with --from-trace, which runs no model; leave one of them out")
    if not args.from_trace and not args.text:
        raise ValueError("give --text FILE ..., texts for the model to run, or --from-trace FILE")
    if not args.from_trace:
        for name in ("expert_bytes", "dense_bytes"):
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is for --from-trace; the model's own are known: leave it out")
    for name, least in (("tokens", 1), ("sequence_tokens", 1), ("generate", 0), ("jobs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    for path in filter(None, (args.picture, args.trace_file, args.json)):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its directory does not exist; make it, or give another")
    if args.bandwidth is not None and not parse_size(args.bandwidth, "--bandwidth"):
        raise ValueError("--bandwidth is 0; it must be above 0")


def _record(args: argparse.Namespace, config: EngineConfig) -> TokenTrace:
    from .record import record

    made = record(config, args.text, args.tokens, args.sequence_tokens or LENGTH, args.generate or 0)
    if args.trace_file:
        write_token_trace(args.trace_file, made.trace, token_ids=made.token_T, generated=made.generated_T)
    return made.trace


# Locality


def measure(trace: TokenTrace, progress: bool = True) -> Locality:
    """All measures of a trace, with the sequences as they are."""
    topk, start, experts = trace.topk_TLK, trace.start_S, trace.experts
    active = round(_active(trace))
    sizes = {ratio: ratio * active for ratio in RATIOS if ratio * active < experts * trace.layers}
    longest = locality.longest(start, len(topk))
    lengths = [length for length in LENGTHS if length <= longest]
    groups = dict.fromkeys(LENGTHS, None) | {
        length: locality.segment_groups(topk, start, experts, length) for length in _bar(lengths, "SRP", progress)
    }
    cells = [(length, ratio) for length in lengths for ratio in sizes]
    return Locality(
        groups=groups,
        segment_hits={
            (length, ratio): locality.segment_hit_rate(topk, start, experts, sizes[ratio], length)
            for length, ratio in _bar(cells, "SCH", progress)
        },
        hits={
            (rule, ratio): locality.hit_rate(topk, start, experts, sizes[ratio], rule)
            for rule, ratio in _bar([(rule, ratio) for rule in RULES for ratio in sizes], "hit rates", progress)
        },
        skew=locality.skew(topk, experts),
    )


def _bar(items: Sequence[T], text: str, progress: bool) -> Iterator[T]:
    return iter(tqdm(items, desc=text, disable=None if progress else True, delay=2, leave=False))


def _active(trace: TokenTrace) -> float:
    """Experts of a token, of all layers together."""
    return locality.distinct(trace.topk_TLK) * trace.layers


# Speed


def _need(args: argparse.Namespace, trace: TokenTrace) -> Need:
    sizes = {
        name: getattr(trace.model, name)
        if getattr(args, name) is None
        else parse_size(getattr(args, name), "--" + name.replace("_", "-"))
        for name in ("expert_bytes", "dense_bytes")
    }
    return Need(**sizes, active=_active(trace), experts=trace.experts * trace.layers)


def _device(args: argparse.Namespace) -> tuple[str, int]:
    """Its type, and the bytes that are free there."""
    from ..engine.memory import choose_device, free_memory

    device = choose_device(getattr(args, "device", "auto"))
    return device.type, int(free_memory(device))


def _setting(
    args: argparse.Namespace, config: EngineConfig | None, trace: TokenTrace, device: str, free: int
) -> tuple[Need, Machine] | None:
    """What a token needs and this machine's rates; None where the trace and the options do not say enough."""
    from ..launch.machine import host_to_gpu_rate, read_rate

    need = _need(args, trace)
    if not need.expert_bytes:
        return None
    if args.bandwidth is not None:
        bandwidth, source = float(parse_size(args.bandwidth, "--bandwidth")), "given"
    elif device == "cuda":
        bandwidth, source = host_to_gpu_rate(), "from the host's memory, measured"
    elif config is not None:
        from .disk_rate import disk_cost

        disk = disk_cost(config, progress=config.progress)
        need = dataclasses.replace(need, stored_bytes=disk.expert_bytes)
        bandwidth, source = disk.bytes_per_s, "the disk, measured"
    else:
        return None
    return need, Machine(bandwidth=bandwidth, memory=read_rate(device), free=free, source=source)


def keep_routing(trace: TokenTrace, rows: Sequence[Speed]) -> None:
    """Keeps what the routing makes of the budgets beside the measured constants, for `moeyard plan` to go by. The
    newest of a model counts. Nothing is kept where the trace does not say of which model it is.
    """
    from ..engine import constants

    if not trace.digest or not rows:
        return
    key = {"digest": trace.digest, "layers": trace.layers, "experts": trace.experts}
    columns = {"shares": "share", "default": "misses", "lru": "lru", "least": "least"}
    values = {name: tuple(float(getattr(row, field)) for row in rows) for name, field in columns.items()}
    constants.forget("routing", **key)
    constants.save("routing", key, RoutingSummary(tokens=len(trace.topk_TLK), active=_active(trace), **values), {})


def _speeds(
    args: argparse.Namespace, trace: TokenTrace, residents: list[float], need: Need, machine: Machine, progress: bool
) -> list[Speed]:
    """A row for each budget, by its size, and one for all experts."""
    layers, top_k = trace.layers, trace.topk_TLK.shape[2]
    warm_up = len(trace.topk_TLK) // 2  # the first half fills the slots
    tasks = []
    for share in sorted({*residents} - {1.0}):
        slots = max(1, round(share * need.experts))
        budget = Budget(layers=layers, experts=trace.experts, slots=slots, floor=min(top_k, slots // layers))
        tasks += [Task(policy=name, resident=share, budget=budget, warm_up=warm_up) for name in POLICIES]
    tallies = []
    disable = None if progress else True
    with tqdm(total=len(tasks), unit="replay", disable=disable, delay=2, leave=False) as bar:
        for tally in replayed(tasks, trace, None, args.jobs or usable_cores()):
            tallies.append(tally)
            bar.update()
    rows = []
    for i in range(0, len(tasks), len(POLICIES)):
        lru, misses, least = (tally.misses / tally.steps for tally in tallies[i : i + len(POLICIES)])
        task = tasks[i]
        rows.append(
            speed(need, machine, share=task.resident, slots=task.budget.slots, misses=misses, lru=lru, least=least)
        )
    return [*rows, speed(need, machine, share=1.0, slots=need.experts, misses=0, lru=0, least=0)]
