"""`moeyard bench router`: prefix hits and time to the first token of the policies that choose a rank, simulated.

No model runs. Each rank prefills one prompt at a time, in the order in which they are sent to it, at a fixed rate, and
keeps the blocks of finished prompts in a prefix cache of bounded size, least recently used out first. Decoding takes no
time: a request ends with its first token. That favours least-loaded, which then knows the load of a rank exactly but
for the hits. The cache is the simulator's; the routers see only the prompts' keys and when first tokens come.
"""

from __future__ import annotations

import argparse
import heapq
import math
import zipfile
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..scheduler.replicas import DualMap, Item, LeastLoaded, RoundRobin, Router
from . import report

POLICIES: dict[str, type[Router]] = {"dualmap": DualMap, "round_robin": RoundRobin, "least_loaded": LeastLoaded}
TRACE_BLOCK = 512
"""Tokens of one block of `hash_ids` in a trace file."""
SYNTHETIC_BLOCK = 64
REQUESTS = 12_000


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`keys` has one number for each full block: equal ones mean equal tokens up to there."""

    arrival_s: float
    tokens: int
    keys: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", metavar="FILE", help="requests to replay, .npz (default: synthetic conversations)")
    parser.add_argument("--requests", type=int, help="of the synthetic trace (default: 12000)")
    parser.add_argument("--ranks", type=int, default=8, help="(default: 8)")
    parser.add_argument("--ttft-target", type=float, default=5.0, metavar="S", help="seconds (default: 5)")
    parser.add_argument(
        "--load",
        type=float,
        default=0.8,
        help="prompt tokens that arrive, as a share of what all ranks prefill when nothing is reused (default: 0.8)",
    )
    parser.add_argument(
        "--prefill-rate", type=float, default=10_000.0, metavar="N", help="tokens per second of a rank (default: 10000)"
    )
    parser.add_argument("--cache-tokens", type=int, default=500_000, help="prefix cache of a rank (default: 500000)")
    parser.add_argument("--budget", type=int, default=8192, help="prompt tokens of one step (default: 8192)")
    parser.add_argument("--seed", type=int, help="of the synthetic trace (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="also write the report there, with the raw samples")


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.trace:
        prompts, block = read_trace(args.trace), TRACE_BLOCK
    else:
        requests = REQUESTS if args.requests is None else args.requests
        prompts, block = synthetic(requests, args.seed or 0), SYNTHETIC_BLOCK
    prompts = scale_arrivals(prompts, args.load * args.ranks * args.prefill_rate)
    from tqdm import tqdm

    results = {}
    with tqdm(total=len(POLICIES) * len(prompts), unit="request", disable=None, delay=2, leave=False) as bar:
        for name, policy in POLICIES.items():
            bar.set_description(name)
            ranks = range(args.ranks)
            router = policy(
                ranks, block_size=block, ttft_target_s=args.ttft_target, budget_tokens=args.budget,
                cache_blocks=args.cache_tokens // block,
            )  # fmt: skip
            results[name] = simulate(router, prompts, args.prefill_rate, args.cache_tokens // block, bar.update)
    figures, rows = summary(results, args.ttft_target)
    figures["hit_share_bound"] = unbounded_hit_share(prompts, block)
    span = prompts[-1].arrival_s
    print(f"{len(prompts)} requests in {span:.0f} s, {args.ranks} ranks, load {args.load:g} without reuse")
    print(f"one cache without bound would hit {figures['hit_share_bound']:.1%} of the prompt tokens")
    print(report.table(["", *POLICIES], rows))
    samples = {name: {"ttft_s": result.ttft_s, "busy_s": result.busy_s} for name, result in results.items()}
    report.emit("router", figures, samples, args.json)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("ranks", "ttft_target", "load", "prefill_rate", "cache_tokens", "budget"):
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if args.cache_tokens < TRACE_BLOCK:
        raise ValueError(f"--cache-tokens is {args.cache_tokens}; it must be at least one block, {TRACE_BLOCK}")
    for name, least in (("requests", 2), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and args.trace:
            raise ValueError(f"--{name} is of the synthetic trace; leave it out with --trace")
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")


# Workloads


def read_trace(path: str) -> list[Prompt]:
    """Requests of a trace file: arrays `arrival_s`, `input_len` and, for what they share, `hash_ids`, `hash_start`.

    Raises ValueError for a file that is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        arrival_N, tokens_N = arrays["arrival_s"].astype(float), arrays["input_len"].astype(int)
        starts = arrays["hash_start"].astype(int).tolist() if "hash_ids" in arrays else None
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        reason = f"no array {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"--trace {path}: {reason}; give an .npz file with arrival_s and input_len") from error
    if arrival_N.ndim != 1 or arrival_N.shape != tokens_N.shape or len(arrival_N) < 2:
        raise ValueError(f"--trace {path}: arrival_s and input_len must be two lists of equal length, at least 2")
    if tokens_N.min() < 1 or not np.isfinite(arrival_N).all() or arrival_N.min() == arrival_N.max():
        raise ValueError(f"--trace {path}: prompts have at least one token, and arrive at different times")
    keys: list[tuple[int, ...]]
    if starts is None:
        print(f"{path} has no hash_ids: what prompts share is not known, so every prompt counts as new")
        counts = (tokens_N // TRACE_BLOCK).tolist()
        keys = [tuple((i << 32) + block for block in range(count)) for i, count in enumerate(counts)]
    else:
        ids = arrays["hash_ids"].astype(int).tolist()
        if (
            len(starts) not in (len(arrival_N), len(arrival_N) + 1)
            or not 0 <= starts[0] <= starts[-1] <= len(ids)
            or starts != sorted(starts)
        ):
            raise ValueError(f"--trace {path}: hash_start must rise, with one entry for each request")
        ends = [*starts[1 : len(arrival_N)], len(ids)]
        full = (tokens_N // TRACE_BLOCK).tolist()
        keys = [tuple(ids[a : min(b, a + n)]) for a, b, n in zip(starts, ends, full, strict=False)]
    order = np.argsort(arrival_N, kind="stable").tolist()
    arrivals, tokens = (arrival_N - arrival_N.min()).tolist(), tokens_N.tolist()
    return [Prompt(arrival_s=arrivals[i], tokens=tokens[i], keys=keys[i]) for i in order]


def synthetic(requests: int, seed: int) -> list[Prompt]:
    """Conversations that grow turn by turn, arriving as a Poisson process of one request per second.

    16 applications with system prompts of 200 to 6,000 tokens and Zipf popularity; 50 conversations go on at a time for
    each 1,000 requests, some much more often than others. A turn adds the last answer and a new question; after its
    last turn, or at 32,000 tokens, another conversation takes its place.
    """
    chance = np.random.default_rng(seed)
    systems = np.exp(chance.uniform(math.log(200), math.log(6000), 16)).astype(int).tolist()
    popularity = 1 / np.arange(1, 17)
    slots = max(1, requests // 20)
    weights = 1 / np.arange(1, slots + 1) ** 0.6
    arrivals = np.cumsum(chance.exponential(1.0, requests)).tolist()
    chosen = chance.choice(slots, requests, p=weights / weights.sum()).tolist()
    apps = chance.choice(16, requests, p=popularity / popularity.sum()).tolist()
    added = np.exp(chance.normal(math.log(300), 1.0, (requests, 2))).clip(1, 8000).astype(int).tolist()
    ends = (chance.random(requests) < 0.1).tolist()
    talks: dict[int, tuple[int, int, int]] = {}  # slot -> application, number of the conversation, tokens so far
    prompts = []
    for i, slot in enumerate(chosen):
        app, talk, history = talks.get(slot) or (apps[i], i, systems[apps[i]])
        question, answer = added[i]
        tokens = history + question
        shared = systems[app] // SYNTHETIC_BLOCK
        keys = [app << 32 | block for block in range(shared)]
        keys += [(talk + 16) << 32 | block for block in range(shared, tokens // SYNTHETIC_BLOCK)]
        prompts.append(Prompt(arrival_s=arrivals[i] - arrivals[0], tokens=tokens, keys=tuple(keys)))
        talks[slot] = (app, talk, tokens + answer)
        if ends[i] or tokens + answer > 32_000:
            del talks[slot]
    return prompts


def scale_arrivals(prompts: list[Prompt], tokens_per_s: float) -> list[Prompt]:
    """The same requests at such a pace that their prompts bring `tokens_per_s`."""
    factor = sum(p.tokens for p in prompts) / tokens_per_s / prompts[-1].arrival_s
    return [Prompt(arrival_s=p.arrival_s * factor, tokens=p.tokens, keys=p.keys) for p in prompts]


def unbounded_hit_share(prompts: list[Prompt], block: int) -> float:
    """Share of the prompt tokens that were in some earlier prompt."""
    seen: set[int] = set()
    hits = 0
    for p in prompts:
        hits += cached_blocks(seen, p, block)
        seen.update(p.keys)
    return hits * block / sum(p.tokens for p in prompts)


def cached_blocks(cache: Any, prompt: Prompt, block: int) -> int:
    """Leading blocks of the prompt in `cache`; at least one token is left to compute."""
    limit = (prompt.tokens - 1) // block
    return next((i for i, key in enumerate(prompt.keys[:limit]) if key not in cache), min(limit, len(prompt.keys)))


# Simulation


@dataclass(kw_only=True)
class Result:
    """Of one policy: per request the time to its first token, per rank the time that it was busy."""

    ttft_s: list[float]
    busy_s: list[float]
    hit_tokens: int = 0
    prompt_tokens: int = 0


@dataclass(kw_only=True)
class _Rank:
    queue: deque[int] = field(default_factory=deque)  # the first one is being prefilled
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recently used first


def simulate(router: Router, prompts: list[Prompt], rate: float, cache_blocks: int, tick: Any = None) -> Result:
    """Every prompt through `router` and the ranks that it knows. `tick` is called once for each first token."""
    ranks = {rank: _Rank() for rank in router.ranks}
    places = {rank: i for i, rank in enumerate(ranks)}
    result = Result(ttft_s=[math.nan] * len(prompts), busy_s=[0.0] * len(ranks))
    ends: list[tuple[float, int, int]] = []  # when a prompt is prefilled, its rank, the tokens that were cached
    block = router.block_size

    def begin(now: float, rank: int) -> None:
        state, prompt = ranks[rank], prompts[ranks[rank].queue[0]]
        hits = cached_blocks(state.cache, prompt, block)
        took = (prompt.tokens - hits * block) / rate
        result.busy_s[places[rank]] += took
        heapq.heappush(ends, (now + took, rank, hits * block))

    def end(now: float, rank: int, cached: int) -> None:
        state = ranks[rank]
        i = state.queue.popleft()
        for key in reversed(prompts[i].keys):  # the tail goes first
            state.cache[key] = None
            state.cache.move_to_end(key)
        while len(state.cache) > cache_blocks:
            state.cache.popitem(last=False)
        result.ttft_s[i] = now - prompts[i].arrival_s
        result.hit_tokens += cached
        result.prompt_tokens += prompts[i].tokens
        router.started(str(i), now, cached)
        router.finished(str(i))
        if state.queue:
            begin(now, rank)
        if tick is not None:
            tick()

    arrived = 0
    while arrived < len(prompts) or ends:
        if ends and (arrived == len(prompts) or ends[0][0] <= prompts[arrived].arrival_s):
            now, rank, cached = heapq.heappop(ends)
            end(now, rank, cached)
        else:
            p = prompts[arrived]
            now = p.arrival_s
            router.enqueue(Item(request_id=str(arrived), prompt_len=p.tokens, prefix_keys=p.keys), now)
            arrived += 1
        for request_id, rank in router.release(now):
            ranks[rank].queue.append(int(request_id))
            if len(ranks[rank].queue) == 1:
                begin(now, rank)
    assert not router.waiting, "requests were left in the router"
    return result


def summary(results: dict[str, Result], target_s: float) -> tuple[dict[str, float], list[list[str]]]:
    """Figures `hit_share_dualmap` and so on, and the rows of the table."""
    columns = []
    for result in results.values():
        ttft = result.ttft_s
        within = sum(t <= target_s for t in ttft) / len(ttft)
        mean_busy = sum(result.busy_s) / len(result.busy_s)
        columns.append(
            {
                "hit_share": result.hit_tokens / result.prompt_tokens,
                **{f"ttft_p{p}": report.percentile(ttft, p) for p in (50, 90, 99)},
                "within_target": within,
                "imbalance": max(result.busy_s) / mean_busy,
            }
        )
    texts = {
        "hit_share": ("prompt tokens from the cache", "{:.1%}"),
        "ttft_p50": ("first token p50, s", "{:.2f}"),
        "ttft_p90": ("first token p90, s", "{:.2f}"),
        "ttft_p99": ("first token p99, s", "{:.2f}"),
        "within_target": (f"within {target_s:g} s", "{:.1%}"),
        "imbalance": ("busiest rank / mean", "{:.2f}"),
    }
    figures = {f"{key}_{name}": column[key] for key in texts for name, column in zip(results, columns, strict=True)}
    rows = [[text, *(form.format(column[key]) for column in columns)] for key, (text, form) in texts.items()]
    return figures, rows
