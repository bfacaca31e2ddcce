"""Prometheus metrics, under vLLM's names with our prefix, and expert load per layer.

`Metrics` is the front end's observer. Request latencies are observed as they happen; what the ranks count comes as
`Stats` (all ranks together) and becomes Prometheus counters by difference. `moeyard:rank_*` are gauges of single ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.messages import Stats
from ..engine.predict.meter import Measured
from ..engine.progress import PHASES
from ..scheduler.choices import DISPATCHERS
from ..scheduler.placement import imbalance
from ..scheduler.table import ExpertTable

PREFIX = "moeyard:"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)

# Stats field, metric, help: totals since the start of the rank.
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of the requests that the engine has prefilled."),
    ("generated_tokens", "generation_tokens", "Tokens generated."),
    ("prefix_queried_tokens", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_hit_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("preemptions", "num_preemptions", "Requests that lost their KV blocks and will be computed again."),
    ("sent_rows", "moe_sent_rows", "Hidden vectors that went to experts of other ranks."),
    ("least_rows", "moe_least_rows", "The fewest that could: each token once for each other rank with its experts."),
    ("sent_bytes", "moe_sent_bytes", "Bytes that dispatch to experts and combine sent between ranks."),
    ("moved_bytes", "moe_expert_bytes_moved", "Bytes of expert weights that were copied or read for a new placement."),
    ("expert_hits", "moe_expert_hits", "Experts that were in --expert-memory when a layer of a step needed them."),
    ("expert_misses", "moe_expert_misses", "Experts that were not, and were read from the checkpoint."),
    ("expert_read_bytes", "moe_expert_bytes_read", "Bytes of experts read from the checkpoint while serving."),
    ("expert_admitted_bytes", "moe_expert_bytes_admitted", "Bytes of experts that got a slot in --expert-memory."),
    ("expert_ahead", "moe_expert_ahead", "Missing experts whose reading had begun before the router chose them."),
    ("expert_ahead_ready", "moe_expert_ahead_ready", "Missing experts that had been read by then."),
    ("expert_ahead_bytes", "moe_expert_bytes_ahead", "Bytes of experts read ahead of the router's choice."),
    ("expert_ahead_used_bytes", "moe_expert_bytes_ahead_used", "Those of experts that the router then chose."),
    ("expert_on_cpu", "moe_expert_on_cpu", "Missing experts that the CPU computed beside the device."),
    (
        "expert_copied",
        "moe_expert_copied",
        "Missing experts that were copied to the device when the router chose them.",
    ),
    (
        "expert_streamed",
        "moe_expert_streamed",
        "Those that were copied before, with the rest of their layer, and used.",
    ),
    (
        "expert_preloaded",
        "moe_expert_preloaded",
        "Experts given slots that were empty before a router asked for them.",
    ),
    ("decode_chosen", "decode_steps_chosen", "Steps in which not all requests that could decode did."),
    ("decode_passed_over", "decode_passed_over", "How often a request was passed over by such a step."),
    ("decode_regrouped", "decode_steps_regrouped", "Such steps that were not in order, to share missing experts."),
)


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """How evenly the tokens of one MoE layer went over its experts, since the engine's start.

    `balancedness` is mean over max of the experts' tokens: 1 is even, 1/experts is everything on one. `top_share` is
    the share of all (token, expert) pairs that the busiest expert, `top_expert`, took.
    """

    layer: int
    assignments: int
    balancedness: float
    top_expert: int
    top_share: float


def expert_load(counts: Sequence[Sequence[int]]) -> list[ExpertLoad]:
    """Load of each layer of `counts` [layer][expert]; layers that have seen no token are left out."""
    loads = []
    for layer, row in enumerate(counts):
        total = sum(row)
        if total == 0:
            continue
        top = max(range(len(row)), key=row.__getitem__)
        loads.append(
            ExpertLoad(
                layer=layer,
                assignments=total,
                balancedness=total / len(row) / row[top],
                top_expert=top,
                top_share=row[top] / total,
            )
        )
    return loads


def rank_imbalance(tables: Sequence[ExpertTable], counts: Sequence[Sequence[int]]) -> float:
    """Busiest rank over mean rank, by tokens of their experts: the mean over the layers that have seen a token.

    1.0 when none has, or when no tables are known (one rank).
    """
    if len(tables) != len(counts):
        return 1.0
    layers = [imbalance(table, row) for table, row in zip(tables, counts, strict=True) if any(row)]
    return sum(layers) / len(layers) if layers else 1.0


_BALANCE = (
    ("layers", "layers", "Layers for whose rows a balancing plan was made.", 1.0),
    ("acted", "layers_changed", "Those where the plan was another than to leave all experts at their homes.", 1.0),
    ("plan_ns", "plan_seconds", "Time that making the plans took.", 1e-9),
    ("native_ns", "native_seconds", "Modelled time of the planned layers, had nothing been done.", 1e-9),
    ("modelled_ns", "planned_seconds", "Modelled time of the planned layers.", 1e-9),
    ("ideal_ns", "even_seconds", "Modelled time of the planned layers, were all work spread evenly.", 1e-9),
    ("moved_bytes", "bytes_moved", "Bytes of expert weights that were sent for one layer of one step.", 1.0),
    ("transfers", "transfers", "Weight transfers of the plans.", 1.0),
    ("parts", "part_transfers", "Those of a part of an expert's columns.", 1.0),
    ("refused", "plans_refused", "Plans that asked for more guests than there is room for.", 1.0),
    ("split_experts", "split_experts", "Experts whose rows a plan gave to several ranks.", 1.0),
    ("guest_hits", "guest_hits", "Experts of planned layers that a guest of an earlier step computed.", 1.0),
    ("guests_kept", "guests_kept", "Moved experts that stayed as guests for later steps.", 1.0),
    ("guests_evicted", "guests_evicted", "Guests that left again.", 1.0),
    ("early", "early_layers", "Planned layers whose weights set out before their router had spoken.", 1.0),
    ("tables", "tables", "Tables made of a window's counts for steps without plans.", 1.0),
    ("shared_rows", "shared_rows", "Tokens whose shared experts another rank computed.", 1.0),
    ("late", "late_transfers", "Weight transfers that came too late; their experts' homes computed the rows.", 1.0),
)
"""Fields of `Stats` without `balance_`, names without `moe_balance_`, texts, and the counters' unit."""

_PREDICTOR_GAUGES = {
    "precision": "Share of the experts not in memory that a predictor of routing found worth reading which their layer"
    " then used; of late.",
    "us_per_token": "Microseconds per token that a predictor of routing takes; of late.",
    "useful_share": "Share of the bytes read ahead on a predictor's word that were used; of late.",
    "depth": "How many layers ahead a predictor is asked, in steps of as many tokens as the last one.",
    "on": "Ranks in which a predictor is asked; one that costs more than it hides is not.",
}
"""By the names of `Measured`'s properties."""


class Metrics:
    """Implements the front end's observer; `render` gives the text that Prometheus scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.expert_counts: list[list[int]] = []
        self._tables: Sequence[ExpertTable] = ()
        self._seen = Stats()
        self._running = self._gauge("num_requests_running", "Requests in the engine's current steps.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting for their first step.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.")
        self._states_usage = self._gauge(
            "state_slots_usage_perc", "Share of the slots for requests' states in use, 0 to 1 (hybrid models)."
        )
        self._resident = self._gauge("moe_expert_resident_bytes", "Bytes of experts in --expert-memory's slots.")
        self._counters = [(name, self._counter(metric, text), 1.0) for name, metric, text in _COUNTERS]
        saved = "Time that regrouped steps save over those in order, by the model."
        self._counters.append(("decode_saved_ns", self._counter("decode_saved_seconds", saved), 1e-9))
        phases = self._counter(
            "step_phase_seconds", "Where the steps of several ranks spent their time; wait is for other ranks.", "phase"
        )
        self._counters += [(f"{phase}_ns", phases.labels(phase), 1e-9) for phase in PHASES]
        steps = self._counter("moe_steps", "Steps of each rank, by how tokens reached other ranks.", "dispatcher")
        self._counters += [(f"steps_{name}", steps.labels(name), 1.0) for name in DISPATCHERS]
        self._counters += [
            (f"balance_{name}", self._counter(f"moe_balance_{metric}", text), unit)
            for name, metric, text, unit in _BALANCE
        ]
        self._time_balance = self._gauge(
            "moe_time_balancedness", "Evenly spread over planned time of the planned layers, by the model; 1 is ideal."
        )
        self._recoverable = self._gauge(
            "moe_recoverable_microseconds",
            "Planned over least possible time of a planned layer, by the model: the rest.",
        )
        self._time_balance.set(1)
        self._finished = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(reason)  # a series that starts at 0
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of one output.")
        self._e2e = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival at the rank to the first step.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of finished requests.", TOKENS)
        self._generated = self._histogram("request_generation_tokens", "Generated tokens of finished requests.", TOKENS)
        self._balance = self._gauge(
            "moe_expert_balancedness", "Mean over max of the experts' tokens since the start; 1 is even.", "layer"
        )
        self._top = self._gauge(
            "moe_expert_top_share", "Share of the layer's (token, expert) pairs on its busiest expert.", "layer"
        )
        self._imbalance = self._gauge(
            "moe_rank_load_imbalance",
            "Tokens of the busiest rank's experts over the mean rank's, mean over layers; 1 is even. From all tokens"
            " since the start and where the experts are now.",
        )
        self._imbalance.set(1)
        recall = self._gauge(
            "moe_predictor_recall",
            "Share of the experts that layers used which a predictor of routing named among its first k or 2k, where k"
            " is how many the layer used; of late.",
            "predictor",
            "at",
        )
        self._of_predictor = [
            (recall, ("k",), "recall_k"),
            (recall, ("2k",), "recall_2k"),
            *(
                (self._gauge(f"moe_predictor_{name}", text, "predictor"), (), name)
                for name, text in _PREDICTOR_GAUGES.items()
            ),
        ]
        self._ranks = self._gauge("ranks", "Ranks that serve now.")
        self._losses = self._counter("rank_losses", "Ranks that were lost: ended, killed or stalled.")
        self._of_rank = [
            (self._gauge(f"rank_{metric}", f"{text} Of one rank.", "rank"), value)
            for metric, text, value in (
                ("num_requests_running", "Requests in the current steps.", lambda stats: stats.running),
                ("num_requests_waiting", "Requests waiting for their first step.", lambda stats: stats.waiting),
                ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", _kv_usage),
            )
        ]
        self._ranks_seen: set[int] = set()

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

    def render(self) -> bytes:
        self._imbalance.set(rank_imbalance(self._tables, self.expert_counts))
        return generate_latest(self.registry)

    # The front end's observer

    def on_submitted(self, prompt_tokens: int) -> None:
        """Nothing to count yet: a request is counted when it ends."""

    def on_first_token(self, queue_s: float, prefill_s: float, ttft_s: float, cached: int) -> None:
        self._queue.observe(queue_s)
        self._prefill.observe(prefill_s)
        self._ttft.observe(ttft_s)

    def on_token(self, itl_s: float, n: int) -> None:
        for _ in range(n):
            self._itl.observe(itl_s / n)

    def on_finished(self, reason: str, e2e_s: float, prompt_tokens: int, output_tokens: int) -> None:
        self._finished.labels(reason).inc()
        self._e2e.observe(e2e_s)
        self._prompt.observe(prompt_tokens)
        self._generated.observe(output_tokens)

    def on_stats(self, stats: Stats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(_kv_usage(stats))
        self._states_usage.set(stats.state_slots_used / max(1, stats.state_slots_total))
        self._resident.set(stats.expert_resident_bytes)
        for name, counter, unit in self._counters:
            total, before = getattr(stats, name), getattr(self._seen, name)
            # A total that went down belongs to a rank that started again: all of it is new.
            counter.inc((total - before if total >= before else total) * unit)
        self._seen = stats
        for predictor, values in stats.predictors.items():
            measured = Measured.from_list(values)
            for gauge, labels, name in self._of_predictor:
                if (value := getattr(measured, name)) is not None:
                    gauge.labels(predictor, *labels).set(value)
        if stats.balance_layers:
            least, planned = stats.balance_ideal_ns, stats.balance_modelled_ns
            self._time_balance.set(least / max(1, planned))
            self._recoverable.set((planned - least) / stats.balance_layers / 1000)
        if stats.expert_counts is not None:
            self.expert_counts = stats.expert_counts
            for load in expert_load(stats.expert_counts):
                self._balance.labels(str(load.layer)).set(load.balancedness)
                self._top.labels(str(load.layer)).set(load.top_share)

    def on_ranks(self, ranks: Mapping[int, Stats]) -> None:
        self._ranks.set(len(ranks))
        self._ranks_seen |= ranks.keys()
        for rank in self._ranks_seen:  # those of a lost rank are 0: it holds nothing
            for gauge, value in self._of_rank:
                gauge.labels(str(rank)).set(value(ranks.get(rank, Stats())))

    def on_rank_lost(self, rank: int) -> None:
        self._losses.inc()

    def on_tables(self, tables: Sequence[ExpertTable]) -> None:
        self._tables = tables


def _kv_usage(stats: Stats) -> float:
    return stats.kv_blocks_used / max(1, stats.kv_blocks_total)
