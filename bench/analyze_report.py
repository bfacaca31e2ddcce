"""What `moeyard analyze` says and draws of what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..engine.config import format_size
from ..launch.offload_budgets import rate_text
from ..scheduler.locality import SegmentGroups, Skew
from ..scheduler.offload_cost import Machine, Speed
from .line_chart import Chart, line_charts
from .report import table

LENGTHS = (4, 8, 16, 32, 64, 128, 256)
"""Tokens of a segment."""
RATIOS = (1, 2, 3)
"""Slots of a cache, in experts that one token uses."""
RULES = ("lru", "lfu", "belady")


@dataclass(frozen=True, kw_only=True)
class Locality:
    """Of one trace. A length that no sequence has has no groups, and a cache as large as all experts no rate."""

    groups: Mapping[int, SegmentGroups | None]
    segment_hits: Mapping[tuple[int, int], float]
    """By length and ratio."""
    hits: Mapping[tuple[str, int], float]
    """By rule and ratio."""
    skew: Sequence[Skew]


def locality_tables(found: Locality) -> str:
    rows = []
    for length, groups in found.groups.items():
        cells = [f"{length}", *((f"{groups.f1:.3f}", f"{groups.size:.2f}") if groups else ("-", "-"))]
        rows.append([*cells, *(_share(found.segment_hits.get((length, ratio))) for ratio in RATIOS)])
    header = ["segment (tokens)", "SRP", "group size", *(f"SCH, {ratio} x active" for ratio in RATIOS)]
    caches = [[rule, *(_share(found.hits.get((rule, ratio))) for ratio in RATIOS)] for rule in RULES]
    peaks, ginis = [s.peak for s in found.skew], [s.gini for s in found.skew]
    uneven = [
        ["most used / mean", f"{min(peaks):.2f}", f"{sum(peaks) / len(peaks):.2f}", f"{max(peaks):.2f}"],
        ["Gini", f"{min(ginis):.2f}", f"{sum(ginis) / len(ginis):.2f}", f"{max(ginis):.2f}"],
    ]
    return "\n\n".join(
        [
            table(header, rows),
            table(["hit rate of a cache", *(f"{ratio} x active" for ratio in RATIOS)], caches),
            table(["skew of the layers", "least", "mean", "most"], uneven),
        ]
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def speed_table(rows: Sequence[Speed], machine: Machine) -> str:
    header = ["resident", "experts", "missed/token", "LRU", "least", "reading", "computing", "tokens/s, at once"]
    lines = [
        [
            f"{100 * row.share:.4g} %",
            format_size(row.resident_bytes),
            f"{row.misses:.2f}",
            f"{row.lru:.2f}",
            f"{row.least:.2f}",
            f"{1000 * row.read_s:.3g} ms",
            f"{1000 * row.compute_s:.3g} ms",
            rate_text(row.overlapped),
            rate_text(row.serial),
        ]
        for row in rows
    ]
    title = (
        f"Expected speed of one request, by the model: missed experts come at {machine.bandwidth / 1e9:.3g} GB/s"
        f" ({machine.source}), memory is read at {machine.memory / 1e9:.3g} GB/s"
    )
    return f"{title}\n{table([*header, 'in turn'], lines)}"


def figures(found: Locality, rows: Sequence[Speed]) -> dict[str, float]:
    """`srp_16`, `sch_16_2` (length, ratio), `hit_rate_lru_2`, `peak`, `gini` (means of layers), and by percent
    resident `missed_25`, `tokens_per_s_25`.
    """
    made = {f"srp_{length}": groups.f1 for length, groups in found.groups.items() if groups}
    made |= {f"sch_{length}_{ratio}": rate for (length, ratio), rate in found.segment_hits.items()}
    made |= {f"hit_rate_{rule}_{ratio}": rate for (rule, ratio), rate in found.hits.items()}
    for name in ("peak", "gini"):
        made[name] = sum(getattr(s, name) for s in found.skew) / len(found.skew)
    for row in rows:
        made[f"missed_{100 * row.share:.4g}"] = row.misses
        made[f"tokens_per_s_{100 * row.share:.4g}"] = row.overlapped
    return made


def picture(name: str, found: Locality, rows: Sequence[Speed]) -> str:
    """A chart of each measure."""
    lengths = [f"{length}" for length in found.groups]
    ratios = [f"{ratio} x" for ratio in RATIOS]
    charts = [
        Chart(
            title="SRP",
            note="F1 of the best fixed groups, by tokens of a segment",
            columns=lengths,
            lines={"all layers": [groups.f1 if groups else None for groups in found.groups.values()]},
            top=1.0,
        ),
        Chart(
            title="SCH",
            note="hit rate knowing a segment, by its tokens",
            columns=lengths,
            lines={
                f"{ratio} x active": [found.segment_hits.get((length, ratio)) for length in found.groups]
                for ratio in RATIOS
            },
            top=1.0,
        ),
        Chart(
            title="Hit rates of caches",
            note="by slots, in experts that a token uses",
            columns=ratios,
            lines={rule: [found.hits.get((rule, ratio)) for ratio in RATIOS] for rule in RULES},
            top=1.0,
        ),
        Chart(
            title="Most used expert",
            note="its uses by the mean of its layer, by layer",
            columns=[f"{layer}" for layer in range(len(found.skew))],
            lines={"most used / mean": [s.peak for s in found.skew]},
        ),
        Chart(
            title="Gini",
            note="of the uses of a layer's experts, by layer",
            columns=[f"{layer}" for layer in range(len(found.skew))],
            lines={"Gini": [s.gini for s in found.skew]},
            top=1.0,
        ),
    ]
    if rows:
        charts.append(
            Chart(
                title="Tokens per second",
                note="by the model, one request, by share of resident experts",
                columns=[f"{100 * row.share:.4g} %" for row in rows],
                lines={
                    "at once": [row.overlapped for row in rows],
                    "in turn": [row.serial for row in rows],
                },
            )
        )
    return line_charts(f"Routing of {name}", charts)
