"""`moeyard bench affinity`: expert-aware batching on recorded or synthetic routing: experts that steps touch, experts
read, tokens per second by the cost model, and how long tokens wait.

N requests of mixed domains decode equally many tokens; a step has room for half of them. Each batching serves the same
tokens with the same residency policy, so that their sums can be compared. `known` is told the experts of the requests'
next tokens; `recent` predicts them from each request's own past. `together` is what steps with room for all would do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from ..engine.config import parse_size
from ..scheduler.affinity.ways import WAYS
from .affinity_steps import BATCHINGS, Machine, Tally, mixed, simulate, synthetic
from .report import emit, percentile, table
from .token_trace import read_token_trace

REQUESTS = (4, 8, 16, 32)
SYNTHETIC = (12, 32, 4)
"""Layers, experts and top-k without a trace."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", metavar="FILE", help="routing token by token, .npz with topk [T, L, K] and seq_start")
    add("--requests", default="4,8,16,32", metavar="N,N", help="that decode at once (default: 4,8,16,32)")
    add("--step-tokens", type=int, metavar="N", help="room of a step (default: half of the requests)")
    add("--tokens", type=int, default=64, metavar="N", help="of each request (default: 64)")
    add("--rounds", type=int, default=3, metavar="N", help="with other requests each time (default: 3)")
    add("--resident", type=float, default=0.25, metavar="SHARE", help="of the experts with a slot (default: 0.25)")
    add("--ways", metavar="NAME,NAME", help=f"of {', '.join(WAYS)} (default: the best of all in each step)")
    add("--expert-bytes", default="13MB", metavar="SIZE", help="of one expert (default: 13MB)")
    add("--bandwidth", default="25GB", metavar="SIZE", help="missing experts read in a second (default: 25GB)")
    add("--step-us", type=int, default=3000, metavar="US", help="a step without a miss (default: 3000)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of requests (default: 0)")
    add("--json", metavar="FILE", help="write figures and all rows here too")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    requests = numbers(args.requests)
    for name, least in (("tokens", 1), ("rounds", 1), ("step_us", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if args.step_tokens is not None and args.step_tokens < 1:
        raise ValueError(f"--step-tokens is {args.step_tokens}; it must be at least 1")
    if not 0 <= args.resident <= 1:
        raise ValueError(f"--resident is {args.resident}; it must be 0 to 1")
    ways = tuple(WAYS) if args.ways is None else tuple(args.ways.split(","))
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"--ways has {unknown[0]!r}; those that there are: {', '.join(WAYS)}")
    bandwidth = parse_size(args.bandwidth, "--bandwidth")
    if not bandwidth:
        raise ValueError("--bandwidth is 0; it must be above 0")
    machine = Machine(
        expert_bytes=parse_size(args.expert_bytes, "--expert-bytes"),
        read_fs_per_byte=round(10**15 / bandwidth),
        step_ns=1000 * args.step_us,
    )
    if args.trace is not None:
        trace = read_token_trace(args.trace)
    else:
        trace = synthetic(*SYNTHETIC, sequences=2 * max(requests), tokens=args.tokens, seed=args.seed)
    slots = round(args.resident * trace.experts)
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    samples: dict[str, Any] = {}
    with tqdm(total=len(requests) * args.rounds * 4, unit="run", disable=None, delay=2, leave=False) as bar:
        for number in requests:
            most = args.step_tokens or max(1, number // 2)
            tallies = {batching: Tally() for batching in (*BATCHINGS, "together")}
            for turn in range(args.rounds):
                chosen_NTLK = mixed(trace, number, args.tokens, np.random.default_rng((args.seed, turn)))
                for name, tally in tallies.items():
                    together = name == "together"
                    tally.add(
                        simulate(
                            chosen_NTLK,
                            trace.experts,
                            slots,
                            machine,
                            most=number if together else most,
                            batching="in-order" if together else name,
                            ways=ways,
                        )
                    )
                    bar.update()
            figures |= _figures(number, tallies)
            rows += [_row(number, most, name, tally) for name, tally in tallies.items()]
            samples[str(number)] = {name: asdict(tally) for name, tally in tallies.items()}
    print(
        f"{args.trace or 'synthetic'}: {trace.layers} layers of {trace.experts} experts, {slots} of them resident;"
        f" {args.rounds} x {args.tokens} tokens of each request"
    )
    counted = ["tokens/step", "experts/token", "read/token", "tokens/s", "mean wait", "p99", "most"]
    print(table(["requests", "room", "batching", *counted], rows))
    emit("affinity", figures, samples, args.json)
    return 0


def numbers(text: str) -> list[int]:
    """Of `--requests`, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise ValueError(f"--requests is {text!r}; it must be numbers of at least 1 with commas between")
    return found


def _figures(requests: int, tallies: dict[str, Tally]) -> dict[str, float]:
    """Ratios to the batching in order: experts touched and read for the same tokens, and tokens per second."""
    base, found = tallies["in-order"], {}
    for name, suffix in (("recent", ""), ("known", "_known"), ("together", "_together")):
        tally = tallies[name]
        found[f"distinct_experts_ratio_{requests}{suffix}"] = tally.distinct / base.distinct
        found[f"read_experts_ratio_{requests}{suffix}"] = tally.missed / max(1, base.missed)
        found[f"tokens_ratio_{requests}{suffix}"] = tally.tokens_per_second / base.tokens_per_second
        found[f"most_waits_{requests}{suffix}"] = max(tally.waits)
    return found


def _row(requests: int, most: int, name: str, tally: Tally) -> list[str]:
    waits: Sequence[float] = tally.waits
    return [
        str(requests),
        str(requests if name == "together" else most),
        name,
        f"{tally.tokens / tally.steps:.1f}",
        f"{tally.distinct / tally.tokens:.2f}",
        f"{tally.missed / tally.tokens:.2f}",
        f"{tally.tokens_per_second:.1f}",
        f"{sum(waits) / len(waits):.2f}",
        f"{percentile(waits, 99):.0f}",
        f"{max(waits):.0f}",
    ]
