"""The file of recorded expert loads (`--placement FILE`): what earlier runs counted, for placing experts in the next.

JSON: `{"version": 1, "model": name, "tokens": n, "experts": [experts of each MoE layer], "loads": [[tokens of each
expert] of each layer]}`. Each run keeps half of what it finds and adds what it counts itself, so that old traffic
fades; a run that counts nothing leaves the file alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = 1
SAVE_S = 60.0
"""How often a run that serves writes the file, when something was counted since."""

log = logging.getLogger("moeyard.placement")

Loads = list[list[int]]


class RecordedLoads:
    """Reads `path` when it exists and keeps it up to date.

    `earlier` is what the file had at start, halved; None without a file. Raises ValueError naming the file, what is
    expected and what was found.
    """

    def __init__(self, path: str, model: str) -> None:
        self.path = Path(path)
        self.model = model
        self.earlier: Loads | None = None
        self._earlier_tokens = 0
        self._saved: Loads | None = None  # this run's counts when the file was last written
        self._failed = False
        self._lock = threading.Lock()
        if self.path.exists():
            self._read()
        elif not self.path.absolute().parent.is_dir():
            raise ValueError(f"placement: {self.path}: the directory does not exist; make it, or choose another file")

    def loads(self, counts: Loads | None) -> Loads | None:
        """Tokens of each [layer][expert]: earlier runs' share and this run's `counts`. None when there is neither."""
        if self.earlier is None or counts is None or not self._fits(counts):
            return self.earlier if counts is None else counts
        return [[old + new for old, new in zip(*rows, strict=True)] for rows in zip(self.earlier, counts, strict=True)]

    def _fits(self, counts: Loads) -> bool:
        return self.earlier is None or [len(row) for row in self.earlier] == [len(row) for row in counts]

    def check_shape(self, experts: Sequence[int]) -> None:
        """Raises ValueError when the file is not for a model with so many experts in each MoE layer."""
        if self.earlier is not None and [len(row) for row in self.earlier] != list(experts):
            found = [len(row) for row in self.earlier]
            raise self._error(f"loads of {_layers(experts)}, as the model has", f"{_layers(found)}")

    def save(self, counts: Loads | None, tokens: int) -> None:
        """Writes the file (a new one that takes its place), if `counts` changed since the last time. `tokens` is how
        many this run has computed. A failure is logged once and tried again at the next call. From any thread."""
        with self._lock:
            if counts is not None and counts != self._saved and any(map(any, counts)):
                self._save(counts, tokens)

    def _save(self, counts: Loads, tokens: int) -> None:
        if not self._fits(counts):
            if not self._failed:
                log.error("placement: %s is of a model of another shape, and is not written", self.path)
            self._failed = True
            return
        loads = self.loads(counts)
        assert loads is not None
        content = {
            "version": VERSION,
            "model": self.model,
            "tokens": self._earlier_tokens + tokens,
            "experts": [len(row) for row in loads],
            "loads": loads,
        }
        try:
            self._replace(json.dumps(content, separators=(",", ":")) + "\n")
        except OSError as error:
            if not self._failed:
                reason = error.strerror or error
                log.error("placement: cannot write %s: %s; serving goes on, and it is tried again", self.path, reason)
            self._failed = True
            return
        if self._failed:
            log.info("placement: %s is written again", self.path)
        self._failed = False
        self._saved = [list(row) for row in counts]

    def _replace(self, text: str) -> None:
        """At every moment the file is whole: the old one or the new one."""
        path = self.path.resolve()  # a link stays one
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise

    def _read(self) -> None:
        if not self.path.is_file():  # reading a device or a pipe may never end, and it must not be replaced
            raise self._error("a file", "something else (a directory, device or pipe)")
        try:
            content = json.loads(self.path.read_bytes())
        except OSError as error:
            raise ValueError(f"placement: cannot read {self.path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise self._error("JSON", f"something else ({error})") from error
        if not isinstance(content, dict):
            raise self._error("a JSON object", type(content).__name__)
        if content.get("version") != VERSION:
            raise self._error(f"version {VERSION}", f"version {content.get('version')!r}")
        loads: Any = content.get("loads")
        experts, tokens = content.get("experts"), content.get("tokens")
        if not _is_loads(loads):
            raise self._error('"loads" with a list of tokens per expert for each layer', _brief(loads))
        if experts != [len(row) for row in loads]:
            raise self._error(f'"experts" {_brief([len(row) for row in loads])}, as "loads" has', _brief(experts))
        if type(tokens) is not int or tokens < 0:
            raise self._error('"tokens" of 0 or more', _brief(tokens))
        if content.get("model") != self.model:
            log.warning("placement: %s was recorded with the model %r", self.path, content.get("model"))
        self.earlier = [[load // 2 for load in row] for row in loads]
        self._earlier_tokens = tokens // 2

    def _error(self, expected: str, found: str) -> ValueError:
        return ValueError(
            f"placement: {self.path}: expected {expected}, found {found}; remove the file or choose another"
        )


def _is_loads(loads: Any) -> bool:
    return (
        isinstance(loads, list)
        and bool(loads)
        and all(isinstance(row, list) and row for row in loads)
        and all(type(load) is int and 0 <= load < 2**62 for row in loads for load in row)
    )


def _layers(experts: Sequence[int]) -> str:
    kinds = sorted(set(experts))
    return f"{len(experts)} layers of {' or '.join(map(str, kinds))} experts"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
