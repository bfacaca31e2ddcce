"""Requests to send and when: made up, from a file of prompts, or from a recorded trace."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One request: text or token ids, the number of tokens to ask for, seconds after the start when it is sent."""

    prompt: str | list[int]
    output_len: int
    arrival_s: float = 0.0


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Times of `count` requests at `rate` per second, the first at 0.

    Gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less is burstier, more is more even. An
    infinite rate sends all at once. Raises ValueError for values that are not positive.
    """
    for name, value in (("request_rate", rate), ("burstiness", burstiness)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if math.isinf(rate):
        return [0.0] * count
    chance = random.Random(f"{seed}/arrivals")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += chance.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def random_prompts(lengths: list[int], vocab: int, seed: int) -> list[list[int]]:
    """Prompts of uniformly drawn token ids."""
    chance = random.Random(f"{seed}/prompts")
    return [[chance.randrange(vocab) for _ in range(length)] for length in lengths]


def read_jsonl(path: str, output_len: int) -> list[Planned]:
    """Lines `{"prompt": text or token ids, "output_len": optional}`. Raises ValueError naming the line."""
    planned = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, length = entry["prompt"], entry.get("output_len", output_len)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{path}, line {number}: not a JSON object with a "prompt"') from None
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not prompt or not (ids or isinstance(prompt, str)) or type(length) is not int or length < 1:
            raise ValueError(f"{path}, line {number}: prompt must be text or token ids, output_len a positive integer")
        planned.append(Planned(prompt=prompt, output_len=length))
    if not planned:
        raise ValueError(f"{path} has no prompts")
    return planned


def read_trace(path: str, vocab: int, seed: int, limit: int | None) -> list[Planned]:
    """The first `limit` requests of a recorded trace: an `.npz` with `arrival_s`, `input_len` and `output_len`, one
    entry per request. Prompts are random. Raises ValueError for another kind of file."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            columns = [file[name][:limit].tolist() for name in ("arrival_s", "input_len", "output_len")]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not an .npz with arrival_s, input_len and output_len ({error})") from None
    times, inputs, outputs = columns
    if not len(times) == len(inputs) == len(outputs) or not times:
        raise ValueError(f"{path}: arrival_s, input_len and output_len must have one entry per request")
    prompts = random_prompts([max(1, int(n)) for n in inputs], vocab, seed)
    first = min(times)
    rows = zip(prompts, outputs, times, strict=True)
    return [Planned(prompt=p, output_len=max(1, int(n)), arrival_s=float(t - first)) for p, n, t in rows]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--dataset-path {path}: {error.strerror}") from error
