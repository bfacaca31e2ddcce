"""Recording a model's routing on given texts: every sequence alone, its own tokens first, then generated ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ..engine.checkpoint import Checkpoint
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.memory import free_memory
from ..engine.messages import Submit
from ..engine.model import choose_max_model_len, load_config
from ..engine.params import SamplingParams
from ..engine.predict.streams import MOST_ROWS, StreamRecorder, Streams
from ..engine.resolve import resolve_model
from ..launch.tokenizer import load_tokenizer, sampling_defaults
from .token_trace import ModelFacts, TokenTrace


@dataclass(frozen=True, eq=False)
class Recording:
    """A trace, and for each of its tokens [T] the id and whether the model generated it; of some tokens the residual
    stream, if that was asked for and there are routers that can be asked about it.
    """

    trace: TokenTrace
    token_T: npt.NDArray[np.int32]
    generated_T: npt.NDArray[np.bool_]
    streams: Streams | None = None


def record(
    config: EngineConfig,
    files: Sequence[str],
    tokens: int | None,
    length: int,
    generate: int,
    streams: bool = False,
) -> Recording:
    """Runs the engine on the texts.

    Args:
        tokens: of each file at most so many, from its beginning; None: all.
        length: a text is cut into sequences of so many tokens, or fewer if the model takes no more.
        generate: so many tokens are generated after each sequence, with the checkpoint's sampling and a fixed seed.
        streams: the residual streams too, of as many tokens as a quarter of the free memory has room for.
    """
    path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
    limit = choose_max_model_len(load_config(path, trust_remote_code=config.trust_remote_code), config.max_model_len)
    length = min(length, limit - generate - 1)
    if length < 1:
        raise ValueError(f"--generate is {generate}; this model's limit of {limit} tokens leaves no room for text")
    sequences = read_texts(path, config, files, tokens, length)
    longest = max(len(ids) for _, ids in sequences) + generate + 1
    config = dataclasses.replace(config, max_model_len=longest, max_num_seqs=1, prefix_cache=False)
    engine = Engine(config)
    try:
        if not engine.spec.experts:
            raise ValueError("model: it has no experts; there is no routing to record")
        experts = {layer.num_experts for layer in engine.spec.experts}
        facts = ModelFacts(
            name=str(engine.info["model"]),
            experts=max(experts),
            expert_bytes=round(engine.info["expert_bytes"] / sum(s.num_experts for s in engine.spec.experts)),
            dense_bytes=int(engine.info["dense_bytes"]),
        )
        params = SamplingParams(**sampling_defaults(path) | {"max_tokens": generate + 1, "seed": 0})
        recorder = None
        if streams:
            recorder = _stream_recorder(engine, sum(len(ids) + generate for _, ids in sequences))
        fingerprint = Checkpoint(path).fingerprint
        made = _run(engine, sequences, list(files), params, facts, fingerprint, config.progress)
        return made if recorder is None else dataclasses.replace(made, streams=recorder.take())
    finally:
        engine.close()


def _stream_recorder(engine: Engine, tokens: int) -> StreamRecorder | None:
    """None where no router can be asked."""
    watch = engine.watch_routers()
    engine.submit(Submit(request_id="watch", prompt_ids=[0] * 4, params=SamplingParams(max_tokens=1).to_dict()))
    while engine.has_work:
        engine.step()
    routers = watch.settle()
    asked = sum(router is not None for router in routers)
    if asked < 2:
        return None
    room = free_memory(torch.device("cpu")) // 4 // (2 * asked * engine.spec.hidden_size)
    experts_L = [layer.num_experts for layer in engine.spec.experts]
    return StreamRecorder(routers, experts_L, max(1, -(-tokens // max(1, min(MOST_ROWS, int(room))))))


def read_texts(
    path: Path, config: EngineConfig, files: Sequence[str], tokens: int | None, length: int
) -> list[tuple[int, list[int]]]:
    """The sequences: each the number of its file, and its token ids. Raises ValueError for a file that is no text."""
    tokenizer = load_tokenizer(path, remote_code=config.trust_remote_code)
    if tokenizer is None:
        raise ValueError(
            f"model: {path} has no tokenizer, so no text can be read; save the model's tokenizer beside it"
        )
    sequences = []
    for number, file in enumerate(files):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--text {file}: {error.strerror}; give text files") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {file}: it is not UTF-8; give text files") from error
        # Longer than any model takes: it is cut below, so the tokenizer need not warn of it.
        ids = tokenizer(text, verbose=False).input_ids[:tokens]
        if not ids:
            raise ValueError(f"--text {file}: it has no tokens; give files with text in them")
        sequences += [(number, ids[i : i + length]) for i in range(0, len(ids), length)]
    return sequences


def _run(
    engine: Engine,
    sequences: Sequence[tuple[int, list[int]]],
    files: list[str],
    params: SamplingParams,
    facts: ModelFacts,
    digest: str,
    progress: bool,
) -> Recording:
    recorder = engine.record_routing()
    topk: list[Any] = []
    token_ids: list[int] = []
    generated: list[bool] = []
    bar = tqdm(
        total=sum(len(ids) for _, ids in sequences),
        desc="recording",
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    with bar:
        for i, (_, ids) in enumerate(sequences):
            engine.submit(Submit(request_id=str(i), prompt_ids=ids, params=params.to_dict()))
            out: list[int] = []
            while engine.has_work:
                for delta in engine.step():
                    out += delta.token_ids
                    if delta.error:
                        raise RuntimeError(f"sequence {i}: {delta.error}")
            rows_TLK = recorder.take()
            computed = ids + out[:-1]  # the last one was sampled, and never run
            assert len(rows_TLK) == len(computed), (len(rows_TLK), len(computed))
            topk.append(rows_TLK)
            token_ids += computed
            generated += [False] * len(ids) + [True] * (len(computed) - len(ids))
            bar.update(len(ids))
    lengths_S = np.array([len(rows) for rows in topk])
    trace = TokenTrace(
        np.concatenate(topk),
        np.cumsum(lengths_S) - lengths_S,
        np.array([number for number, _ in sequences]),
        tuple(files),
        digest,
        facts,
    )
    return Recording(trace, np.array(token_ids, dtype=np.int32), np.array(generated))
