"""Sets the measured engines up: one checkpoint, one set of options, a process for each, and the machine's own rates."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import roofline, shapes
from .sides import Workload
from .turns import LOG_TAIL, Side, child_environment

LOAD_TIMEOUT_S = 1800.0
MEASURE_TIMEOUT_S = 600.0


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of every bench that loads the engine itself."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint directory or Hub id (default: made here)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads of each engine (default: the cores there are)")
    parser.add_argument("--kv-memory", metavar="SIZE", help="our KV cache (default: what the workloads need)")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each engine (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    parser.add_argument("--turn-timeout", type=float, default=900.0, metavar="SECONDS", help="(default: 900)")
    parser.add_argument("--json", metavar="FILE", help="also write the report there, with the raw samples")
    shapes.add_shape_options(parser)


@dataclass(kw_only=True)
class Setup:
    """What the engines of one run share."""

    model: str
    device: str
    threads: int
    config: dict[str, Any]
    cost: roofline.ModelCost
    vocab: int
    kv_bytes: int
    overlay: dict[str, str]


def prepare(args: argparse.Namespace, workloads: list[Workload]) -> Setup:
    """Finds or makes the checkpoint, and the engine options that its size and the workloads ask for."""
    import torch
    from transformers import AutoConfig

    from ..engine.config import parse_size
    from ..kernels.environment import ENVIRONMENT, usable_cores

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda and torch finds no GPU; leave it out or choose cpu")
    threads = args.threads or usable_cores()
    model = shapes.resolve_model(args)
    config = AutoConfig.from_pretrained(model)
    cost = roofline.model_cost(config, args.dtype)
    block = 16  # room for a started block per request
    tokens = max(w.requests * (w.input_len + w.output_len + 2 * block) for w in workloads)
    kv_bytes = parse_size(args.kv_memory, "--kv-memory") if args.kv_memory else tokens * cost.kv_bytes_per_token
    most = max(w.requests for w in workloads)
    return Setup(
        model=model,
        device=device,
        threads=threads,
        config={
            "model": model,
            "dtype": args.dtype,
            "device": device,
            "threads": threads,
            "kv_memory": str(kv_bytes),
            "max_model_len": max(w.input_len + w.output_len for w in workloads),
            "max_num_seqs": most,
            "max_batched_tokens": max(2048, most),
            "block_size": block,
            "prefix_cache": False,
            "progress": False,
        },
        cost=cost,
        vocab=config.get_text_config().vocab_size,
        kv_bytes=kv_bytes,
        overlay=dict(ENVIRONMENT),
    )


def start_moeyard(stack: ExitStack, setup: Setup) -> Side:
    """Our engine, loaded."""
    side = stack.enter_context(Side("moeyard", child_environment(setup.threads, setup.overlay)))
    side.call("load", what="loading", timeout=LOAD_TIMEOUT_S, config=setup.config)
    return side


@dataclass(kw_only=True)
class Opponent:
    """Another engine, loaded; of transformers the experts implementations that were tried for each workload."""

    side: Side
    environment: str
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def implementation(self, workload: Workload) -> str:
        """The fastest one for the workload; "" where there is no choice."""
        if not self.probes:
            return ""
        seconds = self.probes[workload.name]["seconds"]
        return min(seconds, key=seconds.__getitem__)


def start_transformers(stack: ExitStack, setup: Setup, args: argparse.Namespace, workloads: list[Workload]) -> Opponent:
    """transformers with the variables asked for, after a short run of each experts implementation per workload."""
    environments = ("same", "plain") if args.transformers_environment == "better" else (args.transformers_environment,)
    started = []
    for environment in environments:
        overlay = setup.overlay if environment == "same" else {}
        side = stack.enter_context(Side("transformers", child_environment(setup.threads, overlay)))
        started.append(Opponent(side=side, environment=environment, probes=_probe(side, setup, args, workloads)))
    best = min(started, key=lambda o: sum(min(probe["seconds"].values()) for probe in o.probes.values()))
    for opponent in started:
        if opponent is not best:
            opponent.side.close()
    return best


def start_llama(stack: ExitStack, setup: Setup, workloads: list[Workload]) -> Opponent:
    """llama.cpp with the same weights, from a GGUF file that is kept beside the bench checkpoints.

    Raises ValueError for another device, type or architecture.
    """
    from .gguf_file import gguf_of

    if setup.device != "cpu" or setup.config["dtype"] != "bfloat16":
        raise ValueError("--against llama.cpp compares on CPUs and in bfloat16; leave out --device and --dtype")
    path = gguf_of(Path(setup.model), shapes.user_cache())
    side = stack.enter_context(Side("llama.cpp", child_environment(setup.threads, setup.overlay), module="llama_side"))
    side.call(
        "load",
        what="loading",
        timeout=LOAD_TIMEOUT_S,
        path=str(path),
        threads=setup.threads,
        tokens=-(-max(w.input_len + w.output_len for w in workloads) // 256) * 256,
        requests=max(w.requests for w in workloads),
        batch=setup.config["max_batched_tokens"],
    )
    return Opponent(side=side, environment="same")


def _probe(side: Side, setup: Setup, args: argparse.Namespace, workloads: list[Workload]) -> dict[str, dict[str, Any]]:
    """Loads transformers and tries its experts implementations at each workload."""
    import psutil

    side.call(
        "load",
        what="loading",
        timeout=LOAD_TIMEOUT_S,
        config=setup.config,
        cache_tokens=max(w.requests * (w.input_len + w.output_len) for w in workloads),
        requests=max(w.requests for w in workloads),
    )
    return {
        w.name: side.call(
            "probe",
            what=f"trying experts implementations for {w.name}",
            timeout=args.turn_timeout,
            workload=asdict(w),
            gather_limit=psutil.virtual_memory().available // 4,
            expert_bytes=setup.cost.top_k * setup.cost.expert_params * setup.cost.itemsize,
        )
        for w in workloads
    }


def measure_peaks(setup: Setup, args: argparse.Namespace) -> dict[str, float]:
    """The machine's rates, in a process with the engines' threads and variables."""
    command = [sys.executable, "-P", "-m", f"{__package__}.roofline", "--device", setup.device]
    command += ["--threads", str(setup.threads), "--matrix", str(args.matrix), "--repeats", str(args.repeats)]
    command += ["--read-bytes", str(args.read_mib * 2**20)]
    done = subprocess.run(
        command,
        env=child_environment(setup.threads, setup.overlay),
        capture_output=True,
        text=True,
        timeout=MEASURE_TIMEOUT_S,
    )
    if done.returncode:
        print(done.stderr[-LOG_TAIL:], file=sys.stderr)
        raise RuntimeError(f"measuring the machine's rates failed with code {done.returncode}")
    return json.loads(done.stdout)
