"""The figures of a throughput run, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import report, roofline
from .engines import Opponent, Setup
from .sides import Workload

LLAMA = "llama.cpp"


@dataclass(kw_only=True)
class Result:
    """Samples of one workload: seconds per turn of each engine, and tokens that agreed."""

    workload: Workload
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)
    implementation: str = ""
    experts_touched: float = 0.0

    def rate(self, seconds: float) -> float:
        return self.workload.counted_tokens / seconds

    @property
    def our_rate(self) -> report.Spread:
        return report.spread([self.rate(s) for s in self.ours])

    @property
    def their_rate(self) -> report.Spread:
        return report.spread([self.rate(s) for s in self.theirs])

    @property
    def ratio(self) -> float:
        return self.our_rate.median / self.their_rate.median


def figures_of(
    results: list[Result], setup: Setup, peaks: roofline.Peaks, memory: Mapping[str, int], opponent: str = ""
) -> dict[str, float]:
    """The report's numbers. Rates are tokens per second: output tokens, for `prefill` prompt tokens."""
    figures: dict[str, float] = {}
    for r in results:
        w = r.workload
        if w.name != "continuous":  # ours is the batch again
            figures |= _roofline_figures(r, setup.cost, peaks)
        if r.theirs:
            name, size = _NAMES[w.name], w.input_len if w.name == "prefill" else w.requests
            if opponent == LLAMA:
                figures[f"llama_ratio_{'prefill' if w.name == 'prefill' else size}"] = r.ratio
            else:
                figures[f"{name}_ratio_{size}"] = r.ratio
            figures[f"{opponent.partition('.')[0]}_{name}_tokens_per_s_{size}"] = r.their_rate.median
            figures[f"equal_leading_share_{w.name}"] = sum(r.equal) / len(r.equal)
    held = memory["peak_bytes"] - memory["baseline_bytes"]
    states = setup.cost.state_bytes * int(setup.config.get("max_num_seqs", 0))
    figures["peak_memory_ratio"] = held / (setup.cost.weight_bytes + setup.kv_bytes + states)
    if states:
        figures["state_bytes_ratio"] = memory["state_bytes"] / states
    figures["peak_memory_bytes"] = memory["peak_bytes"]
    figures["baseline_memory_bytes"] = memory["baseline_bytes"]
    figures["weight_bytes"] = setup.cost.weight_bytes
    figures["kv_bytes"] = setup.kv_bytes
    return figures


_NAMES = {"batch": "output", "single": "output", "prefill": "prefill", "continuous": "generate_batch"}


def _roofline_figures(r: Result, cost: roofline.ModelCost, peaks: roofline.Peaks) -> dict[str, float]:
    w = r.workload
    bound = roofline.workload_seconds(cost, peaks, batch=w.requests, input_len=w.input_len, output_len=w.output_len)
    rate, size = r.our_rate.median, w.input_len if w.name == "prefill" else w.requests
    last = "prefill" if w.name == "prefill" else str(w.requests)
    figures = {
        f"moeyard_{_NAMES[w.name]}_tokens_per_s_{size}": rate,
        f"roofline_tokens_per_s_{last}": r.rate(bound),
        f"roofline_share_{last}": rate / r.rate(bound),
    }
    if w.name != "prefill":
        figures[f"experts_touched_{last}"] = r.experts_touched
        figures[f"experts_touched_roofline_{last}"] = roofline.experts_touched(cost.experts, cost.top_k, w.requests)
    return figures


def print_tables(results: list[Result], figures: Mapping[str, float], setup: Setup, opponent: Opponent | None) -> None:
    from ..engine.config import format_size

    rows = []
    for r in results:
        w = r.workload
        bound = figures.get(f"roofline_tokens_per_s_{'prefill' if w.name == 'prefill' else w.requests}")
        row = [f"{w.name}: {w.requests} x {w.input_len} in, {w.output_len} out", _rate(r.our_rate)]
        row += [f"{bound:.1f}", f"{r.our_rate.median / bound:.0%}"] if bound else ["", ""]
        if opponent is not None:
            how = f"{w.method}, {r.implementation}" if r.implementation else "batches"
            row += [_rate(r.their_rate), how, f"{r.ratio:.2f} x"]
        rows.append(row)
    header = ["tokens/s, median (range)", "moeyard", "roofline", "share"]
    print(report.table(header + ([opponent.side.name, "by", "ratio"] if opponent else []), rows))
    held = figures["peak_memory_bytes"] - figures["baseline_memory_bytes"]
    print(
        f"\nmoeyard's peak memory: {format_size(held)} over a baseline of"
        f" {format_size(figures['baseline_memory_bytes'])}; weights {format_size(figures['weight_bytes'])}"
        f" + KV {format_size(figures['kv_bytes'])}; ratio {figures['peak_memory_ratio']:.2f}"
    )
    print(
        f"this machine, {setup.threads} threads: {figures['matrix_bf16_gflops']:.0f} GFLOP/s bf16,"
        f" {figures['matrix_f32_gflops']:.0f} f32, reads {figures['read_gb_per_s']:.1f} GB/s"
    )
    variables = " ".join(f"{k}={v}" for k, v in setup.overlay.items()) or "none"
    print(f"variables set for moeyard: {variables}")
    if opponent is not None:
        print(f"variables set for {opponent.side.name}: {'the same' if opponent.environment == 'same' else 'none'}")
        for name, probe in opponent.probes.items():
            for implementation, why in probe["skipped"].items():
                print(f"transformers, {name}: {implementation} not tried: {why}")


def _rate(s: report.Spread) -> str:
    return f"{s.median:.1f} ({s.low:.1f}-{s.high:.1f})"
