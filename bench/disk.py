"""`moeyard bench disk`: how fast single experts are read from a checkpoint's files, by reads in flight, against reading
the files from start to end.
"""

from __future__ import annotations

import argparse

from .report import emit, spread, table
from .shapes import add_shape_options, resolve_model

IN_FLIGHT = "1,2,4,8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint directory (default: one made here)")
    parser.add_argument(
        "--in-flight", default=IN_FLIGHT, metavar="N,N", help=f"reads at the same time (default: {IN_FLIGHT})"
    )
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of reading per case (default: 0.5)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each case (default: 5)")
    parser.add_argument("--cached", action="store_true", help="through the page cache, although direct reads would do")
    parser.add_argument("--json", metavar="FILE", help="write figures and raw samples here too")
    add_shape_options(parser)


def run(args: argparse.Namespace) -> int:
    counts = _counts(args.in_flight)
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")
    if args.seconds <= 0:
        raise ValueError(f"--seconds is {args.seconds:g}; it must be above 0")
    from ..engine.config import EngineConfig
    from ..engine.expert_files import ExpertFiles
    from ..engine.loader import draw
    from ..engine.measure_disk import measure_disk
    from ..engine.resolve import resolve_model as path_of

    config = EngineConfig(model=resolve_model(args), device="cpu")
    blueprint = draw(config, path_of(config.model, config.revision, remote_code=False))
    if not blueprint.spec.experts:
        raise ValueError(f"model: {config.model} has no experts to read; give a Mixture-of-Experts model")
    files = ExpertFiles([blueprint.weights.reader(spec) for spec in blueprint.spec.experts], direct=not args.cached)
    try:
        cost, samples = measure_disk(files, in_flight=counts, case_s=args.seconds, rounds=args.repeats, progress=True)
    finally:
        files.close()
    sequential = 1e9 / cost.sequential_fs_per_byte
    figures: dict[str, float] = {"sequential_mb_per_s": sequential}
    rows = []
    for n in counts:
        # Each turn timed whole experts, then blocks.
        rate = spread([1e3 * nbytes / ns for nbytes, ns in samples[n][::2]])
        block_us = spread([ns / 1e3 for _, ns in samples[n][1::2]])
        rows.append(
            [
                f"{n}",
                f"{rate.median:.0f} ({rate.low:.0f}-{rate.high:.0f})",
                f"{rate.median / sequential:.0%}",
                f"{block_us.median:.0f}",
                f"{n * cost.time_ns(1, n) / 1e6:.2f}",
            ]
        )
        figures |= {f"expert_mb_per_s_{n}": rate.median, f"block_us_{n}": block_us.median}
    figures |= {"best_in_flight": cost.best, "expert_bytes": cost.expert_bytes, "direct": int(files.direct)}
    print(table(["reads in flight", "MB/s, median (range)", "of sequential", "us per block", "ms per expert"], rows))
    how = "past the page cache" if files.direct else "through the page cache"
    print(f"\nfrom start to end: {sequential:.0f} MB/s; an expert: {cost.expert_bytes / 1e6:.2f} MB, {how}")
    emit("disk", figures, {str(n) if n else "sequential": s for n, s in samples.items()}, args.json)
    return 0


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(f"--in-flight is {text!r}; give different numbers of reads, for example 1,2,4")
    return counts
