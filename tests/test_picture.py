"""Text pictures of expert load."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.launch.picture import BLOCKS, PLAIN, bar_row, can_draw_blocks, expert_load


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300), st.integers(1, 80), st.booleans())
def test_a_row_has_a_character_per_group_and_only_idle_ones_are_blank(counts, width, blocks):
    levels = BLOCKS if blocks else PLAIN
    row = bar_row(counts, width=width, blocks=blocks)
    group = next(g for g in range(1, 301) if g * width >= len(counts))
    groups = [counts[i : i + group] for i in range(0, len(counts), group)]
    assert len(row) == len(groups) <= width
    for character, members in zip(row, groups, strict=True):
        assert (character == " ") == (max(members) == 0)
        assert (character == levels[-1]) >= (max(members) == max(counts) > 0)
    heights = [(max(members), levels.index(character)) for character, members in zip(row, groups, strict=True)]
    assert all(a <= b for (_, a), (_, b) in zip(sorted(heights), sorted(heights)[1:], strict=False))


def test_a_row():
    assert bar_row([0, 1, 4, 8]) == " ▁▄█"
    assert bar_row([0, 1, 4, 8], blocks=False) == " .=@"
    assert bar_row([0, 0]) == "  "
    assert bar_row([1, 2, 3, 4, 5], width=2) == "▅█"


def test_expert_load():
    layers = [
        {"layer": 0, "counts": [2, 2, 2, 2], "balancedness": 1.0, "top_share": 0.25},
        {"layer": 3, "counts": [8, 0, 0, 0], "balancedness": 0.25, "top_share": 1.0},
    ]
    assert expert_load(layers).splitlines() == [
        "layer  tokens per expert  balance  busiest",
        "    0  ████                  1.00   25.0%",
        "    3  █                     0.25  100.0%",
    ]
    assert expert_load([]) == "no expert has been used yet"


@pytest.mark.parametrize(("encoding", "able"), [("utf-8", True), ("ascii", False), ("latin-1", False)])
def test_blocks_only_where_the_stream_carries_them(encoding, able):
    assert can_draw_blocks(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) is able
    assert can_draw_blocks(io.StringIO()) is False  # no encoding to ask
