"""Peak memory while loading, read from the operating system in a process of its own."""

import json
import subprocess
import sys

import pytest
import tiny

SCRIPT = """
import json, sys
from pathlib import Path
from moeyard.engine import engine  # with all that it imports, compiled kernels included
from moeyard.engine.config import EngineConfig
from moeyard.engine.loader import draw, load
from moeyard.kernels.warm_up import warm_up

warm_up()

def peak():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024

def resident():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmRSS:") + 1]) * 1024

path = Path(sys.argv[1])
blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
before = resident()
experts = load(blueprint, progress=False)
mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
print(json.dumps({"weights": blueprint.footprint.weights, "before": before, "peak": peak(), "mapped": mapped}))
"""

SHARD = 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_peak_is_at_most_the_weights_plus_one_shard(architecture, tmp_path):
    path = tiny.save(
        architecture,
        tmp_path / "model",
        max_shard_size="16MB",
        hidden_size=512,
        moe_intermediate_size=512,
        intermediate_size=512,
        vocab_size=2000,
        num_hidden_layers=4,
    )
    assert len(list(path.glob("*.safetensors"))) >= 5
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True, timeout=200
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    # The interpreter and PyTorch allocate a little of their own meanwhile.
    slack = 12 * 2**20
    assert seen["peak"] - seen["before"] <= seen["weights"] + SHARD + slack, seen
    assert not seen["mapped"], "a file stays mapped after loading"
