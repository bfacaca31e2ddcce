"""`moeyard train-predictor`: trains predictors of a model's routing on given texts, and installs those that are worth
it.

The engine runs the texts and records which experts each token uses. Some documents are held out; on the others the
regression of `engine/next_use.py` and look-ahead's ridge are fitted and the network of `engine/predict/path_network.py`
is trained. What does not beat the history baselines, or look-ahead without a ridge, on the documents held out is not
installed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..engine.config import EngineConfig, format_size
from ..kernels.environment import ENVIRONMENT, usable_cores
from ..launch.cli import add_options, config_from
from .analyze import ENGINE_OPTIONS
from .predictor_texts import HELD_OUT, LEAST, Texts, split, too_few
from .report import emit, table
from .token_trace import read_token_trace

if TYPE_CHECKING:
    from ..engine.next_use import NextUse
    from ..engine.predict.path_network import PathNetwork
    from ..engine.predict.stream_ridge import StreamRidge
    from ..engine.predict.streams import Streams
    from .look_ahead_ridge import Ahead
    from .predictor_scores import Standing

NAMES = {"next_use": "ridge", "path": "path network", "look_ahead": "look-ahead's ridge"}
LENGTH = 1024
"""Tokens of a sequence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="texts to run, UTF-8; each file is a document"
    )
    parser.add_argument(
        "--trace",
        dest="trace_file",
        metavar="FILE",
        help="recorded routing instead of texts, as moeyard analyze --trace writes it",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="only the first N of each text, or of the trace")
    parser.add_argument(
        "--sequence-tokens", type=int, metavar="N", help=f"cut texts into sequences of so many (default: {LENGTH})"
    )
    parser.add_argument(
        "--generate", type=int, metavar="N", help="let the model go on for N tokens after each sequence (default: 0)"
    )
    parser.add_argument(
        "--held-out",
        metavar="SHARE",
        help="share of the documents that nothing is trained on, or names of them, with patterns and commas between"
        f" (default: {HELD_OUT})",
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="passes of the path network over the texts (default: 8)"
    )
    parser.add_argument(
        "--predictors",
        metavar="NAME,NAME",
        help=f"of {', '.join(NAMES)}: which to train (default: all that can be). The regression needs memory for the"
        " square of all experts",
    )
    parser.add_argument(
        "--resident", type=float, metavar="SHARE", help="of the experts, in the replay that compares (default: 0.25)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="install here instead of beside the measured constants, where the engine looks"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here, and print them as one JSON line")
    add_options(parser, EngineConfig, model_positional=True, only=ENGINE_OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for options that cannot work."""
    wanted = _check(args)
    for name, value in ENVIRONMENT.items():  # a rank has these from its launcher; torch is not loaded yet
        os.environ.setdefault(name, value)
    texts, streams = (_from_trace(args), None) if args.trace_file else _recorded(args, "look_ahead" in wanted)
    fit, held = split(texts, args.held_out)
    progress = getattr(args, "progress", True)
    trained = _trained(args, wanted, fit, progress)
    standings = compare(held, trained, 0.25 if args.resident is None else args.resident, progress)
    passed, verdicts = judge(standings)
    ahead: dict[tuple[int, int], Ahead] = {}
    if "look_ahead" in wanted:
        from .look_ahead_ridge import fitted

        ridge, ahead, note = fitted(streams, texts, fit, held, progress)
        passed += () if ridge is None else ("look_ahead",)
        trained = replace(trained, look_ahead=ridge, notes=(*trained.notes, note))
    _print(args, texts, fit, held, standings, verdicts, ahead)
    _install(args, texts.trace.digest, texts.trace.counts_LE, trained, passed)
    if args.json:
        samples = {
            "recall": {s.name: s.recall_D.tolist() for s in standings.values()},
            "held_out": [held.names[d] for d in np.unique(held.document_S)],
            "installed": list(passed),
        }
        emit("train-predictor", _figures(standings, ahead), samples, args.json)
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """The predictors to train."""
    if bool(args.text) == bool(args.trace_file):
        raise ValueError("give --text FILE ..., texts for the model to run, or --trace FILE, and not both")
    can_be = [name for name in NAMES if name != "look_ahead" or not args.trace_file]
    wanted = can_be if args.predictors is None else args.predictors.split(",")
    if set(wanted) - NAMES.keys() or len(set(wanted)) < len(wanted):
        raise ValueError(f"--predictors is {args.predictors!r}; give different ones of {', '.join(NAMES)}")
    if args.trace_file:
        if "look_ahead" in wanted:
            raise ValueError("--predictors look_ahead needs --text: a trace has no residual streams")
        given = [name for name in ("sequence_tokens", "generate") if getattr(args, name) is not None]
        given += [name for name in ENGINE_OPTIONS if name in args and name not in ("threads", "progress")]
        given += ["model"] if args.model_positional is not None else []
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is of no use with --trace, which runs no model")
    for name, least in (("tokens", 1), ("sequence_tokens", 1), ("generate", 0), ("epochs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.resident is not None and not 0 < args.resident < 1:
        raise ValueError(f"--resident is {args.resident}; it must be above 0 and below 1")
    if args.epochs is not None and "path" not in wanted:
        raise ValueError("--epochs is of use for the predictor path; add it to --predictors")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"{args.json}: its directory does not exist; make it, or give another")
    return [name for name in NAMES if name in wanted]


# Texts and documents


def _recorded(args: argparse.Namespace, with_streams: bool) -> tuple[Texts, Streams | None]:
    from ..engine.model import load_config
    from ..engine.resolve import resolve_model
    from .record import record

    if len(args.text) < LEAST:
        raise ValueError(too_few(len(args.text), "--text"))
    config = config_from(argparse.Namespace(**vars(args), max_num_seqs=1), EngineConfig)
    length = args.sequence_tokens or LENGTH
    made = record(config, args.text, args.tokens, length, args.generate or 0, with_streams)
    path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
    vocab = int(load_config(path, trust_remote_code=config.trust_remote_code).get_text_config().vocab_size)
    trace = made.trace
    texts = Texts(
        trace=trace, token_T=made.token_T, vocab=vocab, document_S=trace.domain_S, names=tuple(map(str, args.text))
    )
    return texts, made.streams


def _from_trace(args: argparse.Namespace) -> Texts:
    """Documents are the trace's domains, its sequences where it names none."""
    import torch

    torch.set_num_threads(getattr(args, "threads", None) or usable_cores())
    trace = read_token_trace(args.trace_file)
    with np.load(args.trace_file, allow_pickle=False) as file:
        token_T = file["token_ids"] if "token_ids" in file.files else None
    if token_T is not None and (token_T.shape != trace.topk_TLK.shape[:1] or token_T.min() < 0):
        raise ValueError(f"--trace {args.trace_file}: token_ids are not the ids of its tokens; record it again")
    vocab = 0 if token_T is None else int(token_T.max()) + 1
    if args.tokens is not None:
        trace = trace.first(args.tokens)
        token_T = None if token_T is None else token_T[: args.tokens]
    document_S, names = trace.domain_S, trace.domains
    if len(np.unique(document_S)) == 1:
        document_S = np.arange(len(trace.start_S))
        names = tuple(f"sequence {s}" for s in document_S)
    return Texts(trace=trace, token_T=token_T, vocab=vocab, document_S=document_S, names=names)


# Training and verdict


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    next_use: NextUse | None = None
    path: PathNetwork | None = None
    look_ahead: StreamRidge | None = None
    """Of the layers and depths where it is better."""
    notes: tuple[str, ...] = ()
    """Why one was not trained."""


def _trained(args: argparse.Namespace, wanted: Sequence[str], fit: Texts, progress: bool) -> Trained:
    from ..engine.next_use import NextUse
    from ..engine.predict import path_training

    trace, notes = fit.trace, []
    tokens, quiet = len(trace.topk_TLK), None if progress else True
    next_use = network = None
    if "next_use" in wanted:
        need, free = ridge_bytes(trace.layers, trace.experts, tokens), _free_memory()
        if need > free:
            notes.append(
                f"The ridge is not fitted: for {trace.layers * trace.experts} experts it needs about"
                f" {format_size(need)} of memory, and {format_size(free)} are free."
            )
        else:
            with tqdm(total=2 * tokens, desc="ridge", unit="token", disable=quiet, leave=False) as bar:
                next_use = NextUse.fit(
                    trace.topk_TLK, trace.start_S, trace.experts, digest=trace.digest, progress=bar.update
                ).with_next_token(trace.topk_TLK, trace.start_S)
    if "path" in wanted and fit.token_T is None and args.predictors is None:
        notes.append(
            "The path network is not trained: the trace has no token ids, so that only the ridge can be fitted."
            " --predictors next_use,path trains one that goes by routing alone."
        )
    elif "path" in wanted:
        epochs = args.epochs or path_training.EPOCHS
        with tqdm(total=epochs * tokens, desc="path network", unit="token", disable=quiet, leave=False) as bar:
            network = path_training.train(
                trace.topk_TLK,
                trace.start_S,
                trace.experts,
                token_T=fit.token_T,
                vocab=fit.vocab,
                epochs=epochs,
                digest=trace.digest,
                progress=bar.update,
            )
    return Trained(next_use=next_use, path=network, notes=tuple(notes))


def ridge_bytes(layers: int, experts: int, tokens: int) -> int:
    """Memory at the most while the regression is fitted: its equations and their factors, and a number for each expert
    and token.
    """
    from ..engine.routing_history import CHUNK, FEATURES

    everything, own = 3 * layers * experts, FEATURES * experts
    shared = 3 * everything**2 + 2 * everything * layers * experts
    chunk = 4 * min(CHUNK, tokens) * (everything + layers * own)
    return 4 * (shared + layers * own * (everything + own) + chunk + 2 * tokens * layers * experts)


def _free_memory() -> int:
    import torch

    from ..engine.memory import free_memory

    return int(free_memory(torch.device("cpu")))


def compare(held: Texts, trained: Trained, resident: float, progress: bool) -> dict[str, Standing]:
    """The baseline and what was trained, on the documents held out; `both` keeps the mean of the two predictions."""
    from .predictor_scores import Judge, Scores, path_scores, ridge_scores

    trace = held.trace
    runs = 3 + sum((trained.next_use is not None, 2 * (trained.path is not None)))
    runs += trained.next_use is not None and trained.path is not None
    with tqdm(
        total=runs * len(trace.topk_TLK), desc="compare", unit="token", disable=None if progress else True
    ) as bar:
        bar.leave = False
        judge = Judge(trace, held.document_S, resident, bar.update)
        found = {"decayed": judge.decayed()}
        ridge = path = None
        if trained.next_use is not None:
            ridge = ridge_scores(trained.next_use, trace)
            found["next_use"] = judge.standing(NAMES["next_use"], ridge)
        if trained.path is not None:
            path = path_scores(trained.path, trace, held.token_T, bar.update)
            found["path"] = judge.standing(NAMES["path"], path)
        if ridge is not None and path is not None:
            mean_TLE = (ridge.after_TLE + path.after_TLE) / 2
            found["both"] = judge.standing(
                "path network, ridge", Scores(before_TLE=path.before_TLE, after_TLE=mean_TLE)
            )
    return found


def judge(standings: dict[str, Standing]) -> tuple[tuple[str, ...], list[str]]:
    """Who may be installed, and a line on each: the ridge must beat decayed counts, the network these and the ridge.

    The network is judged as it is used: with the ridge, where that is installed too.
    """
    passed: list[str] = []
    lines = []
    if "next_use" in standings:
        good = standings["next_use"].beats(standings["decayed"])
        passed += ["next_use"] if good else []
        lines.append(
            "The ridge beats decayed counts."
            if good
            else "The ridge is not installed: it does not beat decayed counts on the documents held out."
        )
    if "path" in standings:
        used = standings["both" if "next_use" in passed else "path"]
        rivals = [standings[name] for name in ("decayed", "next_use") if name in standings]
        lost = [rival.name for rival in rivals if not used.beats(rival)]
        passed += [] if lost else ["path"]
        lines.append(
            f"The path network is not installed: it does not beat {' and '.join(lost)} on the documents held out."
            if lost
            else f"The path network beats {' and '.join(rival.name for rival in rivals)}."
        )
    return tuple(passed), lines


def _print(
    args: argparse.Namespace,
    texts: Texts,
    fit: Texts,
    held: Texts,
    standings: dict[str, Standing],
    verdicts: Sequence[str],
    ahead: dict[tuple[int, int], Ahead],
) -> None:
    trace = texts.trace
    top_k = trace.topk_TLK.shape[2]
    print(
        f"{trace.model.name or Path(args.trace_file or 'the embedded checkpoint').name}: {trace.layers} MoE layers of"
        f" {trace.experts} experts; {len(fit.trace.topk_TLK)} tokens of {len(np.unique(fit.document_S))} documents to"
        f" learn from, {len(held.trace.topk_TLK)} of {len(np.unique(held.document_S))} held out\n"
    )
    header = ["on the held-out documents", f"recall@{top_k}", f"recall@{2 * top_k}"]
    header += ["excess closed", "read/token", "copied/token"]
    rows = [
        [
            s.name,
            f"{s.recall_D.mean():.3f}",
            f"{s.recall_double_D.mean():.3f}",
            f"{s.excess:.3f}",
            f"{s.misses:.2f}",
            f"{s.copies:.2f}",
        ]
        for s in standings.values()
    ]
    print(table(header, rows))
    print()
    for line in verdicts:
        print(line)
    if ahead:
        from .look_ahead_ridge import ahead_table

        print()
        print(ahead_table(ahead, top_k))


def _install(
    args: argparse.Namespace, digest: str, counts_LE: npt.NDArray[np.int64], trained: Trained, passed: Sequence[str]
) -> None:
    """What passes takes the place of an older one. What does not leaves an older one where it is, and says so."""
    from ..engine import usage
    from ..engine.predict import installed

    folder = Path(args.out) if args.out else None
    for note in trained.notes:
        print(note)
    if not digest:
        print("Nothing is installed: the trace does not say of which model it is.")
        return
    # Until the model has been served, the texts say which experts to begin with.
    if usage.load(digest, *counts_LE.shape) is None:
        usage.add(digest, counts_LE)
    for kind in NAMES:
        predictor = getattr(trained, kind)
        path = installed.path_of(kind, digest, folder)
        if kind in passed:
            print(f"Installed: {installed.install(kind, predictor, folder)} ({format_size(path.stat().st_size)})")
        elif path.exists():
            print(f"An older one stays: {path}")
    if not passed:
        print("Nothing is installed.")


def _figures(standings: dict[str, Standing], ahead: dict[tuple[int, int], Ahead]) -> dict[str, float]:
    from .look_ahead_ridge import ahead_figures

    found: dict[str, float] = {}
    for name, s in standings.items():
        found |= {f"recall_{name}": float(s.recall_D.mean()), f"recall_2k_{name}": float(s.recall_double_D.mean())}
        found |= {f"excess_closed_{name}": s.excess, f"misses_{name}": s.misses, f"copies_{name}": s.copies}
    return found | ahead_figures(ahead)
