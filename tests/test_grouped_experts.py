"""The Triton kernels: their results, in a process of its own that interprets them, and how they are refused here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeyard.kernels.triton_version import why_no_triton

needs_triton = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton() or "triton is there")


@needs_triton
@pytest.mark.timeout(300)
def test_in_the_interpreter():
    """What `interpreted_experts` says: one process for all, which its start and Triton's cost only once."""
    file = Path(__file__).with_name("interpreted_experts.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", file],
        cwd=file.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    shown = f"{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    assert run.returncode == 0, shown
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 40 and "skipped" not in run.stdout, shown


@needs_triton
def test_compiled_kernels_refuse_the_cpu():
    from moeyard.kernels.activation import Activation
    from moeyard.kernels.grouped_experts import grouped_experts

    x, ids = torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="x_TD: Triton runs on CUDA devices, not on cpu"):
        grouped_experts(x, ids, ids.float(), torch.zeros(1, 8, 4), torch.zeros(1, 4, 4), Activation())
