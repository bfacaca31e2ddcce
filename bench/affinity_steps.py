"""Decoding simulated step by step: requests with known routing, a batching that chooses, and slots for experts.

N: requests, T: tokens, L: layers, K: experts of a token in a layer, E: experts of a layer, X: of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from ..scheduler.affinity.picker import AffinityPicker, InOrder
from ..scheduler.affinity.ready import FS_PER_NS
from ..scheduler.affinity.ways import WAYS
from ..scheduler.requests import Request
from ..scheduler.residency.policies import default_policy
from ..scheduler.residency.slots import Budget, Context
from .routing import zipf_weights
from .token_trace import TokenTrace

BATCHINGS = ("in-order", "recent", "known")
"""No choice; by the k experts that a request used most of late; by its next token's real ones."""
HALF_LIFE = 16
"""Tokens after which a use counts half in `recent`."""
DOMAINS = 4
KEPT = 0.5
"""Of synthetic routing: the share of a token's experts that the token before had."""


@dataclass(kw_only=True)
class Tally:
    """Of one batching: sums over steps, and how often each token was passed over."""

    steps: int = 0
    tokens: int = 0
    distinct: int = 0
    """Experts that a step's tokens touch in a layer, over all layers and steps."""
    missed: int = 0
    ns: int = 0
    chosen: int = 0
    """Steps of rounds that were not in order."""
    waits: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.ns * 1e9

    def add(self, other: Tally) -> None:
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a step takes: `step_ns`, and the missing experts' bytes at the rate that they are read with."""

    expert_bytes: int
    read_fs_per_byte: int
    step_ns: int


def simulate(
    requests_NTLK: npt.NDArray[np.int64],
    experts: int,
    slots: int,
    machine: Machine,
    most: int,
    batching: str,
    ways: tuple[str, ...] = tuple(WAYS),
) -> Tally:
    """All tokens of all requests in steps of `most`, fewer at the end; `slots` experts of each layer have a place."""
    number, tokens, layers, top_k = requests_NTLK.shape
    uses_NTX = _uses(requests_NTLK, experts)
    policy, tally = default_policy(Budget.per_layer(layers, experts, slots)), Tally()
    done_N = np.zeros(number, dtype=np.int64)
    recent_NX = np.zeros((number, layers * experts))

    def needs(request: Request) -> npt.NDArray[np.bool_]:
        n = int(request.id)
        return uses_NTX[n, done_N[n]] if batching == "known" else _likeliest(recent_NX[n], experts, top_k)

    def missing_bytes() -> npt.NDArray[np.int64]:
        return ~policy.resident_LE.reshape(-1) * machine.expert_bytes

    picker = (
        InOrder(most=most)
        if batching == "in-order"
        else AffinityPicker(
            predict=needs,
            missing_bytes=missing_bytes,
            most=most,
            read_fs_per_byte=machine.read_fs_per_byte,
            step_ns=machine.step_ns,
            ways=ways,
        )
    )
    ready = [Request(str(n), [0], 1) for n in range(number)]
    while ready:
        picked = frozenset(picker.pick(ready))
        run = [int(id) for id in sorted(picked, key=int)]
        missing_X = ~policy.resident_LE.reshape(-1)
        used_LE = uses_NTX[run, done_N[run]].any(0).reshape(layers, experts)
        missed = int((used_LE.reshape(-1) & missing_X).sum())
        for layer, used_E in enumerate(used_LE):
            policy.step(layer, np.flatnonzero(used_E).tolist(), Context(step=tally.steps))
        tally.steps += 1
        tally.tokens += len(run)
        tally.distinct += int(used_LE.sum())
        tally.missed += missed
        tally.ns += machine.step_ns + missed * machine.expert_bytes * machine.read_fs_per_byte // FS_PER_NS
        recent_NX[run] = recent_NX[run] * 0.5 ** (1 / HALF_LIFE) + uses_NTX[run, done_N[run]]
        done_N[run] += 1
        for request in ready:
            if request.id in picked:
                tally.waits.append(request.passed_over)
            request.passed_over = 0 if request.id in picked else request.passed_over + 1
        ready = [request for request in ready if done_N[int(request.id)] < tokens]
    if isinstance(picker, AffinityPicker):
        tally.chosen = picker.changed
    return tally


def _uses(requests_NTLK: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.bool_]:
    """[N, T, X] whether a token uses an expert."""
    requests, tokens, layers, _ = requests_NTLK.shape
    uses_NTLE = np.zeros((requests, tokens, layers, experts + 1), dtype=bool)
    np.put_along_axis(uses_NTLE, np.where(requests_NTLK < 0, experts, requests_NTLK), True, axis=3)
    return uses_NTLE[..., :experts].reshape(requests, tokens, layers * experts)


def _likeliest(scores_X: npt.NDArray[np.float64], experts: int, most: int) -> npt.NDArray[np.bool_]:
    """[X] the `most` experts of each layer with the highest scores, of those that have one."""
    scores_LE = scores_X.reshape(-1, experts)
    best_LK = np.argsort(-scores_LE, axis=1, kind="stable")[:, :most]
    likely_LE = np.zeros(scores_LE.shape, dtype=bool)
    np.put_along_axis(likely_LE, best_LK, True, axis=1)
    return (likely_LE & (scores_LE > 0)).reshape(-1)


def mixed(trace: TokenTrace, requests: int, tokens: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """[N, T, L, K] the first tokens of `mixed_sequences`."""
    chosen = mixed_sequences(trace, requests, tokens, rng)
    return np.stack([trace.topk_TLK[trace.start_S[s] : trace.start_S[s] + tokens] for s in chosen]).astype(np.int64)


def mixed_sequences(trace: TokenTrace, requests: int, tokens: int, rng: np.random.Generator) -> list[int]:
    """Sequences of so many tokens or more from all domains in turn. Raises ValueError when there are too few."""
    lengths_S = trace.end_S - trace.start_S
    long = rng.permutation(np.flatnonzero(lengths_S >= tokens))
    if len(long) < requests:
        raise ValueError(
            f"--trace has {len(long)} sequences of at least {tokens} tokens, for {requests} requests; give fewer"
            " --requests or --tokens"
        )
    turn: dict[int, int] = {}  # how many a domain has given already
    turns = []
    for s in long:
        domain = int(trace.domain_S[s])
        turns.append((turn.get(domain, 0), domain, int(s)))
        turn[domain] = turn.get(domain, 0) + 1
    # A domain has the same place in every turn: neighbours are of different domains.
    return [s for _, _, s in sorted(turns)[:requests]]


def synthetic(layers: int, experts: int, top_k: int, sequences: int, tokens: int, seed: int) -> TokenTrace:
    """Routing of sequences from `DOMAINS` domains in turn. In each domain other experts are popular, by Zipf's law, and
    a token keeps about half of the experts of the token before.
    """
    rng = np.random.default_rng(seed)
    weights_DLE = np.stack(
        [
            np.stack([zipf_weights(experts, 1.0, rng.permutation(experts)) for _ in range(layers)])
            for _ in range(DOMAINS)
        ]
    )
    domain_S = np.arange(sequences) % DOMAINS
    topk_TSLK = np.empty((tokens, sequences, layers, top_k), dtype=np.int16)
    had_SLE = np.zeros((sequences, layers, experts), dtype=bool)
    for topk_SLK in topk_TSLK:
        # The first of exponential clocks are a draw by weight; a clock at 0 is an expert that is kept.
        clocks_SLE = rng.standard_exponential(had_SLE.shape) / weights_DLE[domain_S]
        clocks_SLE[had_SLE & (rng.random(had_SLE.shape) < KEPT)] = 0
        topk_SLK[:] = np.argsort(clocks_SLE, axis=2, kind="stable")[..., :top_k]
        had_SLE[:] = False
        np.put_along_axis(had_SLE, topk_SLK.astype(np.int64), True, axis=2)
    return TokenTrace(
        topk_TSLK.swapaxes(0, 1).reshape(sequences * tokens, layers, top_k),
        np.arange(sequences, dtype=np.int64) * tokens,
        domain_S.astype(np.int64),
        tuple(f"domain {d}" for d in range(DOMAINS)),
    )
