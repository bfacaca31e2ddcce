"""`moeyard bench latency`: time to the first token and between tokens, of our engine, when a batch arrives at once."""

from __future__ import annotations

import argparse
import itertools
from contextlib import ExitStack

from . import report
from .engines import add_engine_options, prepare, start_moeyard
from .sides import Workload
from .turns import make_prompts, take_turn

PERCENTILES = (50, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", default="1,4,16", metavar="LIST", help="requests at once (default: 1,4,16)")
    parser.add_argument("--input-len", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--output-len", type=int, default=64, help="new tokens of a request (default: 64)")
    add_engine_options(parser)


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """One workload per batch size. Raises ValueError naming the option."""
    for name in ("input_len", "output_len", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.output_len < 2:
        raise ValueError("--output-len is 1; it must be at least 2, for there to be a time between tokens")
    try:
        sizes = sorted({int(size) for size in args.batch_sizes.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise ValueError(f"--batch-sizes is {args.batch_sizes!r}; write positive numbers with commas, such as 1,4,16")
    return [
        Workload(name=f"batch{size}", requests=size, input_len=args.input_len, output_len=args.output_len)
        for size in sizes
    ]


def times_of(stamps: list[list[float]]) -> dict[str, list[float]]:
    """Milliseconds to the first token (`ttft`), between tokens (`itl`) and to the last one (`e2e`).

    `stamps` has, per request, the times of its tokens in seconds from the start of the turn.
    """
    return {
        "ttft": [1e3 * times[0] for times in stamps],
        "itl": [1e3 * (b - a) for times in stamps for a, b in itertools.pairwise(times)],
        "e2e": [1e3 * times[-1] for times in stamps],
    }


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    workloads = workloads_of(args)
    setup = prepare(args, workloads)
    samples: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        side = start_moeyard(stack, setup)
        with tqdm(total=len(workloads) * (args.repeats + 1), unit="turn", disable=None) as bar:
            for w in workloads:
                samples[w.name] = {"ttft": [], "itl": [], "e2e": []}
                for turn in range(-1, args.repeats):
                    bar.set_description(w.name)
                    prompts = make_prompts(w, setup.vocab, args.seed, turn)
                    answer = take_turn(side, w, prompts, args.turn_timeout)
                    bar.update()
                    if turn >= 0:  # the first one warms up
                        for name, values in times_of(answer["stamps"]).items():
                            samples[w.name][name] += values
    figures, rows = summary(workloads, samples)
    print(report.table(["ms", *(f"p{p}" for p in PERCENTILES)], rows))
    report.emit("latency", figures, {"ms": samples, "model": setup.model}, args.json)
    return 0


def summary(
    workloads: list[Workload], samples: dict[str, dict[str, list[float]]]
) -> tuple[dict[str, float], list[list[str]]]:
    """Figures `ttft_ms_p50_b16` and so on, and the rows of the table."""
    names = {"ttft": "first token", "itl": "between tokens", "e2e": "last token"}
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    for w in workloads:
        for name, text in names.items():
            values = [report.percentile(samples[w.name][name], p) for p in PERCENTILES]
            for p, value in zip(PERCENTILES, values, strict=True):
                figures[f"{name}_ms_p{p}_b{w.requests}"] = value
            rows.append([f"{w.requests} requests: {text}", *(f"{value:.1f}" for value in values)])
    return figures, rows
