"""A trace of all ranks on one clock, for Perfetto and chrome://tracing."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

log = logging.getLogger("moeyard.trace")


class TraceWriter:
    """Writes Chrome's trace events to `path`, in the array form: one process per rank, times in microseconds since
    this object was made.

    The form needs no closing bracket, and every `add` reaches the file at once, so what a crash leaves opens as well.
    When the file cannot be written any more (a full disk) one line is logged and tracing stops; nothing else does.
    Raises ValueError when the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._start_ns = time.monotonic_ns()
        self._ranks: set[int] = set()
        self._names: dict[Any, str] = {}
        self._separator = "["
        self._file: TextIO | None
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise ValueError(f"trace: cannot write {path}: {error.strerror or error}") from error

    @property
    def stopped(self) -> bool:
        return self._file is None

    def add(self, rank: int, spans: Iterable[Sequence[Any]], offset_ns: int) -> None:
        """Spans `[name, step, layer, start, length]` of a rank, in nanoseconds of its monotonic clock. `offset_ns` is
        what its clock must be given to read like this process's `time.monotonic_ns`."""
        if self._file is None:
            return
        events = []
        if rank not in self._ranks:
            self._ranks.add(rank)
            name = {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
            events.append(json.dumps(name))
        shift = offset_ns - self._start_ns
        for name, step, layer, start, length in spans:
            text = self._names.get(name) or self._names.setdefault(name, json.dumps(str(name)))
            events.append(
                f'{{"ph":"X","name":{text},"pid":{rank},"tid":0,"ts":{(start + shift) / 1000:.3f},'
                f'"dur":{length / 1000:.3f},"args":{{"step":{step:d},"layer":{layer:d}}}}}'
            )
        if events:
            self._write(self._separator + "\n" + ",\n".join(events))
            self._separator = ","

    def close(self) -> None:
        """Completes the file. Again is nothing."""
        if self._file is not None:
            self._write(("[" if self._separator == "[" else "") + "\n]\n")
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, text: str) -> None:
        assert self._file is not None
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            log.error("trace: cannot write %s: %s; tracing stops", self.path, error.strerror or error)
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()  # tries to write the rest again
