"""`moeyard bench ep`: ranks against one rank: rates, memory of each rank, bytes sent, where the time goes.

All sides are alive at once and take turns; a side that is not on its turn sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..engine.config import EngineConfig, format_size
from ..engine.messages import Stats
from ..engine.params import SamplingParams
from ..engine.progress import PHASES
from ..launch.frontend import FrontEnd
from ..launch.local import LocalLauncher
from .report import emit, spread, table
from .shapes import add_shape_options, resolve_model

_PARTS_OF_MEMORY = ("dense_bytes", "own_expert_bytes", "guest_bytes", "kv_bytes", "state_bytes")
PARTS = ("attention", "plan", "dispatch", "experts", "combine", "wait", "shared")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint directory (default: one made here)")
    parser.add_argument("--ranks", default="1,2", metavar="N,N", help="worlds to compare (default: 1,2)")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="prompt tokens per rank (default: 2048)")
    parser.add_argument(
        "--step-tokens", type=int, default=512, metavar="N", help="token budget of a step (default: 512)"
    )
    parser.add_argument("--output", type=int, default=16, metavar="N", help="tokens of the decode turns; 0: none")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="decode requests per rank (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads per rank (default: 1)")
    parser.add_argument("--dtype", default="auto", help="as for serve (default: auto)")
    parser.add_argument("--dispatcher", default="auto", help="as for serve (default: auto)")
    parser.add_argument("--chunks", default="auto", help="as for serve (default: auto)")
    parser.add_argument("--balance", default="auto", help="as for serve (default: auto)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0)")
    parser.add_argument("--trace", metavar="FILE", help="write the largest world's spans here, for Perfetto")
    parser.add_argument("--json", metavar="FILE", help="write figures and raw samples here too")
    add_shape_options(parser)


class Side:
    """An engine of some ranks, its processes, and what they said."""

    def __init__(self, model: str, ranks: int, args: argparse.Namespace, trace: str | None) -> None:
        self.ranks = ranks
        self.prefill_s: list[float] = []
        self.decode_s: list[float] = []
        of_several = {
            "dispatcher": args.dispatcher,
            "chunks": args.chunks,
            "router": "round_robin",
            "balance": args.balance,
        }
        config = EngineConfig(
            model=model,
            ep=ranks,
            threads=args.threads,
            dtype=args.dtype,
            max_batched_tokens=max(args.step_tokens, 128),
            max_model_len=args.tokens + 128,
            kv_memory=None,
            memory_fraction=None,
            prefix_cache=False,
            progress=False,
            trace=trace,
            **(of_several if ranks > 1 else {}),
        )
        self.launcher = LocalLauncher(ranks=tuple(range(ranks)))
        self.frontend = FrontEnd(_with_kv(config, args), launcher=self.launcher)
        self._serial = 0

    async def turn(self, prompts: Sequence[list[int]], output_len: int) -> float:
        """Seconds until all prompts have `output_len` tokens; they go to the ranks in turn."""
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)

        async def one(prompt: list[int]) -> None:
            self._serial += 1
            async for _ in self.frontend.generate(prompt, params, request_id=f"bench-{self._serial}"):
                pass

        start = time.perf_counter()
        await asyncio.gather(*(one(prompt) for prompt in prompts))
        return time.perf_counter() - start

    def stats(self) -> dict[int, Stats]:
        return dict(self.frontend.rank_stats)

    def peaks(self) -> dict[int, int]:
        """Most resident bytes of each rank so far, as the operating system counted."""
        return {rank: _peak_resident(pid) for rank, pid in self.launcher.pids.items()}


def _with_kv(config: EngineConfig, args: argparse.Namespace) -> EngineConfig:
    """A KV cache of what the turns need, so that its size is a known part of the memory."""
    import dataclasses

    from ..engine.loader import draw

    kv_per_token = draw(config, Path(config.model)).footprint.kv_per_token
    tokens = max(args.tokens, args.requests * 96) + 256
    return dataclasses.replace(config, kv_memory=str(kv_per_token * tokens))


def _peak_resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("this system does not tell a process's peak memory (VmHWM in /proc)")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    worlds = _worlds(args.ranks)
    for name in ("tokens", "step_tokens", "requests", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    for name in ("dispatcher", "chunks", "balance"):
        if max(worlds) == 1 and getattr(args, name) != "auto":
            raise ValueError(f"--{name} changes nothing with one rank; leave it out, or add a world to --ranks")
    if args.output < 0:
        raise ValueError(f"--output is {args.output}; it must not be negative")
    model = resolve_model(args)
    return asyncio.run(_run(args, model, worlds))


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1 or len(set(worlds)) < len(worlds):
        raise ValueError(f"--ranks is {text!r}; give different numbers of ranks, for example 1,2,4")
    return worlds


async def _run(args: argparse.Namespace, model: str, worlds: list[int]) -> int:
    sides = {n: Side(model, n, args, args.trace if n == max(worlds) else None) for n in worlds}
    try:
        for n in tqdm(worlds, desc="starting", unit="world"):
            await sides[n].frontend.start()
        prefill_parts = await _take_turns(args, sides)
        report(args, sides, prefill_parts)
    finally:
        for side in sides.values():
            await side.frontend.close()
    return 0


async def _take_turns(args: argparse.Namespace, sides: dict[int, Side]) -> dict[int, dict[int, tuple[Stats, Stats]]]:
    """Alternates the sides; the stats of each rank before and after all prefill turns but the first."""
    rng = random.Random(args.seed)
    vocab_size = min(side.frontend.ready.vocab_size for side in sides.values() if side.frontend.ready)
    marks: dict[int, dict[int, tuple[Stats, Stats]]] = {n: {} for n in sides}
    total = (args.repeats + 1) * len(sides) * (2 if args.output else 1)
    with tqdm(total=total, desc="turns", unit="turn") as bar:
        before: dict[int, dict[int, Stats]] = {}
        for repeat in range(args.repeats + 1):
            for n, side in sides.items():
                if repeat == 1:
                    before[n] = await _settled(side)
                prompts = [[rng.randrange(vocab_size) for _ in range(args.tokens)] for _ in range(n)]
                seconds = await side.turn(prompts, 1)
                if repeat:  # the first turn warms up
                    side.prefill_s.append(seconds)
                bar.update()
        for n, side in sides.items():
            after = await _settled(side)
            marks[n] = {rank: (before[n][rank], after[rank]) for rank in after}
        for repeat in range((args.repeats + 1) if args.output else 0):
            for n, side in sides.items():
                prompts = [[rng.randrange(vocab_size) for _ in range(32)] for _ in range(n * args.requests)]
                first = await side.turn(prompts, 1)
                seconds = await side.turn(prompts, args.output + 1) - first
                if repeat:
                    side.decode_s.append(max(seconds, 1e-9))
                bar.update()
    return marks


async def _settled(side: Side) -> dict[int, Stats]:
    """The ranks' stats once they are idle and have said so."""
    await asyncio.sleep(0.6)
    return side.stats()


def report(args: argparse.Namespace, sides: dict[int, Side], marks: dict[int, dict[int, tuple[Stats, Stats]]]) -> None:
    figures: dict[str, float] = {}
    samples: dict[str, Any] = {}
    base = sides.get(1)
    rows = []
    for n, side in sides.items():
        rate = [n * args.tokens / s for s in side.prefill_s]
        decode = [n * args.requests * args.output / s for s in side.decode_s]
        samples[f"prefill_s_{n}"], samples[f"decode_s_{n}"] = side.prefill_s, side.decode_s
        figures[f"prefill_rate_{n}"] = spread(rate).median
        if decode:
            figures[f"decode_rate_{n}"] = spread(decode).median
        if base is not None and n > 1:
            figures[f"prefill_ratio_{n}"] = _ratio(n, side.prefill_s, base.prefill_s)
            if decode:
                figures[f"decode_ratio_{n}"] = _ratio(n, side.decode_s, base.decode_s)
        figures[f"memory_ratio_{n}"] = _memory(side, samples)
        if n > 1:
            figures[f"bytes_ratio_{n}"] = _bytes_ratio(side, marks[n])
        rows.append(
            [
                str(n),
                f"{spread(rate).median:.0f}",
                f"{figures.get(f'prefill_ratio_{n}', 1.0):.2f}",
                f"{spread(decode).median:.0f}" if decode else "-",
                format_size(max(samples[f"peak_bytes_{n}"].values())),
                f"{figures[f'memory_ratio_{n}']:.2f}",
                f"{figures[f'bytes_ratio_{n}']:.3f}" if n > 1 else "-",
                _mix(marks[n]) if n > 1 else "-",
            ]
        )
    largest = max(sides)
    if largest > 1:
        figures["bytes_ratio"] = figures[f"bytes_ratio_{largest}"]
    header = ["ranks", "prefill tok/s", "ratio", "decode tok/s", "peak/rank", "peak/parts", "bytes/least", "a2a steps"]
    print(table(header, rows))
    print()
    print(_phases(args, sides, marks, samples))
    print()
    emit("ep", figures, samples, args.json)


def _ratio(n: int, seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over turns of n ranks' rate by one rank's of the same turn; n ranks do n times the work."""
    return statistics.median(n * b / s for s, b in zip(seconds, base, strict=True))


def _memory(side: Side, samples: dict[str, Any]) -> float:
    """The worst rank's peak by its parts: dense weights, its experts, room for guests, KV cache.

    The peak is without what the process had before any weight: Python, libraries, compiled kernels.
    """
    peaks, infos = side.peaks(), side.frontend.rank_info
    samples[f"peak_bytes_{side.ranks}"] = peaks
    samples[f"info_{side.ranks}"] = {
        rank: {k: info[k] for k in (*_PARTS_OF_MEMORY, "baseline_bytes")} for rank, info in infos.items()
    }
    ratios = []
    for rank, peak in peaks.items():
        info = infos[rank]
        parts = sum(info[name] for name in _PARTS_OF_MEMORY)
        ratios.append((peak - info["baseline_bytes"]) / parts)
    return max(ratios)


def _bytes_ratio(side: Side, marks: dict[int, tuple[Stats, Stats]]) -> float:
    """All bytes that dispatch and combine sent, by the least: each token's vector once to each other rank that has
    one of its experts, and one sum back.
    """
    sent = sum(after.sent_bytes - before.sent_bytes for before, after in marks.values())
    least = sum(after.least_rows - before.least_rows for before, after in marks.values())
    hidden = next(iter(side.frontend.rank_info.values()))["hidden_bytes"]
    return sent / (least * 2 * hidden) if least else 1.0


def _mix(marks: dict[int, tuple[Stats, Stats]]) -> str:
    """The share of steps that went by all-to-all; the others sent every token to every rank."""
    steps = [
        sum(getattr(after, name) - getattr(before, name) for before, after in marks.values())
        for name in ("steps_all_to_all", "steps_all_gather")
    ]
    return f"{steps[0] / max(1, sum(steps)):.0%}"


def _phases(
    args: argparse.Namespace,
    sides: dict[int, Side],
    marks: dict[int, dict[int, tuple[Stats, Stats]]],
    samples: dict[str, Any],
) -> str:
    """Milliseconds of a prefill step in each part, for each rank."""
    rows = []
    for n in sides:
        if n == 1:
            continue
        for rank, (before, after) in sorted(marks[n].items()):
            parts = {p: (getattr(after, f"{p}_ns") - getattr(before, f"{p}_ns")) / args.repeats / 1e6 for p in PHASES}
            whole = (after.step_ns - before.step_ns) / args.repeats / 1e6
            samples[f"phases_ms_{n}_{rank}"] = {**parts, "step": whole}
            rest = whole - sum(parts.values())
            rows.append([f"rank {rank} of {n}", f"{whole:.0f}", *(f"{parts[p]:.0f}" for p in PARTS), f"{rest:.0f}"])
    header = ["ms per turn", "steps", *PARTS, "other"]
    return "where the time of a prefill goes\n" + table(header, rows) if rows else "one rank: no exchange to show"
