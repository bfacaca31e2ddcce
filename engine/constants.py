"""The file of measured constants: one for each kind of machine, type and shape of experts, and number of ranks or disk.

JSON under `$XDG_CACHE_HOME/moeyard/constants`. What is older than `MAX_AGE`, of another build or unreadable is measured
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import __version__
from ..scheduler.cost import Constants, RankConstants
from ..scheduler.misses import MissCosts
from ..scheduler.offload_cost import DiskCost, RoutingSummary

if TYPE_CHECKING:
    import torch

    from .expert_reader import ExpertReader

MAX_AGE = timedelta(days=30)

KINDS: dict[str, type[RankConstants] | type[Constants] | type[DiskCost] | type[MissCosts] | type[RoutingSummary]] = {
    "rank": RankConstants,
    "group": Constants,
    "disk": DiskCost,
    "misses": MissCosts,
    "routing": RoutingSummary,
}
"""What a rank measures by itself, what ranks measure together, what reading experts from a disk takes, what experts
that are missing on a device with a host tier take, and what a model's routing made of budgets when it was last
recorded."""

log = logging.getLogger("moeyard.constants")

Values = TypeVar("Values", RankConstants, Constants, DiskCost, MissCosts, RoutingSummary)


class Unusable(ValueError):
    """A file of constants that does not count; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Record(Generic[Values]):
    """What one file holds. `samples` are the timings that the values were fitted to, by name, as lists of integers."""

    key: Mapping[str, Any]
    build: Mapping[str, str]
    date: datetime
    values: Values
    samples: Mapping[str, Sequence[Sequence[int]]]
    path: Path

    @property
    def stale(self) -> str:
        """Why it is to be measured again; "" when it is not."""
        age = _now() - self.date
        if age > MAX_AGE:
            return f"{age.days} days old"
        if age < -timedelta(days=1):
            return f"of {self.date:%Y-%m-%d}, which is not yet"
        mine = build()
        return next((f"of {name} {self.build.get(name)}" for name in mine if mine[name] != self.build.get(name)), "")


# What they are of


def key_of(reader: ExpertReader, device: torch.device, threads: int) -> dict[str, Any]:
    """The machine, with the threads that compute, and the experts of a layer."""
    import torch

    from ..kernels.environment import usable_cores

    spec = reader.spec
    hidden, width = reader.matrix("down_proj")
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(reader.activation_dtype).removeprefix("torch."),
        "hidden": hidden,
        "width": width,
        "experts": spec.num_experts,
        "top_k": spec.top_k,
        "gate": spec.has_gate,
        "bias": spec.has_bias,
    } | ({"format": reader.format.name} if reader.format else {})


@functools.cache
def build() -> dict[str, str]:
    """The code whose times were taken."""
    return {"moeyard": __version__, "torch": importlib.metadata.version("torch")}


@functools.cache
def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Files


def directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "moeyard" / "constants"


def path_of(kind: str, key: Mapping[str, Any]) -> Path:
    text = json.dumps([kind, key], sort_keys=True)
    return directory() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def load(kind: str, key: Mapping[str, Any]) -> Record[Any] | None:
    """What was measured for this key and counts still; None, and why in the log, when it is to be measured."""
    path = path_of(kind, key)
    try:
        return _usable(path, key)
    except FileNotFoundError:
        return None
    except Unusable as error:
        log.info("the measured constants in %s are %s: measuring again", path, error)
        return None


def _usable(path: Path, key: Mapping[str, Any]) -> Record[Any]:
    record = read(path)
    if dict(record.key) != dict(key):
        raise Unusable("of another machine or model")
    if record.stale:
        raise Unusable(record.stale)
    return record


def read(path: Path) -> Record[Any]:
    """One file, stale or not. Raises FileNotFoundError without one, Unusable for one that is none of ours."""
    try:
        stored = json.loads(path.read_text())
        values = KINDS[path.name.partition("-")[0]].from_dict(stored["values"])
        date = datetime.fromisoformat(stored["date"])
        if date.tzinfo is None or not isinstance(stored["key"], dict) or not isinstance(stored["build"], dict):
            raise ValueError("date, key or build")
        samples = {str(name): [list(map(int, row)) for row in rows] for name, rows in stored["samples"].items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unusable(f"unreadable ({type(error).__name__})") from error
    return Record(key=stored["key"], build=stored["build"], date=date, values=values, samples=samples, path=path)


def save(
    kind: str, key: Mapping[str, Any], values: Values, samples: Mapping[str, Sequence[Sequence[int]]]
) -> Record[Values]:
    """Keeps what was measured, and returns what counts from now on: that of another process if it was first.

    Ranks of one machine measure the same at the same time; they go by one file, so that they take the same ways at
    every start. Where nothing can be written that is said once, and each start measures.
    """
    path = path_of(kind, key)
    record = Record(key=key, build=build(), date=_now(), values=values, samples=samples, path=path)
    text = json.dumps(
        {
            "date": record.date.isoformat(timespec="seconds"),
            "build": record.build,
            "key": key,
            "values": dataclasses.asdict(values),
            "samples": {name: [list(row) for row in rows] for name, rows in samples.items()},
        }
    )
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
        with contextlib.suppress(OSError):  # of several at once one succeeds; some file systems have no links
            os.link(temporary, path)
        with contextlib.suppress(FileNotFoundError, Unusable):
            return _usable(path, key)
        os.replace(temporary, path)
    except OSError as error:
        _warn_once(f"the measured constants cannot be kept, so that each start measures anew: {error}")
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return record


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def find(kind: str, **wanted: Any) -> list[Record[Any]]:
    """The files whose keys have all of these, stale ones too, the newest first."""
    records = []
    for path in sorted(directory().glob(f"{kind}-*.json")):
        with contextlib.suppress(Unusable, FileNotFoundError):
            record = read(path)
            if wanted.items() <= record.key.items():
                records.append(record)
    return sorted(records, key=lambda record: record.date, reverse=True)


def forget(kind: str, **wanted: Any) -> int:
    """Removes the files that `find` finds, and returns how many. Raises OSError where that is not allowed."""
    records = find(kind, **wanted)
    for record in records:
        record.path.unlink(missing_ok=True)
    return len(records)


def _now() -> datetime:
    return datetime.now(UTC)
