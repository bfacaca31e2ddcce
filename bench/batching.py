"""`moeyard bench batching`: the live engine with and without expert-aware batching, in turns.

N requests of mixed domains decode in steps with room for half of them, as a recorded trace routes, with a share of the
experts in memory: in order, and those together that share missing experts. Both sides serve the same tokens. `together`
is the first side with room for all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm

from .affinity import numbers
from .affinity_steps import mixed_sequences, synthetic
from .fitted import save_predictor
from .report import emit, table
from .shapes import add_shape_options, resolve_model
from .sides import Workload
from .token_trace import TokenTrace, read_token_trace, split_domains, write_token_trace
from .turns import Side, child_environment, make_prompts, take_turn

TIMEOUT_S = 900.0
SHAPE = {"layers": 24, "experts": 32, "top_k": 4, "hidden": 512, "expert_width": 256}
"""Of the checkpoint that is made when none is given: gpt-oss-20b's layers and experts, in small."""
SIDES = {"order": {"batching": "order"}, "affinity": {"batching": "affinity"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="checkpoint directory (default: one made here)")
    add("--trace", metavar="FILE", help="routing token by token, .npz with topk [T, L, K] and seq_start")
    add(
        "--fit",
        metavar="DOMAINS",
        help="fit a predictor of next use on these domains of the trace (names or patterns, commas between), run the"
        " others (default: counts, which need no training)",
    )
    add("--requests", default="4,8,16,32", metavar="N,N", help="that decode at once (default: 4,8,16,32)")
    add("--room", type=int, metavar="N", help="requests of a step (default: half of them)")
    add("--input", type=int, default=16, metavar="N", help="prompt tokens (default: 16)")
    add("--output", type=int, default=17, metavar="N", help="new tokens of each request (default: 17)")
    add("--resident", type=float, default=25, metavar="PERCENT", help="experts in memory (default: 25)")
    add("--rounds", type=int, default=2, metavar="N", help="with other requests each time (default: 2)")
    add("--threads", type=int, default=2, metavar="N", help="CPU threads (default: 2)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and of the choice of requests (default: 0)")
    add("--json", metavar="FILE", help="write figures and raw samples here too")
    add_shape_options(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    requests = numbers(args.requests)
    for name, least in (("room", 1), ("input", 1), ("output", 2), ("rounds", 1), ("threads", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if not 0 < args.resident < 100:
        raise ValueError(f"--resident is {args.resident}; give a percentage between 0 and 100")
    trace = read_token_trace(args.trace) if args.trace is not None else None
    fitted = None
    if args.fit is not None:
        if trace is None:
            raise ValueError("--fit is of use with --trace FILE; add it, or leave --fit out")
        fitted, trace = (trace.of(chosen) for chosen in split_domains(trace, args.fit, None))
    if not args.model:
        for name, value in SHAPE.items():
            if not hasattr(args, name):
                setattr(args, name, value)
    Bench(args, resolve_model(args), trace, requests).run(fitted)
    return 0


class Bench:
    """The sides, their turns and what they measured."""

    def __init__(self, args: argparse.Namespace, model: str, trace: TokenTrace | None, requests: list[int]) -> None:
        from transformers import AutoConfig

        self.args = args
        self.model = model
        self.requests = requests
        config = AutoConfig.from_pretrained(model)
        self.vocab, self.experts = config.vocab_size, config.num_experts
        if trace is None:
            shape = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
            trace = synthetic(*shape, sequences=2 * max(requests), tokens=args.input + args.output, seed=args.seed)
        self.trace = trace
        self.samples: dict[int, dict[str, list[dict[str, Any]]]] = {}

    def run(self, fitted: TokenTrace | None) -> None:
        args = self.args
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moeyard-batching-"))
            routing, predictor = f"{folder}/routing.npz", "auto"
            write_token_trace(routing, self.trace)
            if fitted is not None:
                predictor = f"{folder}/next_use.npz"
                save_predictor(fitted, self.model, max(fitted.experts, self.experts), predictor)
            environment = child_environment(args.threads, {})
            sides = {name: stack.enter_context(Side(name, environment, "batching_sides")) for name in SIDES}
            for name, side in tqdm(sides.items(), desc="starting", unit="side"):
                config = self._config() | {"predictor": predictor} | SIDES[name]
                side.call("load", what=f"loading ({name})", timeout=TIMEOUT_S, config=config, routing=routing)
            for turn in tqdm(range(args.rounds + 1), desc="rounds", unit="round"):
                # The first one warms up, and fills the slots.
                for number in self.requests if turn else self.requests[:1]:
                    self._turns(sides, number, turn)
        self._report()

    def _config(self) -> dict[str, Any]:
        args, most = self.args, max(self.requests)
        return {
            "model": self.model,
            "threads": args.threads,
            "dtype": "bfloat16",
            "device": "cpu",
            "progress": False,
            "prefix_cache": False,
            "max_model_len": args.input + args.output,
            "max_num_seqs": most + 1,
            "max_decode_seqs": most,
            "max_batched_tokens": max(most * args.input, 128),
            "kv_memory": "256MiB",
            "expert_memory": f"{args.resident:g}%",
        }

    def _turns(self, sides: dict[str, Side], number: int, turn: int) -> None:
        """Both sides with the same requests, each the first every other time."""
        args = self.args
        length = args.input + args.output
        chosen = mixed_sequences(self.trace, number, length, np.random.default_rng((args.seed, turn)))
        workload = Workload(name="batching", requests=number, input_len=args.input, output_len=args.output)
        prompts = make_prompts(workload, self.vocab, args.seed, turn)
        room = args.room or max(1, number // 2)
        turns = [("order", "order", room), ("affinity", "affinity", room), ("together", "order", number)]
        for name, side, limit in turns if turn % 2 else reversed(turns):
            places = {"starts": [int(self.trace.start_S[s]) for s in chosen], "room": limit}
            answer = take_turn(sides[side], workload, prompts, TIMEOUT_S, **places)
            if turn:
                sample = {"decode_s": answer["decode_s"], **answer["counts"]}
                self.samples.setdefault(number, {}).setdefault(name, []).append(sample)

    def _report(self) -> None:
        args = self.args
        figures: dict[str, float] = {}
        rows = []
        for number, sides in self.samples.items():
            for name, taken in sides.items():
                total = {key: sum(sample[key] for sample in taken) for key in taken[0]}
                steps, tokens = total["steps"], total["tokens"]
                rows.append(
                    [
                        f"{number} {name}",
                        f"{tokens / steps:.1f}",
                        f"{total['touched'] / steps:.1f}",
                        f"{total['touched'] / tokens:.2f}",
                        f"{total['missed'] / tokens:.2f}",
                        f"{statistics.median([s['tokens'] / s['decode_s'] for s in taken]):.2f}",
                        f"{total['regrouped'] / steps:.0%}",
                        f"{max(sample['longest_wait'] for sample in taken)}",
                    ]
                )
            for name, suffix in (("affinity", ""), ("together", "_together")):
                pairs = list(zip(sides[name], sides["order"], strict=True))
                for figure, key in (("distinct_experts", "touched"), ("missing_experts", "missed")):
                    ratios = [one[key] / max(1, other[key]) for one, other in pairs]
                    figures[f"{figure}_ratio_{number}{suffix}"] = statistics.median(ratios)
                rates = [other["decode_s"] / one["decode_s"] for one, other in pairs]
                figures[f"tokens_ratio_{number}{suffix}"] = statistics.median(rates)
            figures[f"longest_wait_{number}"] = max(sample["longest_wait"] for sample in sides["affinity"])
        header = ["requests", "tokens/step", "experts/step", "experts/token", "missing/token", "tokens/s"]
        print(
            f"{args.trace or 'synthetic'}: {self.trace.layers} layers of {self.experts} experts, {args.resident:g} % in"
            f" memory; {args.rounds} x {args.output - 1} decoded tokens of each request"
        )
        print(table([*header, "regrouped", "longest wait"], rows))
        emit("batching", figures, {str(number): sides for number, sides in self.samples.items()}, args.json)
