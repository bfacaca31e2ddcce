"""Measured turns: the processes of the two sides, and the loop in which they alternate while the other one waits."""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .sides import Workload

LOG_TAIL = 4000
"""Characters of a failed process's log that are shown."""


class Side:
    """One engine in its own process, started once. Use as a context manager; `call` is bounded."""

    def __init__(self, name: str, environment: Mapping[str, str], module: str = "sides") -> None:
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.{module}", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            text=True,
            encoding="utf-8",
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, name=f"answers of {name}", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")  # the process has ended

    def call(self, op: str, *, what: str, timeout: float, **values: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises RuntimeError naming the side and `what` it was doing when the process fails, ends, or has not answered
        after `timeout` seconds; the end of its log goes to stderr.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **values}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            raise self._failure(what, f"no answer after {timeout:.0f} s") from None
        if not line:
            raise self._failure(what, f"the process ended with code {self._process.wait(timeout=30)}")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(what, answer["error"])
        return answer

    def _failure(self, what: str, problem: str) -> RuntimeError:
        self._log.seek(0)
        print(self._log.read()[-LOG_TAIL:], file=sys.stderr)
        return RuntimeError(f"{self.name}: {what}: {problem}")

    def close(self) -> None:
        """Ends the process; may be called again."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(timeout=30)
        self._log.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def child_environment(threads: int, overlay: Mapping[str, str]) -> dict[str, str]:
    """This process's variables, the same number of threads for every library, and `overlay`."""
    count = str(threads)
    fixed = {name: count for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false", **overlay}


def make_prompts(workload: Workload, vocab: int, seed: int, turn: int) -> list[list[int]]:
    """Random token ids, the same for both sides of a turn and different in every turn."""
    chance = random.Random(f"{seed}/{workload.name}/{turn}")
    return [[chance.randrange(vocab) for _ in range(workload.input_len)] for _ in range(workload.requests)]


def take_turn(
    side: Side, workload: Workload, prompts: list[list[int]], timeout: float, **options: Any
) -> dict[str, Any]:
    """One run of the workload. Raises RuntimeError unless every request got the number of tokens it asked for."""
    what = f"workload {workload.name}"
    answer = side.call("turn", what=what, timeout=timeout, workload=asdict(workload), prompts=prompts, **options)
    counts = [len(tokens) for tokens in answer["tokens"]]
    if counts != [workload.output_len] * workload.requests:
        raise RuntimeError(
            f"{side.name}: {what}: asked for {workload.requests} x {workload.output_len} tokens, got {counts}"
        )
    return answer


def equal_leading_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of output tokens before the first difference, over all requests."""
    total = equal = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(a)
        equal += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return equal / total
