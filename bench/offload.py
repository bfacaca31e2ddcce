"""`moeyard bench offload`: a model whose experts do not fit in memory, read from its checkpoint as they are needed.

Sides take turns, each in its own process: our engine with all experts in memory; with a share of them; the same without
predictions, and with least-recently-used residency and every miss admitted; and transformers with accelerate's offload
to disk. Routing can follow a recorded trace: random weights have no locality. With `--fit` a predictor of next use is
fitted first, on other domains of the trace than those that run.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from ..engine.config import EngineConfig, format_size
from ..scheduler.offload_cost import DiskCost
from .disk_rate import disk_cost
from .fitted import save_predictor
from .report import emit, spread, table
from .shapes import add_shape_options, resolve_model
from .sides import Workload
from .token_trace import TokenTrace, read_token_trace, split_domains, write_token_trace
from .turns import Side, child_environment, make_prompts, take_turn

TIMEOUT_S = 900.0
SHAPE = {"layers": 24, "experts": 32, "top_k": 4, "hidden": 1024, "expert_width": 512}
"""Of the checkpoint that is made when none is given: gpt-oss-20b's layers and experts, in small."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint directory (default: one made here)")
    parser.add_argument(
        "--routing", metavar="trace:FILE", help="experts by a recorded trace (default: the router's own)"
    )
    parser.add_argument(
        "--fit",
        metavar="DOMAINS",
        help="fit a predictor of next use on these domains of the trace (names or patterns, commas between), run the"
        " others",
    )
    parser.add_argument("--resident", default="25", metavar="PERCENT", help="experts in memory (default: 25)")
    parser.add_argument("--small", default="6.3", metavar="PERCENT", help="and a smaller share (default: 6.3)")
    parser.add_argument("--requests", type=int, default=1, metavar="N", help="at the same time (default: 1)")
    parser.add_argument("--input", type=int, default=32, metavar="N", help="prompt tokens (default: 32)")
    parser.add_argument("--output", type=int, default=65, metavar="N", help="new tokens (default: 65)")
    parser.add_argument(
        "--accelerate-output",
        type=int,
        default=5,
        metavar="N",
        help="new tokens of accelerate; 0: without it (default: 5)",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each side (default: 3)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and places in the trace (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write figures and raw samples here too")
    add_shape_options(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    for name in ("requests", "input", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    for name, least in (("output", 2), ("accelerate_output", 2)):
        if getattr(args, name) < least and not (name == "accelerate_output" and getattr(args, name) == 0):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
    if args.accelerate_output and importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "accelerate is not installed; pip install accelerate, or leave it out with --accelerate-output 0"
        )
    shares = [_share(args.resident, "resident"), _share(args.small, "small")]
    if shares[0] == shares[1]:
        raise ValueError(f"--small is {args.small}, the same as --resident; give another share")
    trace = _trace(args.routing)
    fitted, scored = None, trace
    if args.fit is not None:
        if trace is None:
            raise ValueError("--fit is of use with --routing trace:FILE; add it, or leave --fit out")
        names = split_domains(trace, args.fit, None)
        fitted, scored = (trace.of(chosen) for chosen in names)
    if not args.model:
        for name, value in SHAPE.items():
            if not hasattr(args, name):
                setattr(args, name, value)
    bench = Bench(args, resolve_model(args), scored, shares)
    with bench.sides:
        if fitted is not None:
            bench.fit(fitted)
        bench.run()
    return 0


def _share(text: str, name: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 100:
        raise ValueError(f"--{name} is {text}; give a percentage between 0 and 100")
    return share


def _trace(text: str | None) -> TokenTrace | None:
    if text is None:
        return None
    kind, _, path = text.partition(":")
    if kind != "trace" or not path:
        raise ValueError(f"--routing is {text!r}; it must be trace:FILE")
    return read_token_trace(path)


class Bench:
    """The sides, their turns and what they measured."""

    def __init__(self, args: argparse.Namespace, model: str, trace: TokenTrace | None, shares: Sequence[float]) -> None:
        from transformers import AutoConfig

        self.args = args
        self.model = model
        self.trace = trace
        self.shares = list(shares)
        self.sides = ExitStack()
        self.samples: dict[str, Any] = {}
        self.disks: list[DiskCost] = []
        """After each turn: a disk that others use, too, is not the same for long."""
        self.predictor: str | None = None
        self.routing: str | None = None
        if trace is not None:
            self.folder = self.sides.enter_context(tempfile.TemporaryDirectory(prefix="moeyard-offload-"))
            self.routing = f"{self.folder}/routing.npz"
            write_token_trace(self.routing, trace)
        config = AutoConfig.from_pretrained(model)
        self.vocab, self.layers, self.experts = config.vocab_size, config.num_hidden_layers, config.num_experts

    def fit(self, trace: TokenTrace) -> None:
        """A predictor of next use, from routing that does not run."""
        self.predictor = f"{self.folder}/next_use.npz"
        save_predictor(trace, self.model, max(trace.experts, self.experts), self.predictor)

    def run(self) -> None:
        args, big, small = self.args, *self.shares
        # Forced routing is known to the model's own routers, which `auto` would ask.
        predictor = self.predictor or ("auto" if self.trace is None else "none")
        ours = {
            "resident": {},
            "store, all resident": {"expert_memory": "100%"},
            f"{big:g} %": {"expert_memory": f"{big:g}%", "predictor": predictor},
            f"{big:g} %, unpredicted": {"expert_memory": f"{big:g}%", "predictor": "none"},
            f"{big:g} %, LRU": {"expert_memory": f"{big:g}%", "predictor": "none", "residency": "lru"},
            f"{small:g} %": {"expert_memory": f"{small:g}%", "predictor": predictor},
        }
        theirs = {f"accelerate, {share:g} %": share for share in self.shares} if args.accelerate_output else {}
        sides: dict[str, Side] = {}
        for name in tqdm([*ours, *theirs], desc="starting", unit="side"):
            sides[name] = self._start(name, ours.get(name), theirs.get(name))
        for repeat in tqdm(range(args.repeats + 1), desc="turns", unit="turn"):
            for name, side in sides.items():
                self._turn(name, side, repeat, name in theirs)
            if repeat:
                self.disks.append(disk_cost(EngineConfig(model=self.model, device="cpu"), now=True))
        self._report(list(ours), list(theirs))

    def _start(self, name: str, options: dict[str, str] | None, share: float | None) -> Side:
        args = self.args
        kind = "accelerate" if options is None else "ours"
        side = self.sides.enter_context(Side(kind, child_environment(args.threads, {}), "offload_sides"))
        config: dict[str, Any] = {"model": self.model, "threads": args.threads, "dtype": "bfloat16"}
        routing = self.routing
        if options is None:
            assert share is not None
            folder = self.sides.enter_context(tempfile.TemporaryDirectory(prefix="moeyard-accelerate-"))
            extra = {"resident_layers": int(self.layers * share / 100), "folder": folder}
            side.call("load", what="loading", timeout=TIMEOUT_S, config=config, routing=routing, **extra)
            return side
        length = args.input + args.output
        config |= {
            "device": "cpu",
            "progress": False,
            "prefix_cache": False,
            "max_model_len": length,
            "max_num_seqs": args.requests,
            "max_batched_tokens": max(args.requests * args.input, 128),
            "kv_memory": "256MiB",
            **options,
        }
        side.call("load", what=f"loading ({name})", timeout=TIMEOUT_S, config=config, routing=routing)
        return side

    def _turn(self, name: str, side: Side, repeat: int, theirs: bool) -> None:
        args = self.args
        output = args.accelerate_output if theirs else args.output
        workload = Workload(name="offload", requests=args.requests, input_len=args.input, output_len=output)
        prompts = make_prompts(workload, self.vocab, args.seed, repeat)
        options = {"starts": self._places(repeat)} if self.trace is not None else {}
        answer = take_turn(side, workload, prompts, TIMEOUT_S, **options)
        if repeat:  # the first turn warms up, and fills the slots
            per_token = answer["decode_s"] / (output - 1)
            self.samples.setdefault(name, []).append({"step_s": per_token, "counters": answer["counters"]})

    def _places(self, repeat: int) -> list[int]:
        """Where in the trace each request begins: sequences that are long enough, others in each turn."""
        assert self.trace is not None
        length = self.args.input + self.args.output
        whole = [int(a) for a, b in zip(self.trace.start_S, self.trace.end_S, strict=True) if b - a >= length]
        if len(whole) < self.args.requests:
            raise ValueError(f"routing: the trace has {len(whole)} sequences of {length} tokens or more")
        return random.Random(f"{self.args.seed}/{repeat}").sample(whole, self.args.requests)

    def _report(self, ours: list[str], theirs: list[str]) -> None:
        args = self.args
        big, small = (f"{share:g} %" for share in self.shares)
        step = {name: spread([s["step_s"] for s in self.samples[name]]).median for name in (*ours, *theirs)}
        rates, expert_bytes = [disk.bytes_per_s for disk in self.disks], self.disks[0].expert_bytes
        bound: dict[str, float] = {}
        rows = []
        for name in (*ours, *theirs):
            counted = [s["counters"] for s in self.samples[name]]
            steps = args.output - 1
            ahead = statistics.median([c.get("expert_ahead_ready", 0) / steps for c in counted])
            misses = statistics.median([c.get("expert_misses", 0) / steps for c in counted])
            read = statistics.median([c.get("expert_read_bytes", 0) / steps for c in counted])
            if name in ours[2:]:
                bound[name] = statistics.median(
                    max(c["expert_misses"] / steps * expert_bytes / rate, whole["step_s"]) / turn["step_s"]
                    for c, rate, whole, turn in zip(
                        counted, rates, self.samples["resident"], self.samples[name], strict=True
                    )
                )
            rows.append(
                [
                    name,
                    f"{args.requests / step[name]:.2f}",
                    f"{1e3 * step[name]:.0f}",
                    f"{misses:.1f}" if name in ours[1:] else "-",
                    f"{ahead:.1f}" if name in ours[1:] else "-",
                    format_size(int(read)) if name in ours[1:] else "-",
                    f"{bound[name]:.0%}" if name in bound else "-",
                ]
            )
        header = [
            "experts in memory",
            "tokens/s",
            "ms per step",
            "misses per step",
            "read ahead",
            "read per step",
            "of the bound",
        ]
        print(table(header, rows))
        given = " to ".join(dict.fromkeys(format_size(int(rate)) for rate in (min(rates), max(rates))))
        print(f"\none expert is {format_size(expert_bytes)}; the disk gave {given} per second with them\n")
        key_big, key_small = (f"{share:.0f}" for share in self.shares)
        figures = {
            f"vs_lru_{key_big}": self._ratio(f"{big}, LRU", big),
            f"unpredicted_vs_lru_{key_big}": self._ratio(f"{big}, LRU", f"{big}, unpredicted"),
            f"bound_share_{key_big}": bound[big],
            f"bound_share_{key_small}": bound[small],
            "resident_overhead": self._ratio("store, all resident", "resident") - 1,
            f"tokens_per_s_{key_small}": args.requests / step[small],
            "disk_bytes_per_s": statistics.median(rates),
        }
        if theirs:
            figures[f"vs_accelerate_{key_big}"] = self._ratio(theirs[0], big)
            figures[f"vs_accelerate_{key_small}"] = self._ratio(theirs[1], small)
        emit("offload", figures, self.samples, args.json)

    def _ratio(self, slow: str, fast: str) -> float:
        """Median over turns of one side's time per step by another's of the same turn."""
        pairs = zip(self.samples[slow], self.samples[fast], strict=True)
        return statistics.median([a["step_s"] / b["step_s"] for a, b in pairs])
