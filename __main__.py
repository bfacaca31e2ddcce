"""The command line. A command imports what it runs only when it runs, so that `moeyard --help` stays fast."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from functools import partial
from importlib import import_module

from . import __version__
from .engine.config import EngineConfig, ServeConfig
from .launch.cli import Parser, add_options, config_from, one_model

BENCHES = {
    "throughput": "output tokens per second, against other engines",
    "kernels": "one layer's experts on the shapes of known models, against other implementations",
    "latency": "time of one batch, prefill and decode apart",
    "serve": "a running server under a stream of requests",
    "ep": "ranks against one rank: rates, memory, bytes sent, where the time goes",
    "router": "policies that choose a rank for a request, simulated",
    "balance": "planners that balance experts by the step, simulated",
    "plan": "microseconds that the priced planner takes for a layer",
    "replay": "policies that keep experts on the device, on recorded routing",
    "disk": "how fast single experts are read from a checkpoint's files",
    "offload": "experts that do not fit in memory, against other ways to run such a model",
    "affinity": "which requests to run together so that they share experts, simulated",
    "batching": "the same with the engine: requests in order, and those together that share missing experts",
}


def _serve(args: argparse.Namespace) -> int:
    from .launch.server import run

    return run(config_from(args, ServeConfig))


def _plan(args: argparse.Namespace) -> int:
    from .launch.plan import run

    config = config_from(args, EngineConfig)
    return run(dataclasses.replace(config, ep=config.ep or 1), args)


def _profile(args: argparse.Namespace) -> int:
    from .launch.profile import run

    config = config_from(args, EngineConfig)
    return run(dataclasses.replace(config, ep=config.ep or 1), args)


def _generate(args: argparse.Namespace) -> int:
    from .launch.generate import run

    return run(config_from(args, EngineConfig), args)


def _analyze(args: argparse.Namespace) -> int:
    from .bench.analyze import run

    return run(args)


def _train_predictor(args: argparse.Namespace) -> int:
    from .bench.train_predictor import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from .launch.doctor import run

    return run(args)


def _bench(args: argparse.Namespace) -> int:
    if "model" in args:
        args.model = one_model(args.model, args.model_option)
    return import_module(f".bench.{args.bench}", __package__).run(args)


def _fill_serve(parser: Parser) -> None:
    add_options(parser, ServeConfig, model_positional=True)


def _fill_plan(parser: Parser) -> None:
    add_options(parser, EngineConfig, model_positional=True)


def _fill_profile(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="measure again, although what was measured counts still")
    _fill_plan(parser)


def _fill_generate(parser: Parser) -> None:
    from .engine.params import SamplingParams
    from .launch.generate import MAX_TOKENS, SAMPLING

    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    group = parser.add_argument_group(
        "sampling", f"What is not given is the checkpoint's own default; at most {MAX_TOKENS} tokens are written."
    )
    add_options(group, SamplingParams, only=SAMPLING, defaults=False)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--stream", action=switch, default=True, help="print text as it comes (default: on)")
    parser.add_argument("--chat", action=switch, default=False, help="apply the chat template (default: off)")
    add_options(parser, EngineConfig)


def _fill_analyze(parser: Parser) -> None:
    from .bench.analyze import add_arguments

    add_arguments(parser)


def _fill_train_predictor(parser: Parser) -> None:
    from .bench.train_predictor import add_arguments

    add_arguments(parser)


def _fill_doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _fill_benches(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, text in BENCHES.items():
        commands.add_parser(name, help=text, description=text, fill=partial(_fill_bench, bench=name)).set_defaults(
            run=_bench
        )


def _fill_bench(parser: Parser, bench: str) -> None:
    import_module(f".bench.{bench}", __package__).add_arguments(parser)
    if any(action.dest == "model" for action in parser._actions):
        parser.add_argument("--model", dest="model_option", metavar="MODEL", help="the same as MODEL")


COMMANDS = {
    "serve": (_serve, _fill_serve, "answer OpenAI-compatible requests over HTTP"),
    "generate": (_generate, _fill_generate, "continue one prompt and print the text"),
    "bench": (_bench, _fill_benches, f"measure: {', '.join(BENCHES)}"),
    "plan": (_plan, _fill_plan, "show what fits in memory, before loading"),
    "profile": (_profile, _fill_profile, "measure what the cost model needs: experts, links between ranks"),
    "analyze": (_analyze, _fill_analyze, "measure how local a model's routing is, and what offloading would cost"),
    "train-predictor": (_train_predictor, _fill_train_predictor, "learn a model's routing from texts, for prefetching"),
    "doctor": (_doctor, _fill_doctor, "show devices, measured rates, libraries, and what is missing"),
}


def build_parser() -> Parser:
    parser = Parser(prog="moeyard", description="Inference for Mixture-of-Experts language models.")
    parser.add_argument("--version", action="version", version=f"moeyard {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (run, fill, text) in COMMANDS.items():
        commands.add_parser(name, help=text, description=text, fill=fill).set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for a user's error, 1 for another, one line on stderr each."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away; nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"moeyard: error: {_describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _describe(error: Exception) -> str:
    """One line for any failure."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; `moeyard doctor` lists what is missing"
    if isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
