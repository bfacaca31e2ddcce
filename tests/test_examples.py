"""The examples and the demo, run as users run them; those that need a server get a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeyard.launch.demo import KEY, running_server

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 200


@pytest.fixture(scope="module")
def url():
    with running_server() as url:
        yield url


def run(*command: object) -> str:
    """Its standard output; fails with its standard error."""
    environment = os.environ | {"MOEYARD_API_KEY": KEY, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-P", *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"offline.py", "stream_chat.py", "structured.py"}


def test_offline():
    out = run(EXAMPLES / "offline.py")
    texts = out.split("--- ")[1:]
    assert [text.splitlines()[0] for text in texts] == [
        "'def main('",
        "'class Queue:'",
        "'import os\\n\\ndef walk(path):'",
    ]
    assert all(len(text.strip().splitlines()) > 1 for text in texts)


def test_stream_chat(url):
    lines = run(EXAMPLES / "stream_chat.py", url).splitlines()
    assert len(lines) > 1 and lines[-1].endswith(" output tokens]")


def test_structured(url):
    answer = json.loads(run(EXAMPLES / "structured.py", url))
    assert set(answer) == {"language", "typed", "year"}
    assert answer["language"] in ("python", "c", "rust") and 1970 <= answer["year"] <= 2030


def test_generate():
    assert run("-m", "moeyard", "generate", "def main(", "--max-tokens", 8, "--temperature", 0).strip()


def test_the_demo():
    out = run("-m", "moeyard.launch.demo")
    assert "request  prompt tokens  output tokens  first token  tokens/s" in out
    assert "layer  tokens per expert" in out and "█" in out
    assert out.endswith("the server stopped cleanly\n")
