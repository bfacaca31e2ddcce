"""The Triton kernels without a GPU: interpreted, and compiled for each kind of GPU. Each in a process of its own.

`make setup` installs Triton into a folder of its own: PyTorch imports it wherever it finds it, which no other process
here has a use for.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "triton"
APART = (FOLDER / "triton").is_dir()

pytestmark = [
    pytest.mark.skipif(
        not APART and importlib.util.find_spec("triton") is None, reason="triton is not installed; run make setup"
    ),
    pytest.mark.timeout(300),
]


def passed(file, least, **environment):
    """Runs the tests of a file, of which none may be skipped."""
    path = Path(__file__).with_name(file)
    paths = [*([str(FOLDER)] if APART else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-o", "addopts=--import-mode=importlib"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, path],
        cwd=path.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    shown = f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    assert run.returncode == 0, shown
    found = re.search(r"(\d+) passed", run.stdout)
    assert found and int(found[1]) >= least and "skipped" not in run.stdout, shown


def test_in_the_interpreter():
    """What `interpreted_experts` says: one process for all, which its start and Triton's cost only once."""
    passed("interpreted_experts.py", 40, TRITON_INTERPRET="1")


def test_compiled():
    passed("compiled_kernels.py", 13)
