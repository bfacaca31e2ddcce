"""What every `moeyard bench` command prints: a table for people, and as its last line one JSON object for programs."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of some samples, and their range."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("no samples to summarise")
    return Spread(median=statistics.median(samples), low=min(samples), high=max(samples))


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` % of the samples lie, interpolated linearly; 0.0 for no samples."""
    if not samples:
        return 0.0
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def machine_facts() -> dict[str, Any]:
    """The processor, memory, GPU and library versions that a figure depends on."""
    import psutil
    import torch

    from ..kernels.environment import usable_cores

    gpu = ""
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "moeyard")},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command_line() -> str:
    """The command that runs now, as it can be typed again."""
    return shlex.join(["moeyard", *sys.argv[1:]])


def emit(bench: str, figures: Mapping[str, float], samples: Mapping[str, Any], json_path: str | None) -> None:
    """Prints the JSON line; with `json_path` writes it there too, with the raw `samples`.

    Raises ValueError for a figure that is not a finite number, or a path that cannot be written.
    """
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"figure {name} is {value!r}; a figure is a finite number")
    report = {
        "bench": bench,
        "figures": {name: _short(value) for name, value in figures.items()},
        "machine": machine_facts(),
        "command": command_line(),
    }
    if json_path is not None:
        text = json.dumps({**report, "samples": samples}, indent=1, allow_nan=False)
        try:
            Path(json_path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--json {json_path}: {error.strerror}; give a file that can be written") from error
    print(json.dumps(report, allow_nan=False), flush=True)


def _short(value: float) -> float:
    """Five significant digits: more would claim a precision that no clock has."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
