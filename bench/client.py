"""A streaming client for `/v1/completions` that stamps what it sees, and the numbers made from the stamps.

The definitions are those of `vllm bench serve`: the first token is the first chunk whose `choices` is not empty,
whatever its text; time per output token is `(end to end - first token) / (output tokens - 1)`; inter-token latencies
are the gaps between such chunks; token counts are the server's `usage`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .report import percentile
from .traffic import Planned

if TYPE_CHECKING:
    import httpx

METRICS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(kw_only=True)
class Outcome:
    """One request as the client saw it.

    `stamps`: seconds from sending to each chunk with a choice. `error` is "" when it ended well.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    stamps: list[float] = field(default_factory=list)
    error: str = ""

    def milliseconds(self, metric: str) -> list[float]:
        """The request's samples of one of `METRICS`."""
        first, last = self.stamps[0], self.stamps[-1]
        if metric == "ttft":
            return [1e3 * first]
        if metric == "tpot":
            return [1e3 * (last - first) / (self.output_tokens - 1)] if self.output_tokens > 1 else []
        if metric == "itl":
            return [1e3 * (b - a) for a, b in itertools.pairwise(self.stamps)]
        return [1e3 * last]


async def complete(client: httpx.AsyncClient, model: str, planned: Planned, request_id: str, timeout: float) -> Outcome:
    """Sends one request and reads its stream; every failure is told in `Outcome.error`."""
    import httpx

    body = {
        "model": model,
        "prompt": planned.prompt,
        "max_tokens": planned.output_len,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    outcome = Outcome()
    start = time.perf_counter()
    try:
        async with (
            asyncio.timeout(timeout),
            client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": request_id}) as response,
        ):
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"HTTP {response.status_code} {response.reason_phrase}: {text[:300]}"
                return outcome
            outcome.error = "the stream ended without [DONE]"
            async for line in response.aiter_lines():
                if _take(line, outcome, time.perf_counter() - start):
                    break
    except TimeoutError:
        outcome.error = f"not finished after {timeout:g} s"
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if not outcome.error and not outcome.stamps:
        outcome.error = "the stream had no token"
    return outcome


def _take(line: str, outcome: Outcome, now: float) -> bool:
    """Reads one line of the stream; True at its end. Comments, blank lines and other fields are passed over."""
    if not line.startswith("data:"):
        return False
    data = line[5:].strip()
    if data == "[DONE]":
        outcome.error = ""
        outcome.output_tokens = outcome.output_tokens or len(outcome.stamps)
        return True
    event = json.loads(data)
    if "error" in event:
        outcome.error = f"error event: {json.dumps(event['error'])[:300]}"
        return True
    if event.get("choices"):
        outcome.stamps.append(now)
    if usage := event.get("usage"):
        outcome.prompt_tokens, outcome.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return False


async def send_all(
    client: httpx.AsyncClient,
    model: str,
    plan: list[Planned],
    *,
    max_concurrency: int | None,
    timeout: float,
    on_done: Callable[[], Any],
) -> tuple[list[Outcome], float]:
    """Sends each request at its time, at most `max_concurrency` at once.

    Gives the outcomes in the plan's order, and the seconds from the first send to the last answer. A request's clock
    starts when it is sent, not when it waits here for its turn.
    """
    gate = asyncio.Semaphore(max_concurrency or len(plan))
    start = time.perf_counter()

    async def one(number: int, planned: Planned) -> Outcome:
        await asyncio.sleep(max(0.0, planned.arrival_s - (time.perf_counter() - start)))
        async with gate:
            outcome = await complete(client, model, planned, f"bench-{number}", timeout)
        on_done()
        return outcome

    outcomes = await asyncio.gather(*(one(number, planned) for number, planned in enumerate(plan)))
    return outcomes, time.perf_counter() - start


def figures_of(outcomes: list[Outcome], duration: float, goodput: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a run, under the names of vLLM's result file. `goodput`: highest milliseconds per metric."""
    good = [outcome for outcome in outcomes if not outcome.error]
    inputs, outputs = sum(o.prompt_tokens for o in good), sum(o.output_tokens for o in good)
    figures: dict[str, float] = {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    if goodput:
        met = [o for o in good if all(max(o.milliseconds(m), default=0.0) <= most for m, most in goodput.items())]
        figures["request_goodput"] = len(met) / duration
    for metric in METRICS:
        values = [value for outcome in good for value in outcome.milliseconds(metric)]
        figures[f"mean_{metric}_ms"] = sum(values) / len(values) if values else 0.0
        figures[f"median_{metric}_ms"] = percentile(values, 50)
        figures[f"p99_{metric}_ms"] = percentile(values, 99)
    return figures


def result_block(figures: Mapping[str, float]) -> str:
    """The figures as text, with the names that vLLM's users know."""
    rows = [
        ("Successful requests:", f"{figures['completed']}"),
        ("Failed requests:", f"{figures['failed']}"),
        ("Benchmark duration (s):", f"{figures['duration']:.2f}"),
        ("Total input tokens:", f"{figures['total_input_tokens']}"),
        ("Total generated tokens:", f"{figures['total_output_tokens']}"),
        ("Request throughput (req/s):", f"{figures['request_throughput']:.2f}"),
        ("Output token throughput (tok/s):", f"{figures['output_throughput']:.2f}"),
        ("Total token throughput (tok/s):", f"{figures['total_token_throughput']:.2f}"),
    ]
    if "request_goodput" in figures:
        rows.append(("Request goodput (req/s):", f"{figures['request_goodput']:.2f}"))
    lines = [f"{label:<40}{value:>12}" for label, value in rows]
    for metric, (title, short) in METRICS.items():
        lines.append(f" {title} ".center(52, "-"))
        for statistic, label in (("mean", "Mean"), ("median", "Median"), ("p99", "P99")):
            lines.append(f"{f'{label} {short} (ms):':<40}{figures[f'{statistic}_{metric}_ms']:>12.2f}")
    return "\n".join([" Serving Benchmark Result ".center(52, "="), *lines, "=" * 52])
