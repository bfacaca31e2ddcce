"""`moeyard bench balance --ranks N`: MoE layers over real processes, balanced by a planner and not, under skew.

The layers are those of a checkpoint, driven as the engine drives them; only the router's choices are given, because
random weights route evenly. Both sides run in the same processes and take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..scheduler.cost import median_error
from .report import emit, table
from .routing import can_deal, dealt, token_experts

BOUND_S = 600.0
"""How long a rank may take for one answer: loading, or a turn."""
SIDES = ("native", "balanced")


DEFAULTS: dict[str, Any] = {
    "balance": "priced",
    "tokens": 2048,
    "hot": 8,
    "shares": "80,95",
    "layers_per_turn": 2,
    "repeats": 5,
    "threads": 1,
    "dtype": "auto",
}
HELP = {
    "balance": "planner of the balanced side",
    "tokens": "per rank and step",
    "hot": "busy experts, all of the first rank and others in each turn",
    "shares": "percent of the copies that they get",
    "layers_per_turn": "layers that a turn runs",
    "repeats": "turns of each side",
    "threads": "CPU threads per rank",
    "dtype": "as for serve",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options have no defaults in the parser, so that those that were given can be told."""
    group = parser.add_argument_group("real processes")
    group.add_argument(
        "--ranks", type=int, metavar="N", help="so many, whose layers are balanced, and plain EP in turn"
    )
    for name, default in DEFAULTS.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            metavar="N" if isinstance(default, int) else "TEXT",
            help=f"{HELP[name]} (default: {default})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What one rank says of a turn: seconds of all layers, its peak of resident bytes, the balancer's figures."""

    seconds: float
    peak_bytes: int
    figures: dict[str, int]


def run(args: argparse.Namespace, model: Path) -> int:
    """Raises ValueError for options that cannot work."""
    from ..engine.config import EngineConfig
    from ..engine.loader import draw

    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name in ("tokens", "layers_per_turn", "repeats", "threads", "hot"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.ranks < 2:
        raise ValueError(f"--ranks is {args.ranks}; there is nothing to balance below 2")
    config = EngineConfig(
        model=str(model), ep=args.ranks, dtype=args.dtype, balance=args.balance, threads=args.threads, progress=False
    )
    spec = draw(config, model).spec.experts[0]
    shares = _shares(args.shares, spec.num_experts, spec.top_k, args.hot)
    if args.hot > spec.num_experts // args.ranks:
        raise ValueError(f"--hot is {args.hot}; the first of {args.ranks} ranks has {spec.num_experts // args.ranks}")
    with _Ranks(args.ranks, config, model, args.layers_per_turn, args.threads) as ranks:
        samples = _take_turns(args, ranks, shares)
    report(args, shares, samples)
    return 0


def _shares(text: str, experts: int, top_k: int, hot: int) -> list[int]:
    try:
        shares = [int(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares:
        raise ValueError(f"--shares is {text!r}; give percentages, for example 80,95")
    for share in shares:
        if not can_deal(experts, top_k, hot, share):
            raise ValueError(
                f"--shares {share}: so many copies do not fit into {hot} experts with top-{top_k}, one for each token"
            )
    return shares


Samples = dict[str, dict[str, list[list[Turn]]]]
"""By load and side, for each repeat what each rank said."""


def _take_turns(args: argparse.Namespace, ranks: _Ranks, shares: list[int]) -> Samples:
    loads = ["balanced", *map(str, shares)]
    samples: Samples = {load: {side: [] for side in SIDES} for load in loads}
    with tqdm(total=len(loads) * len(SIDES) * (args.repeats + 1), desc="turns", unit="turn", disable=None) as bar:
        for load in loads:
            for repeat in range(args.repeats + 1):
                for side in SIDES[:: -1 if repeat % 2 else 1]:  # neither is always the first
                    turns = ranks.turn(side, load, args.tokens, args.hot, repeat)
                    if repeat:  # the first warms up
                        samples[load][side].append(turns)
                    bar.update()
    return samples


def report(args: argparse.Namespace, shares: list[int], samples: Samples) -> None:
    figures: dict[str, float] = {}
    rows = []
    pairs: list[tuple[int, int]] = []
    raw: dict[str, Any] = {}
    for load, sides in samples.items():
        seconds = {side: [max(turn.seconds for turn in turns) for turns in sides[side]] for side in SIDES}
        ratio = statistics.median(n / b for n, b in zip(seconds["native"], seconds["balanced"], strict=True))
        figures[f"real_ratio_{load}"] = ratio
        peaks = {side: [max(turn.peak_bytes for turn in turns) for turns in sides[side]] for side in SIDES}
        last = sides["balanced"][-1][0].figures
        for side in SIDES:
            name = "modelled_ns" if side == "balanced" else "native_ns"  # both known where plans are made
            modelled = [turns[0].figures[name] for turns in sides["balanced"]]
            pairs += [(m, round(s * 1e9)) for m, s in zip(modelled, seconds[side], strict=True) if m]
        layers = max(1, last["layers"])
        rows.append(
            [
                load if load == "balanced" else f"{load} % in {args.hot}",
                *(f"{statistics.median(seconds[side]) * 1000 / args.layers_per_turn:.0f}" for side in SIDES),
                f"{ratio:.2f}",
                f"{last['native_ns'] / max(1, last['modelled_ns']):.2f}",
                f"{last['moved_bytes'] / layers / 2**20:.1f}",
                f"{last['transfers'] / layers:.1f}",
                f"{last['plan_ns'] / layers / 1e3:.0f}",
                *(f"{statistics.median(peaks[side]) / 2**20:.0f}" for side in SIDES),
            ]
        )
        raw[load] = {"seconds": seconds, "peak_bytes": peaks, "figures": last}
    for share in shares:
        # Of the rank that would be hot, by the operating system: against even routing on the same side.
        figures[f"peak_memory_ratio_{share}"] = _peak(samples, str(share)) / _peak(samples, "balanced")
    if pairs:
        figures["cost_model_median_error"] = median_error(pairs)
    header = ["routing", "native ms", "balanced ms", "ratio", "modelled", "moved MiB", "moves", "plan us"]
    print(table([*header, "native MiB", "balanced MiB"], rows))
    print()
    emit("balance", figures, raw, args.json)


def _peak(samples: Samples, load: str) -> float:
    """Of the first rank, which has the busy experts."""
    return statistics.median(turns[0].peak_bytes for turns in samples[load]["balanced"])


# Processes


class _Ranks:
    """The processes, from a `with` statement's beginning to its end."""

    def __init__(self, size: int, config: Any, model: Path, layers: int, threads: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._addresses = addresses = self._context.Queue()  # kept: it is gone when nobody holds it
        for rank in range(size):
            here, there = self._context.Pipe()
            process = self._context.Process(
                target=_rank_main, args=(rank, size, config, model, layers, threads, addresses, there), daemon=True
            )
            self._processes.append(process)
            self._pipes.append(here)

    def __enter__(self) -> _Ranks:
        for process in self._processes:
            process.start()
        for _ in tqdm(self._pipes, desc="loading", unit="rank", disable=None, leave=False):
            pass
        self._answers()
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe in self._pipes:
            if exc[0] is None:
                pipe.send(None)
        for process in self._processes:
            process.join(10 if exc[0] is None else 0)
            if process.is_alive():
                process.kill()

    def turn(self, *command: Any) -> list[Turn]:
        for pipe in self._pipes:
            pipe.send(command)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(BOUND_S):
                raise RuntimeError(f"rank {rank} said nothing within {BOUND_S:g} s")
            try:
                answer = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} ended") from None
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank}: {answer}")
            answers.append(answer)
        return answers


def _rank_main(
    rank: int, size: int, config: Any, model: Path, layers: int, threads: int, addresses: Any, pipe: Connection
) -> None:
    try:
        bench = _RankBench(rank, size, config, model, layers, threads, addresses)
        pipe.send(True)
        while (command := pipe.recv()) is not None:
            pipe.send(bench.turn(*command))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class _RankBench:
    """One rank: the layers as the engine has them, without the rest of the model around them."""

    def __init__(
        self, rank: int, size: int, config: Any, model: Path, layers: int, threads: int, addresses: Any
    ) -> None:
        import torch

        from ..engine.group import RankGroup, make_store
        from ..engine.loader import draw, load
        from ..engine.moe import calibrate
        from ..engine.parallel import Parallel, Seat, first_tables
        from ..engine.progress import Progress
        from ..kernels.threads import set_threads

        set_threads(threads)
        torch.set_grad_enabled(False)
        store = None
        if rank == 0:
            store, address = make_store("127.0.0.1")
            for _ in range(size - 1):
                addresses.put(address)
        else:
            address = addresses.get(timeout=BOUND_S)
        self.group = RankGroup(
            epoch=1,
            members=range(size),
            rank=rank,
            address=address,
            device=torch.device("cpu"),
            timeout_s=BOUND_S,
            progress=Progress(),
            store=store,
        )
        seat = Seat(group=self.group, local_rank=rank, local_ranks=size)
        blueprint = draw(config, model, rank, size)
        tables = first_tables(config, [spec.num_experts for spec in blueprint.spec.experts], seat)
        experts = load(blueprint, progress=False, slots=[table.slots_PS[rank] for table in tables])
        self.layers = experts.layers[:layers]
        calibrate(self.layers)
        self.parallel = Parallel(config, seat, self.layers, tables[:layers])
        self.parallel.join(self.group, BOUND_S)
        self.parallel.measure()
        self.dtype = blueprint.dtype

    def turn(self, side: str, load: str, tokens: int, hot: int, seed: int) -> Turn:
        import numpy as np
        import torch

        spec, group = self.layers[0].pool.spec, self.group
        percent, hot = (0, 0) if load == "balanced" else (int(load), hot)
        rows_PE = dealt(group.size, tokens, spec.num_experts, spec.top_k, hot, percent)
        # Others of the first rank's experts are busy in each turn: weights that came for the last one are of no use.
        own = spec.num_experts // group.size
        rows_PE[:, :own] = np.roll(rows_PE[:, :own], seed * hot, axis=1)
        ids = token_experts(rows_PE[group.position], tokens)
        ids_TK = torch.from_numpy(np.random.default_rng(seed).permutation(ids))
        generator = torch.Generator().manual_seed(seed + 1000 * group.position)
        x_TD = torch.randn(tokens, self.layers[0].pool.hidden, generator=generator).to(self.dtype)
        weights_TK = torch.full((tokens, spec.top_k), 1 / spec.top_k)
        self.parallel.balancing = side == "balanced"
        before = self.parallel.figures()
        _reset_peak()
        group.all_gather_ints([0])  # all begin together
        start = time.perf_counter()
        self.parallel.agree(tokens, True)
        for layer in self.layers:
            layer(x_TD, ids_TK, weights_TK)
        seconds = time.perf_counter() - start
        group.all_gather_ints([0])
        after = self.parallel.figures()
        figures = {name.removeprefix("balance_"): after[name] - before[name] for name in after if "balance" in name}
        return Turn(seconds=seconds, peak_bytes=_peak_bytes(), figures=figures)


def _reset_peak() -> None:
    """The operating system's count of most resident bytes begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("this system does not tell a process's peak memory (VmHWM in /proc)")
