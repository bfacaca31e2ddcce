"""Which tiles the grouped GEMMs use: from a file that was tuned for the device and the experts, else by rule.

Nothing is tuned while serving. A file in `configs/` is named by `file_name` and holds

    {"triton": "3.7.1", "tiles": [{"rows_per_expert": 8, "up": {"rows": 16, ...}, "down": {...}}, ...]}

with the fields of `TileShape`; the entry whose rows per expert are nearest (by ratio; of two the smaller) is taken.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
SHARED_BYTES = 232_448
"""Shared memory that one program may have on compute capability 9.0 and 10.0; 166,912 on 8.0."""


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """rows x columns of a result (columns: rows of the weight, gates and ups both), `depth` of the sum at a time.

    `group` tiles of rows go over a block of columns together; `warps` and `stages` are Triton's.
    """

    rows: int
    columns: int
    depth: int
    group: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (("rows", 16), ("columns", 16), ("depth", 16), ("warps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise ValueError(f"{name}: {value!r} is not a power of two of at least {least}")
        for name in ("group", "stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the stages of both operands; what the compiled kernel says is close to it."""
        return self.stages * (self.rows + self.columns) * self.depth * itemsize

    def within(self, shared_bytes: int, itemsize: int) -> TileShape:
        """With as many stages as that much shared memory has room for, or with less depth."""
        shape = self
        while shape.shared_bytes(itemsize) > shared_bytes and shape.stages > 2:
            shape = replace(shape, stages=shape.stages - 1)
        while shape.shared_bytes(itemsize) > shared_bytes and shape.depth > 16:
            shape = replace(shape, depth=shape.depth // 2)
        return shape


@dataclass(frozen=True, kw_only=True)
class ExpertTiles:
    """Tiles of the up and of the down projection. They share the list of tiles, so they have the same rows."""

    up: TileShape
    down: TileShape

    def __post_init__(self) -> None:
        if self.up.rows != self.down.rows:
            raise ValueError(f"down.rows: {self.down.rows} are not the {self.up.rows} of up; they share one list")

    @property
    def rows(self) -> int:
        return self.up.rows

    def within(self, shared_bytes: int, itemsize: int) -> ExpertTiles:
        """Both as `TileShape.within`."""
        return ExpertTiles(up=self.up.within(shared_bytes, itemsize), down=self.down.within(shared_bytes, itemsize))


def _tiles(rows: int, up: tuple[int, ...], down: tuple[int, ...]) -> ExpertTiles:
    """From (columns, depth, group, warps, stages) of both."""

    def shape(columns: int, depth: int, group: int, warps: int, stages: int) -> TileShape:
        return TileShape(rows=rows, columns=columns, depth=depth, group=group, warps=warps, stages=stages)

    return ExpertTiles(up=shape(*up), down=shape(*down))


RULE_16_BIT: tuple[tuple[float, ExpertTiles], ...] = (
    (8, _tiles(16, (128, 128, 1, 4, 3), (64, 128, 1, 4, 4))),
    (16, _tiles(32, (128, 128, 1, 4, 3), (128, 128, 1, 4, 3))),
    (32, _tiles(64, (128, 64, 1, 4, 4), (128, 64, 1, 4, 4))),
    (96, _tiles(128, (128, 64, 8, 8, 4), (128, 64, 8, 8, 4))),
    (math.inf, _tiles(128, (256, 64, 8, 8, 3), (256, 64, 8, 8, 3))),
)
"""(mean rows of an expert up to which, tiles) for bfloat16 and float16. Tiles have twice the mean's rows where that
many cost no more than the weights: they are read once then, by experts with more than the mean as well. From what
tuned tables of vLLM and Triton's own matmul have in common; not measured here.
"""
RULE_FLOAT32: tuple[tuple[float, ExpertTiles], ...] = (
    (8, _tiles(16, (64, 32, 1, 4, 3), (64, 32, 1, 4, 3))),
    (math.inf, _tiles(64, (64, 32, 8, 4, 3), (64, 32, 8, 4, 3))),
)
"""float32 has no tensor cores without losing digits."""
FIXED_16_BIT, FIXED_FLOAT32 = RULE_16_BIT[2][1], RULE_FLOAT32[1][1]
"""For every number of rows, where a row's result must not depend on how many there are."""


_NARROW = 128
"""Columns where wider tiles lack registers: on GPUs whose tensor cores take their operands from registers (all but
compute capability 9.0 and 10.0), and in an up projection without a gate, which activates a whole tile at once.
"""


def expected_rows(tokens: int, top_k: int, experts: int) -> float:
    """Mean rows of an expert that has any, for even routing: what is known without asking the device."""
    chosen = 1.0 - (1.0 - min(top_k, experts) / experts) ** tokens
    return tokens * top_k / max(1.0, experts * chosen)


def choose_tiles(
    rows_per_expert: float,
    itemsize: int,
    *,
    gated: bool = True,
    wide: bool = True,
    tuned: dict[int, ExpertTiles] | None = None,
    deterministic: bool = False,
    shared_bytes: int = SHARED_BYTES,
) -> ExpertTiles:
    """The tiles for experts of so many rows: the nearest of `tuned`, else by rule. `wide`: the GPU's tensor cores take
    operands from shared memory, as those of compute capability 9.0 and 10.0 do.

    `deterministic`: the same for any number, so that no row's result depends on it.
    """
    narrow = itemsize == 2
    if deterministic:
        chosen = FIXED_16_BIT if narrow else FIXED_FLOAT32
    elif tuned:
        # log1p: 0 rows are a number like others.
        chosen = tuned[min(tuned, key=lambda rows: (abs(math.log1p(rows) - math.log1p(rows_per_expert)), rows))]
    else:
        rule = RULE_16_BIT if narrow else RULE_FLOAT32
        chosen = _narrowed(next(tiles for most, tiles in rule if rows_per_expert <= most), gated, wide)
    return chosen.within(shared_bytes, itemsize)


def _narrowed(tiles: ExpertTiles, gated: bool, wide: bool) -> ExpertTiles:
    def narrow(shape: TileShape) -> TileShape:
        return replace(shape, columns=min(shape.columns, _NARROW))

    return ExpertTiles(
        up=tiles.up if gated and wide else narrow(tiles.up), down=tiles.down if wide else narrow(tiles.down)
    )


def file_name(device: str, dtype: str, experts: int, hidden: int, width: int, gated: bool) -> str:
    """The name of a tuned file: device as CUDA names it, dtype as torch does, E, D and I of the experts."""
    gate = "gated" if gated else "plain"
    return f"{device.replace(' ', '_').replace('/', '_')},{dtype},E{experts},D{hidden},I{width},{gate}.json"


@functools.cache
def load_tuned(name: str, folder: Path = CONFIGS) -> dict[int, ExpertTiles] | None:
    """Tiles by rows per expert of a tuned file; None where there is none. ValueError for one that says nothing."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        return read_tuned(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path.name}: not a file of tuned tiles: {error}; remove it, or tune again") from error


def read_tuned(found: Any) -> dict[int, ExpertTiles]:
    """What `as_json` wrote."""
    if not isinstance(found, dict) or not isinstance(found.get("tiles"), list) or not found["tiles"]:
        raise ValueError("tiles: a list with entries is needed")
    known = {field.name for field in fields(TileShape)}
    tuned: dict[int, ExpertTiles] = {}
    for entry in found["tiles"]:
        rows = entry["rows_per_expert"]
        if not isinstance(rows, int) or rows < 0 or rows in tuned:
            raise ValueError(f"rows_per_expert: {rows!r} is not a whole number of its own")
        for part in ("up", "down"):
            if unknown := set(entry[part]) - known:
                raise ValueError(f"{part}: unknown {', '.join(sorted(unknown))}")
        tuned[rows] = ExpertTiles(up=TileShape(**entry["up"]), down=TileShape(**entry["down"]))
    return tuned


def as_json(tuned: dict[int, ExpertTiles], triton: str) -> dict[str, Any]:
    """What a tuned file holds."""
    return {
        "triton": triton,
        "tiles": [{"rows_per_expert": rows, **asdict(tiles)} for rows, tiles in sorted(tuned.items())],
    }


def all_tiles(itemsize: int, gated: bool = True, wide: bool = True, folder: Path = CONFIGS) -> list[ExpertTiles]:
    """Every choice that `choose_tiles` can make for this size of element: the rule, and all tuned files."""
    rule, fixed = (RULE_16_BIT, FIXED_16_BIT) if itemsize == 2 else (RULE_FLOAT32, FIXED_FLOAT32)
    found = [_narrowed(tiles, gated, wide) for _, tiles in rule] + [fixed]
    for path in sorted(folder.glob("*.json")):
        if ("float32" in path.name.split(",")) == (itemsize == 4) and path.name.endswith(",gated.json") == gated:
            found += (load_tuned(path.name, folder) or {}).values()
    return list(dict.fromkeys(found))
