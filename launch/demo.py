"""`make demo`: a real server, two chat completions streamed through the `openai` client, and their cost."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .picture import can_draw_blocks, expert_load

PROMPTS = ("def read_lines(path):", "class Stack:\n    def push(self, item):")
MAX_TOKENS = 96
START_SECONDS = 300.0  # the first start also compiles kernels
REQUEST_SECONDS = 120.0
STOP_SECONDS = 60.0
KEY = "demo"
# -P: the current directory must not hide installed packages.
SERVE = (sys.executable, "-P", "-m", "moeyard", "serve", "--port", "0")


class DemoError(RuntimeError):
    """A step of the demo did not happen in its time."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One streamed completion. Times in seconds since the request was sent."""

    prompt: str
    text: str
    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second after the first."""
        return (self.output_tokens - 1) / max(self.total_s - self.first_token_s, 1e-9)


class Server:
    """A `moeyard serve` process on a free port. Its output is read all along, so it never blocks on it."""

    def __init__(self, *, command: Sequence[str] = SERVE) -> None:
        self.process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONUNBUFFERED": "1", "MOEYARD_API_KEY": KEY},
        )
        self._urls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._tail: deque[str] = deque(maxlen=30)
        self._reader = threading.Thread(target=self._read, name="server output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._tail.append(line)
            if found := re.search(r"https?://[\w.\-\[\]:]+:\d+", line):
                self._urls.put(found.group())

    def url(self, seconds: float = START_SECONDS) -> str:
        """The address that the server printed. Raises DemoError when it ends or `seconds` pass before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                return self._urls.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is not None:
                    self._reader.join(timeout=1)
                    raise DemoError(self._ended()) from None
        raise DemoError(f"the server printed no address in {seconds:.0f} s:\n{self.output()}")

    def _ended(self) -> str:
        return f"the server ended with code {self.process.returncode}:\n{self.output()}"

    def output(self) -> str:
        """The last lines it wrote."""
        return "".join(self._tail).rstrip()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """SIGTERM, and a wait for a clean end. Raises DemoError when there is none."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DemoError(f"the server did not stop in {seconds:.0f} s:\n{self.output()}") from None
        self._reader.join(timeout=5)
        if code != 0:
            raise DemoError(self._ended())

    def kill(self) -> None:
        """Ends it at once, for the paths on which something already went wrong."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=10)


@contextmanager
def running_server() -> Iterator[str]:
    """The URL of a ready server; stops it cleanly afterwards. Raises DemoError for a wait that ran out."""
    server = Server()
    try:
        url = server.url()
        _until_ready(url)
        yield url
        server.stop()
    finally:
        server.kill()


def _until_ready(url: str, seconds: float = START_SECONDS) -> None:
    import httpx

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise DemoError(f"{url}/ready did not answer 200 in {seconds:.0f} s")


def ask(client: Any, model: str, prompt: str) -> Answer:
    """Streams one chat completion."""
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=MAX_TOKENS,
        temperature=0.7,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    first = usage = None
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            pieces.append(chunk.choices[0].delta.content)
        usage = chunk.usage or usage
    total = time.perf_counter() - start
    if usage is None or first is None:
        raise DemoError("a stream ended without text or usage")
    return Answer(
        prompt=prompt,
        text="".join(pieces),
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        first_token_s=first,
        total_s=total,
    )


def table(answers: list[Answer]) -> str:
    """The costs of each answer, a row each."""
    rows = ["request  prompt tokens  output tokens  first token  tokens/s"]
    for i, a in enumerate(answers, 1):
        tokens = f"{a.prompt_tokens:>13}  {a.output_tokens:>13}"
        rows.append(f"{i:>7}  {tokens}  {a.first_token_s * 1e3:>8.0f} ms  {a.tokens_per_s:>8.1f}")
    return "\n".join(rows)


def main(out: Callable[[str], None] = print) -> int:
    """Runs the demo; 0 when every step worked."""
    import httpx
    from openai import OpenAI, OpenAIError

    out("starting the server on the embedded checkpoint ...")
    try:
        with running_server() as url:
            out(f"ready at {url}\n")
            client = OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=REQUEST_SECONDS, max_retries=0)
            model = client.models.list().data[0].id
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                answers = list(pool.map(lambda prompt: ask(client, model, prompt), PROMPTS))
            headers = {"Authorization": f"Bearer {KEY}"}
            reply = httpx.get(f"{url}/moe/experts", headers=headers, timeout=REQUEST_SECONDS)
            layers = reply.raise_for_status().json()["layers"]
            for i, answer in enumerate(answers, 1):
                out(f"--- request {i}: {answer.prompt!r}\n{answer.text}\n")
            out(table(answers) + "\n")
            out(expert_load(layers, blocks=can_draw_blocks(sys.stdout)))
    except (DemoError, OpenAIError, httpx.HTTPError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    out("\nthe server stopped cleanly")
    return 0


if __name__ == "__main__":
    sys.exit(main())
