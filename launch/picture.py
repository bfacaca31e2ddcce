"""Pictures made of text: how evenly the experts of each layer are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN = " .:-=+*#@"


def can_draw_blocks(stream: TextIO) -> bool:
    """Whether `stream` can carry the block characters."""
    try:
        BLOCKS.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def bar_row(counts: Sequence[int], *, width: int = 64, blocks: bool = True) -> str:
    """One character per expert, as high as its share of the busiest expert; only an idle expert is blank.

    More experts than `width` are drawn in groups of equal size (the last may be smaller), each as its busiest
    member.
    """
    levels = BLOCKS if blocks else PLAIN
    group = max(1, -(-len(counts) // width))
    peaks = [max(counts[i : i + group]) for i in range(0, len(counts), group)]
    top = max(peaks, default=0)
    # Rounding up keeps an expert with a single token visible.
    return "".join(levels[-(-peak * (len(levels) - 1) // top)] if top else levels[0] for peak in peaks)


def expert_load(layers: Sequence[dict[str, Any]], *, width: int = 64, blocks: bool = True) -> str:
    """The picture of `GET /moe/experts`: a row per layer with its experts' loads and its balancedness.

    `layers` has dicts with `layer`, `counts` (tokens per expert), `balancedness` (mean load over largest) and
    `top_share` (share of the busiest expert).
    """
    if not layers:
        return "no expert has been used yet"
    title = "tokens per expert"
    # No wider than the experts need, no narrower than the title.
    width = max(len(title), min(width, max(len(layer["counts"]) for layer in layers)))
    rows = [f"{'layer':>5}  {title:<{width}}  balance  busiest"]
    for layer in layers:
        bars = bar_row(layer["counts"], width=width, blocks=blocks)
        rows.append(f"{layer['layer']:>5}  {bars:<{width}}  {layer['balancedness']:>7.2f}  {layer['top_share']:>6.1%}")
    return "\n".join(rows)
