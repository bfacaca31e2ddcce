"""`moeyard bench replay`: residency policies on recorded routing: hits, experts read and copied, and how near the best.

Every policy replays the same tokens, one token a step, one event per layer and step. `predicted` keeps what a model of
the routing says will be used, and decides when a step is over; `predicted-live` decides layer by layer, as the engine
does. The model is fitted first, on the domains of `--fit`, and never on text that is scored. Oracles know the future:
Belady's rule all of it, `foresight-N` the next N tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..engine.config import parse_size
from ..engine.predict.base import Predictor, Rows
from ..kernels.environment import usable_cores
from ..scheduler.residency.compiled_replay import replay_compiled
from ..scheduler.residency.oracles import Belady, Foresight
from ..scheduler.residency.policies import (
    LFRU,
    LFU,
    LRU,
    DecayedFrequency,
    PredictedNow,
    PredictedUse,
    default_policy,
)
from ..scheduler.residency.replay import Tally, replay
from ..scheduler.residency.slots import Budget, Context, Decision, Policy
from .moe_shapes import SHAPES
from .replay_report import Row, figures, picture, result_table
from .report import emit
from .token_trace import TokenTrace, read_token_trace, split_domains

if TYPE_CHECKING:
    from ..engine.next_use import NextUse

REFERENCES = ("lru", "belady-bypass")
"""Always replayed: the excess is counted from the first, down to the second."""
POLICIES: dict[str, Callable[[Budget, TokenTrace], Policy]] = {
    "lru": lambda budget, trace: LRU(budget),
    "lfu": lambda budget, trace: LFU(budget),
    "lfru": lambda budget, trace: LFRU(budget),
    "decayed": lambda budget, trace: DecayedFrequency(budget),
    "default": lambda budget, trace: default_policy(budget),
    "foresight-1": lambda budget, trace: Foresight(budget, trace.topk_TLK, 1),
    "foresight-4": lambda budget, trace: Foresight(budget, trace.topk_TLK, 4),
    "foresight-16": lambda budget, trace: Foresight(budget, trace.topk_TLK, 16),
    "belady": lambda budget, trace: Belady(budget, trace.topk_TLK, bypass=False),
    "belady-bypass": lambda budget, trace: Belady(budget, trace.topk_TLK, bypass=True),
}
PREDICTED = ("predicted", "predicted-live")
NAMES = (*list(POLICIES)[:5], *PREDICTED, *list(POLICIES)[5:])
LAYOUTS = ("per-layer", "pooled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", required=True, metavar="FILE", help="routing token by token, .npz with topk [T, L, K] and seq_start"
    )
    parser.add_argument(
        "--policies",
        metavar="NAME,NAME",
        help=f"of {', '.join(NAMES)} (default: all; {' and '.join(PREDICTED)} need --fit)",
    )
    parser.add_argument(
        "--residents",
        default="0.25,0.5",
        metavar="SHARE,SHARE",
        help="shares of the experts that have a slot; figures without a share in their name are of the first"
        " (default: 0.25,0.5)",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="per-layer", help="a cache per layer, or one for all (default: per-layer)"
    )
    parser.add_argument("--floor", type=int, metavar="N", help="slots each layer keeps with pooled (default: top-k)")
    parser.add_argument("--fit", metavar="DOMAINS", help="names or patterns, commas between: fit predictions on them")
    parser.add_argument("--score", metavar="DOMAINS", help="replay only these (default: all that --fit leaves)")
    parser.add_argument("--tokens", type=int, metavar="N", help="replay the first N tokens (default: all)")
    parser.add_argument(
        "--margin",
        type=float,
        metavar="USES",
        help="predicted uses by which an expert must beat the one it replaces (default: 0.25)",
    )
    parser.add_argument("--save-predictor", metavar="FILE", help="write the fitted predictor here, .npz")
    parser.add_argument("--expert-bytes", metavar="SIZE", help="of one expert, to report bytes too")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="the model whose expert's bytes are reported")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--picture", metavar="FILE", help="write the table's ratios as a heat map here, an SVG")
    parser.add_argument("--json", metavar="FILE", help="write figures and all rows here too")


MARGIN = 0.25
"""What a copy in the background costs, in misses: as many bytes, but nobody waits for most of them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    policy: str
    resident: float
    budget: Budget
    margin: float = MARGIN
    warm_up: int = 0
    """Steps at the beginning that are not counted."""


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    trace = read_token_trace(args.trace)
    residents = shares(args.residents)
    fitted, scored = split_domains(trace, args.fit, args.score)
    names = policies(args.policies, bool(fitted))
    _check(args, names)
    expert_bytes = SHAPES[args.shape].expert_bytes if args.shape else None
    if args.expert_bytes is not None:
        expert_bytes = parse_size(args.expert_bytes, "--expert-bytes")
    score = trace.of(scored)
    if args.tokens is not None:
        score = score.first(args.tokens)
    budgets = {share: _budget(args, trace, share) for share in residents}
    tasks = [
        Task(policy=name, resident=share, budget=budgets[share], margin=MARGIN if args.margin is None else args.margin)
        for share in residents
        for name in names
    ]
    predictor = None
    if _predicting(names):
        from ..engine.next_use import NextUse

        fit = trace.of(fitted)
        with tqdm(total=2 * len(fit.topk_TLK), desc="fit", unit="token", disable=None, delay=2, leave=False) as bar:
            predictor = NextUse.fit(fit.topk_TLK, fit.start_S, trace.experts, digest=trace.digest, progress=bar.update)
        if args.save_predictor:
            predictor = predictor.with_next_token(fit.topk_TLK, fit.start_S)
            predictor.save(args.save_predictor)
    tallies: list[Tally] = []
    with tqdm(total=len(tasks), unit="replay", disable=None, delay=2, leave=False) as bar:
        for tally in replayed(tasks, score, predictor, args.jobs or usable_cores()):
            tallies.append(tally)
            bar.update()
    rows = [
        Row.of(task.policy, task.resident, tally, *(_of(tasks, tallies, name, task) for name in REFERENCES))
        for task, tally in zip(tasks, tallies, strict=True)
    ]
    print(_title(args, score, fitted, scored, budgets))
    print(result_table(rows, expert_bytes))
    if not _predicting(names) and args.policies is None:
        print(f"{' and '.join(PREDICTED)} are left out: they need --fit, the domains to fit them on")
    if args.picture:
        try:
            Path(args.picture).write_text(picture(rows), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--picture {args.picture}: {error.strerror}; give a file that can be written") from error
    samples = {"rows": [row.as_dict() for row in rows], "fit": sorted(fitted), "score": sorted(scored)}
    emit("replay", figures(rows, expert_bytes), samples, args.json)
    return 0


def shares(text: str) -> list[float]:
    """`0.25,0.5`. Raises ValueError for what is not different shares between 0 and 1."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not all(0 < share <= 1 for share in found):
        raise ValueError(f"--residents is {text!r}; give different shares above 0 and up to 1, as 0.25,0.5")
    return found


def policies(text: str | None, fitted: bool) -> list[str]:
    """In the order of NAMES, with the references. Raises ValueError for unknown ones, and predicted without a fit."""
    wanted = text.split(",") if text is not None else [name for name in NAMES if fitted or name not in PREDICTED]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown or len(set(wanted)) < len(wanted):
        raise ValueError(f"--policies is {text!r}; give different ones of {', '.join(NAMES)}")
    if _predicting(wanted) and not fitted:
        raise ValueError(f"--policies has {_predicting(wanted)[0]}, which needs --fit, the domains to fit it on")
    if fitted and not _predicting(wanted):
        raise ValueError(
            f"--fit is only of use with the policies {' and '.join(PREDICTED)}; add one of them to --policies, or leave"
            " --fit out"
        )
    return [name for name in NAMES if name in wanted or name in REFERENCES]


def _predicting(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in PREDICTED]


def _check(args: argparse.Namespace, names: Sequence[str]) -> None:
    for name, least in (("floor", 0), ("tokens", 1), ("jobs", 1), ("margin", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if args.floor is not None and args.layout != "pooled":
        raise ValueError("--floor is of use with --layout pooled; a cache per layer has its own slots")
    for name in ("margin", "save_predictor"):
        if getattr(args, name) is not None and not _predicting(names):
            raise ValueError(
                f"--{name.replace('_', '-')} is of use with the policies {' and '.join(PREDICTED)}, which need --fit"
            )
    if args.shape and args.expert_bytes:
        raise ValueError("--shape and --expert-bytes say the same; give one")
    for path in filter(None, (args.picture, args.save_predictor)):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its directory does not exist; make it, or give another")


def _budget(args: argparse.Namespace, trace: TokenTrace, share: float) -> Budget:
    slots = max(1, int(share * trace.experts + 0.5))
    if args.layout == "per-layer":
        return Budget.per_layer(trace.layers, trace.experts, slots)
    floor = min(trace.topk_TLK.shape[2], slots) if args.floor is None else args.floor
    if floor > slots:
        raise ValueError(f"--floor is {floor}; --residents {share:g} gives a layer {slots} slots on average")
    return Budget(layers=trace.layers, experts=trace.experts, slots=slots * trace.layers, floor=floor)


def _title(
    args: argparse.Namespace, score: TokenTrace, fitted: set[str], scored: set[str], budgets: dict[float, Budget]
) -> str:
    names = ", ".join(sorted(name for name in scored if name)) or Path(args.trace).stem
    layers, experts, top_k = score.layers, next(iter(budgets.values())).experts, score.topk_TLK.shape[2]
    text = f"{len(score.topk_TLK)} tokens of {names}; {layers} layers of {experts} experts, top-{top_k}, {args.layout}"
    return text + (f"; predictions are fitted on {', '.join(sorted(fitted))}" if fitted else "")


def _of(tasks: Sequence[Task], tallies: Sequence[Tally], policy: str, like: Task) -> Tally:
    return next(
        tally
        for task, tally in zip(tasks, tallies, strict=True)
        if (task.policy, task.resident) == (policy, like.resident)
    )


# Replays, in processes of their own


def replayed(tasks: Sequence[Task], trace: TokenTrace, predictor: NextUse | None, jobs: int) -> Iterator[Tally]:
    """The tally of each task, in order."""
    if jobs == 1:
        for task in tasks:
            yield _one(task, trace, predictor)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the libraries' locks and threads
    with ProcessPoolExecutor(jobs, context, initializer=_enter, initargs=(trace, predictor)) as pool:
        try:
            yield from pool.map(_task, tasks)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_given: tuple[TokenTrace, Any]


def _enter(trace: TokenTrace, predictor: NextUse | None) -> None:
    """What a process of the pool needs for all tasks, sent once."""
    global _given
    _given = trace, predictor
    if predictor is not None:
        import torch

        torch.set_num_threads(1)


def _task(task: Task) -> Tally:
    return _one(task, *_given)


def _one(task: Task, trace: TokenTrace, predictor: NextUse | None) -> Tally:
    if task.policy not in PREDICTED:
        policy = POLICIES[task.policy](task.budget, trace)
        tally = replay_compiled(policy, trace.topk_TLK, task.warm_up)
        return tally if tally is not None else replay(policy, trace.topk_TLK, warm_up=task.warm_up)
    assert predictor is not None
    if task.policy == "predicted-live":
        from ..engine.predict.next_use import LiveNextUse

        live = LivePolicy(task.budget, task.margin, LiveNextUse(predictor, sequences=1), trace)
        return replay(live, trace.topk_TLK, warm_up=task.warm_up)
    scores_TLE = predictor.scores(trace.topk_TLK, trace.start_S)
    settled = PredictedUse(task.budget, task.margin)
    return replay(settled, trace.topk_TLK, lambda step: scores_TLE[step], warm_up=task.warm_up)


class LivePolicy(PredictedNow):
    """With a predictor that is told the trace's routing layer by layer, each before the policy decides."""

    def __init__(self, budget: Budget, margin: float, predictor: Predictor, trace: TokenTrace) -> None:
        super().__init__(budget, margin)
        self._predictor = predictor
        self._trace = trace

    def step(self, layer: int, experts: Iterable[int], context: Context) -> Decision:
        now = context.step
        if now != self._step:
            start = int(self._trace.start_S[self._trace.start_S <= now][-1])
            self._predictor.begin_step([Rows(request_id="", first=0, token_ids=[0], start=now - start)])
        self._predictor.routed(layer, self._trace.topk_TLK[now, layer][None])
        return super().step(layer, experts, Context(step=now, scores_LE=self._predictor.future()))

    def settle(self, context: Context) -> Decision:
        self._predictor.end_step()
        return super().settle(context)
