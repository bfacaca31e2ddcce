"""`moeyard bench throughput`: tokens per second, alone or in turns with another engine, beside what is possible here.

Each engine loads the checkpoint once in its own process and keeps it; measured turns alternate, one engine working
while the other waits in a read, so that a change in the machine's speed meets both. Both get the same prompts,
different in every turn (and our prefix cache is off), the same number of threads and the same environment variables.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from . import report, roofline
from .engines import (
    Opponent,
    Setup,
    add_engine_options,
    measure_peaks,
    prepare,
    start_llama,
    start_moeyard,
    start_transformers,
)
from .gguf_file import check_installed
from .results import LLAMA, Result, figures_of, print_tables
from .sides import Workload
from .turns import Side, equal_leading_share, make_prompts, take_turn

WORKLOADS = ("batch", "single", "prefill", "continuous")
WARM_UP_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        choices=("transformers", LLAMA),
        help="measure this engine too, in turns with ours; llama.cpp needs the extra `llama`",
    )
    parser.add_argument("--requests", type=int, default=16, help="concurrent requests of a batch (default: 16)")
    parser.add_argument("--input-len", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--output-len", type=int, default=128, help="new tokens of a request (default: 128)")
    parser.add_argument("--prefill-len", type=int, default=1024, help="prompt of the prefill workload (default: 1024)")
    parser.add_argument(
        "--workloads",
        metavar="NAMES",
        help="some of batch, single (one request), prefill and continuous (the batch against generate_batch),"
        " with commas (default: all that apply)",
    )
    parser.add_argument(
        "--transformers-environment",
        default="same",
        choices=("same", "plain", "better"),
        help="variables of its process: ours, none of ours, or the better of the two in a short run (default: same)",
    )
    parser.add_argument("--matrix", type=int, default=2048, help="side of the roofline's matrices (default: 2048)")
    parser.add_argument("--read-mib", type=int, default=1024, help="buffer of the roofline's reads (default: 1024)")
    add_engine_options(parser)


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """The chosen workloads. Raises ValueError naming the option."""
    for name in ("requests", "input_len", "output_len", "prefill_len", "repeats", "matrix", "read_mib"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.output_len < 2:
        raise ValueError("--output-len is 1; it must be at least 2, for its rate counts output tokens")
    apply = [name for name in WORKLOADS if name != "continuous" or args.against == "transformers"]
    if args.requests == 1:
        apply.remove("single")  # the batch is that
    chosen = args.workloads.split(",") if args.workloads is not None else apply
    for name in chosen:
        if name not in apply:
            raise ValueError(
                f"--workloads: {name!r} is not one of {', '.join(apply)} (continuous needs --against transformers,"
                " single more than one request in the batch)"
            )
    lengths = {"input_len": args.input_len, "output_len": args.output_len}
    every = {
        "batch": Workload(name="batch", requests=args.requests, **lengths),
        "single": Workload(name="single", requests=1, **lengths),
        "prefill": Workload(name="prefill", requests=1, input_len=args.prefill_len, output_len=1),
        "continuous": Workload(name="continuous", requests=args.requests, method="generate_batch", **lengths),
    }
    return [every[name] for name in WORKLOADS if name in chosen]


def alternate(
    ours: Side, opponent: Opponent | None, workload: Workload, setup: Setup, args: argparse.Namespace, bar: Any
) -> Result:
    """Warms both up, then measures `--repeats` turns of each in alternation."""
    result = Result(workload=workload)
    sides = [ours]
    if opponent is not None:
        result.implementation = opponent.implementation(workload)
        if result.implementation:
            opponent.side.call("use", what="choosing experts", timeout=60, implementation=result.implementation)
        sides.append(opponent.side)
    short = replace(workload, output_len=min(workload.output_len, WARM_UP_TOKENS))
    for turn in range(-1, args.repeats):
        prompts = make_prompts(workload, setup.vocab, args.seed, turn)
        answers = []
        for side in sides:
            bar.set_description(f"{workload.name}: {side.name}")
            if turn >= 0:
                answers.append(take_turn(side, workload, prompts, args.turn_timeout))
            elif side is ours:  # our first turn, not measured, counts the experts that a whole run touches
                answer = take_turn(side, workload, prompts, args.turn_timeout, routing=True)
                result.experts_touched = answer["experts_touched"]
            else:
                take_turn(side, short, prompts, args.turn_timeout)
            bar.update()
        if answers:
            result.ours.append(answers[0]["seconds"])
        if len(answers) == 2:
            result.theirs.append(answers[1]["seconds"])
            result.equal.append(equal_leading_share(answers[0]["tokens"], answers[1]["tokens"]))
    return result


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    workloads = workloads_of(args)
    if args.against == LLAMA:
        check_installed()
    setup = prepare(args, workloads)
    if setup.cost.state_bytes and any(w.name == "continuous" for w in workloads):
        if args.workloads is not None:
            raise ValueError("--workloads: transformers' generate_batch refuses models with linear attention")
        workloads = [w for w in workloads if w.name != "continuous"]
    rates = measure_peaks(setup, args)
    opponent = None
    with ExitStack() as stack:
        ours = start_moeyard(stack, setup)
        if args.against == LLAMA:
            opponent = start_llama(stack, setup, workloads)
        elif args.against:
            opponent = start_transformers(stack, setup, args, workloads)
        turns = len(workloads) * (args.repeats + 1) * (2 if opponent else 1)
        with tqdm(total=turns, unit="turn", disable=None) as bar:
            results = [alternate(ours, opponent, w, setup, args, bar) for w in workloads]
        memory = {"moeyard": ours.call("memory", what="peak memory", timeout=60)}
        if opponent is not None:
            memory[opponent.side.name] = opponent.side.call("memory", what="peak memory", timeout=60)
    after = measure_peaks(setup, args)  # the rates are the best of the start and the end
    rates = {name: max(rate, after[name]) for name, rate in rates.items()}
    peaks = roofline.Peaks(
        flops_per_s=rates["float32" if args.dtype == "float32" else "bfloat16"], bytes_per_s=rates["read"]
    )
    theirs = opponent.side.name if opponent is not None else ""
    figures = figures_of(results, setup, peaks, memory["moeyard"], theirs)
    figures |= {"matrix_bf16_gflops": rates["bfloat16"] / 1e9, "matrix_f32_gflops": rates["float32"] / 1e9}
    figures |= {"read_gb_per_s": rates["read"] / 1e9}
    print_tables(results, figures, setup, opponent)
    samples = {
        "seconds": {r.workload.name: {"moeyard": r.ours, theirs or "transformers": r.theirs} for r in results},
        "equal_leading_share": {r.workload.name: r.equal for r in results},
        "workloads": {r.workload.name: asdict(r.workload) for r in results},
        "memory": memory,
        "environment": {"moeyard": setup.overlay, theirs or "transformers": opponent.environment if opponent else ""},
        "experts_probes": opponent.probes if opponent else {},
        "model": setup.model,
    }
    report.emit("throughput", figures, samples, args.json)
    return 0
