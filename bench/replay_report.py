"""What `moeyard bench replay` makes of its replays: table, figures and picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.config import format_size
from ..scheduler.residency.replay import Tally, excess_closed
from .heat_map import Line, Panel, Section, heat_map
from .report import table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy with one share of the experts resident, beside LRU and Belady's rule with bypass."""

    policy: str
    resident: float
    hit_rate: float
    read_per_token: float
    """Experts that were missed: read once each, to be run where they are or to be copied."""
    copied_per_token: float
    excess_closed: float
    """Share of LRU's misses over the least possible ones that this policy avoids."""
    misses_vs_lru: float
    copies_vs_lru: float
    copies_used: float
    """Share of the copies that were hit before they were evicted."""

    @classmethod
    def of(cls, policy: str, resident: float, tally: Tally, lru: Tally, least: Tally) -> Row:
        return cls(
            policy=policy,
            resident=resident,
            hit_rate=tally.hit_rate,
            read_per_token=tally.misses / tally.steps,
            copied_per_token=tally.copies / tally.steps,
            excess_closed=excess_closed(tally.misses, lru.misses, least.misses),
            misses_vs_lru=_ratio(tally.misses, lru.misses),
            copies_vs_lru=_ratio(tally.copies, lru.copies),
            copies_used=tally.used / tally.copies if tally.copies else 1.0,
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float(part > 0)


def result_table(rows: Sequence[Row], expert_bytes: int | None) -> str:
    """A line for each share and policy."""
    header = ["resident  policy", "hits", "read/token", "copied/token"]
    if expert_bytes is not None:
        header += ["bytes read/token", "copied"]
    header += ["copies of LRU's", "of them used", "excess closed"]
    lines = []
    for row in rows:
        cells = [f"{100 * row.resident:5.3g} %   {row.policy}", f"{row.hit_rate:.1%}"]
        cells += [f"{row.read_per_token:.2f}", f"{row.copied_per_token:.2f}"]
        if expert_bytes is not None:
            cells += [format_size(n * expert_bytes) for n in (row.read_per_token, row.copied_per_token)]
        lines.append([*cells, f"{row.copies_vs_lru:.2f}", f"{row.copies_used:.0%}", f"{row.excess_closed:.2f}"])
    return table(header, lines)


def figures(rows: Sequence[Row], expert_bytes: int | None) -> dict[str, float]:
    """`hit_rate_`, `excess_closed_`, `copies_` (of LRU's) and `copies_used_` (share) of each policy, of the first share
    without a suffix, of others with their percent; with the expert's bytes `read_bytes_`, `copied_bytes_` per token.
    """
    found: dict[str, float] = {}
    for row in rows:
        name = row.policy.replace("-", "_")
        if row.resident != rows[0].resident:
            name += f"_{100 * row.resident:.4g}"
        found[f"hit_rate_{name}"] = row.hit_rate
        found[f"excess_closed_{name}"] = row.excess_closed
        found[f"copies_{name}"] = row.copies_vs_lru
        found[f"copies_used_{name}"] = row.copies_used
        if expert_bytes is not None:
            found[f"read_bytes_{name}"] = row.read_per_token * expert_bytes
            found[f"copied_bytes_{name}"] = row.copied_per_token * expert_bytes
    return found


def picture(rows: Sequence[Row]) -> str:
    """A panel each for misses and copies: how many times fewer than LRU's. A policy without any has no cell."""
    names = list(dict.fromkeys(row.policy for row in rows))
    columns = list(dict.fromkeys(f"{100 * row.resident:.4g} %" for row in rows))

    def panel(title: str, of: str) -> Panel:
        values = {
            (row.policy, f"{100 * row.resident:.4g} %"): 1 / getattr(row, of) for row in rows if getattr(row, of) > 0
        }
        return Panel(title, values)

    line = Line("", [panel("misses", "misses_vs_lru"), panel("copies", "copies_vs_lru")])
    note = "LRU's number by the policy's: above 1 (blue) are fewer than LRU has, below 1 (red) more"
    return heat_map("Residency policies against LRU", [Section("Policies against LRU", note, names, columns, [line])])
