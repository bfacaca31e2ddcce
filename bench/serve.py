"""`moeyard bench serve`: a server under a stream of requests; without `--url`, one started here and stopped again."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import report
from .client import METRICS, complete, figures_of, result_block, send_all
from .traffic import Planned, arrivals, random_prompts, read_jsonl, read_trace

if TYPE_CHECKING:
    import httpx

STOP_TIMEOUT_S = 60.0
LOG_TAIL = 4000
RANDOM_REQUESTS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("server")
    where.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint for the server started here")
    where.add_argument("--url", help="a running server, such as http://127.0.0.1:8000 (default: start one)")
    where.add_argument("--serve-args", default="", metavar="TEXT", help='more options for it, such as "--threads 2"')
    where.add_argument("--start-timeout", type=float, default=1800.0, metavar="SECONDS", help="(default: 1800)")
    what = parser.add_argument_group("requests")
    what.add_argument("--dataset", default="random", choices=("random", "jsonl", "trace"), help="(default: random)")
    what.add_argument(
        "--dataset-path",
        metavar="FILE",
        help='jsonl: lines {"prompt": ..., "output_len": ...}; trace: .npz with arrival_s, input_len, output_len',
    )
    what.add_argument("--requests", type=int, help=f"how many (default: {RANDOM_REQUESTS}, or all in the file)")
    what.add_argument("--input-len", type=int, default=64, help="prompt tokens of random requests (default: 64)")
    what.add_argument("--output-len", type=int, default=128, help="tokens asked for (default: 128)")
    what.add_argument("--vocab-size", type=int, help="ids of random prompts are below this (default: the model's)")
    what.add_argument("--request-rate", type=float, help="requests per second (default: all at once)")
    what.add_argument("--burstiness", type=float, help="shape of the gaps: 1 is Poisson, less burstier (default: 1)")
    what.add_argument("--max-concurrency", type=int, help="most requests at once (default: no limit)")
    what.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="of one request (default: 900)")
    what.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests within ttft, tpot, itl or e2el limits",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report there, with the raw samples")


def check(args: argparse.Namespace) -> dict[str, float]:
    """The limits of `--goodput`. Raises ValueError naming an option that cannot be honoured."""
    for name in ("requests", "input_len", "output_len", "vocab_size", "max_concurrency", "timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if args.url and (args.model or args.serve_args):
        raise ValueError("--url names a running server; leave out MODEL and --serve-args, or --url")
    if (args.dataset == "random") == (args.dataset_path is not None):
        raise ValueError("--dataset-path goes with --dataset jsonl or trace, and they need it")
    if args.dataset == "trace" and args.request_rate is not None:
        raise ValueError("--request-rate: a trace has its own arrival times; leave it out")
    if args.burstiness is not None and args.request_rate is None:
        raise ValueError("--burstiness shapes the gaps of --request-rate; give that too")
    limits = {}
    for text in args.goodput:
        name, _, value = text.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            name = ""
        if name not in METRICS:
            raise ValueError(f"--goodput {text!r}: write NAME:MILLISECONDS with one of {', '.join(METRICS)}")
    return limits


def plan_of(args: argparse.Namespace, vocab: int | None) -> list[Planned]:
    """The requests to send. `vocab` is the model's, if known; raises ValueError when it is needed and is not."""
    if args.dataset == "jsonl":
        planned = read_jsonl(args.dataset_path, args.output_len)[: args.requests]
    else:
        vocab = args.vocab_size or vocab
        if vocab is None:
            raise ValueError("--vocab-size: the server's model has no config.json here; say how many token ids it has")
        if args.dataset == "trace":
            return read_trace(args.dataset_path, vocab, args.seed, args.requests)
        prompts = random_prompts([args.input_len] * (args.requests or RANDOM_REQUESTS), vocab, args.seed)
        planned = [Planned(prompt=prompt, output_len=args.output_len) for prompt in prompts]
    rate = math.inf if args.request_rate is None else args.request_rate
    times = arrivals(len(planned), rate, 1.0 if args.burstiness is None else args.burstiness, args.seed)
    return [replace(request, arrival_s=time) for request, time in zip(planned, times, strict=True)]


@contextlib.contextmanager
def own_server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server in its own process, once it is ready; stopped with SIGTERM at the end.

    Raises RuntimeError when it does not start, after showing the end of its log.
    """
    package = __package__.rpartition(".")[0]
    command = [sys.executable, "-P", "-m", package, "serve", *([args.model] if args.model else []), "--port", "0"]
    lines: queue.Queue[str] = queue.Queue()
    with tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [*command, *shlex.split(args.serve_args)], stdout=subprocess.PIPE, stderr=log, text=True
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, name="output of the server", daemon=True).start()
        try:
            yield _await_url(process, lines, log, args.start_timeout)
        finally:
            process.terminate()
            try:
                process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                print(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s; killing it", file=sys.stderr)
                process.kill()
                process.wait(timeout=STOP_TIMEOUT_S)


def _await_url(process: subprocess.Popen[str], lines: queue.Queue[str], log: Any, timeout: float) -> str:
    """The address that the server prints when it is ready."""
    try:
        while line := lines.get(timeout=timeout):
            if found := re.search(r"https?://\S+", line):
                return found.group()
        problem = f"ended with code {process.wait(timeout=STOP_TIMEOUT_S)}"
    except queue.Empty:
        problem = f"was not ready after {timeout:.0f} s"
    log.seek(0)
    print(log.read()[-LOG_TAIL:], file=sys.stderr)
    raise RuntimeError(f"the server {problem}")


async def _model_of(client: httpx.AsyncClient) -> tuple[str, int | None]:
    """The served model's name, and its vocabulary where `root` is a directory on this machine."""
    response = await client.get("/v1/models")
    response.raise_for_status()
    entry = response.json()["data"][0]
    config = Path(entry.get("root") or "") / "config.json"
    if not entry.get("root") or not config.is_file():
        return entry["id"], None
    values = json.loads(config.read_text(encoding="utf-8"))
    return entry["id"], values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")


async def _drive(args: argparse.Namespace, url: str, goodput: dict[str, float]) -> tuple[dict[str, float], Any]:
    import httpx
    from tqdm import tqdm

    key = os.environ.get("OPENAI_API_KEY" if args.url else "MOEYARD_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=args.timeout) as client:
        try:
            model, vocab = await _model_of(client)
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
            raise RuntimeError(f"{url}/v1/models does not answer as expected: {error}") from error
        plan = plan_of(args, vocab)
        # One that is not counted warms up; backwards, so that the prefix cache does not know a counted one.
        reverse = replace(plan[0], prompt=plan[0].prompt[::-1])
        first = await complete(client, model, reverse, "bench-first", args.timeout)
        if first.error:
            raise RuntimeError(f"a first request to {url} failed: {first.error}")
        with tqdm(total=len(plan), unit="request", disable=None) as bar:
            outcomes, duration = await send_all(
                client,
                model,
                plan,
                max_concurrency=args.max_concurrency,
                timeout=args.timeout,
                on_done=bar.update,
            )
    for reason, count in Counter(o.error for o in outcomes if o.error).most_common(5):
        print(f"{count} requests failed: {reason}", file=sys.stderr)
    if all(o.error for o in outcomes):
        raise RuntimeError(f"none of {len(outcomes)} requests succeeded; the first error: {outcomes[0].error}")
    samples = [vars(outcome) | {"arrival_s": p.arrival_s} for outcome, p in zip(outcomes, plan, strict=True)]
    return figures_of(outcomes, duration, goodput), samples


def run(args: argparse.Namespace) -> int:
    goodput = check(args)
    with contextlib.ExitStack() as stack:
        url = args.url.rstrip("/") if args.url else stack.enter_context(own_server(args))
        figures, samples = asyncio.run(_drive(args, url, goodput))
    print(result_block(figures))
    report.emit("serve", figures, {"requests": samples, "url": url}, args.json)
    return 0
