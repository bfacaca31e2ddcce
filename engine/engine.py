"""One rank's engine: requests in, tokens out, one step at a time.

A step asks the scheduler which tokens to compute, runs the model on them as one packed batch, samples where a
sequence's last token was computed, and reports what each request gained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import itertools
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock

from ..kernels.environment import usable_cores
from ..kernels.threads import set_threads
from ..kernels.warm_up import warm_up
from ..scheduler.batching import Scheduler, Step
from ..scheduler.blocks import BlockPool
from ..scheduler.requests import Request
from ..scheduler.states import StateSlots
from .attention import PagedAttention
from .balance import warm_up as planner_warm_up
from .config import EngineConfig, format_size
from .cpu_linear import use_panels, use_small_row_kernels
from .decode_batching import ExpertAware, decode_figures, picker_for
from .device_experts import compile_experts
from .expert_files import ExpertUnreadable
from .grammar import GrammarCompiler
from .group import RankGroup, RankLost
from .host_compute import CpuExpertsFailed
from .kv_cache import KVCache, Span, StepBatch, make_batch
from .linear_layers import LinearLayers
from .loader import Blueprint, draw, load
from .memory import check_weights_fit, free_memory, give_back, kv_blocks
from .messages import Spans, Stats, Submit, TokenDelta
from .model import plug, unplug
from .moe import MoEFunction, calibrate
from .offload import Offload
from .offload_plan import plan_offload
from .overlap import find_overlap
from .own_experts import OwnExperts
from .parallel import Parallel, Seat, balance_planner, check_alike, first_tables
from .params import SamplingParams
from .predict.base import Rows
from .predict.routers import RouterWatch
from .progress import Progress
from .recorder import RoutingRecorder
from .resolve import resolve_model
from .sampling import Sampled, SequenceSampler, sample
from .states import StatePool
from .step_reads import ReadFailed, wait_s
from .store import READ_TIMEOUT_S, ExpertLate

logger = logging.getLogger(__name__)

GIVE_BACK_TOKENS = 256
"""Steps of so many tokens leave holes in the heap that the next ones do not fit into; about a millisecond each."""
COMPILE_WAIT_S = 300.0
"""How long another process may compile before this one does so beside it."""
DISK_WAIT_S = 120.0
"""How long another rank may measure the disk before this one does so beside it."""
START_TIMEOUT_S = 3600.0
"""How long a rank may wait for another that loads; the front end's own limit is shorter."""

_NUMBERS = itertools.count()


@dataclass
class _Life:
    """What the engine keeps beside a scheduled request: its sampler and when things happened (monotonic seconds)."""

    sampler: SequenceSampler
    submitted: float
    started: float = 0.0
    resumed: bool = False  # another rank has generated the first tokens


class Engine:
    """Loads a checkpoint and generates. Raises ValueError for what the user can mend: options, checkpoint, request."""

    def __init__(self, config: EngineConfig, seat: Seat | None = None):
        self.config = config
        sharing = seat.local_ranks if seat else 1
        self.progress = seat.group.progress if seat else Progress(recording=config.trace is not None)
        set_threads(config.threads or max(1, usable_cores() // sharing))
        path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
        blueprint = draw(config, path, seat.local_rank if seat else 0, sharing)
        self.spec = blueprint.spec
        self.device = blueprint.device
        self.max_model_len = blueprint.max_model_len
        self.vocab_size = min(int(blueprint.model.config.vocab_size), blueprint.spec.vocab_size)
        self._model = blueprint.model
        self._parallel: Parallel | None = None
        self._offload: Offload | None = None
        self._linear: LinearLayers | None = None
        self._counts_LE: torch.Tensor | None = None
        # The CPU computes experts beside a GPU that has a part of them only.
        quantised = any(blueprint.weights.reader(spec).format is not None for spec in blueprint.spec.experts)
        _compile(config, seat, self.device.type == "cpu" or config.expert_memory is not None, quantised)
        baseline = psutil.Process().memory_info().rss
        self._experts = self._load(blueprint, seat)
        if self.device.type == "cpu":
            use_small_row_kernels(self._model)
            with torch.inference_mode():
                calibrate(self._experts.layers, progress=config.progress and (seat is None or seat.local_rank == 0))
            use_panels(self._model, self._experts.layers)
            give_back()  # what loading and measuring took for a moment
        else:
            with torch.inference_mode():
                compile_experts(self._experts.layers, config.max_batched_tokens)
        self._name = f"moeyard_{next(_NUMBERS)}"
        activations = self._warm_up(blueprint.dtype)
        if self._parallel is not None:
            assert seat is not None
            self._join(seat.group)
            give_back()
        # Ranks on one machine share its memory, and a GPU's is a rank's own.
        free = free_memory(self.device) / (sharing if self.device.type == "cpu" else 1) - activations
        if self._offload is not None:
            free -= self._offload.plan.size.reading  # taken while serving
        num_blocks = kv_blocks(config, self.device, blueprint.footprint, self.max_model_len, free)
        self._use_cache(num_blocks, blueprint.dtype, config.max_num_seqs)
        state_bytes = self._linear.pool.nbytes if self._linear else 0
        self._free = free - self._cache.nbytes - state_bytes
        if self._parallel is not None:
            self._parallel.share_memory(self._free)
        self._sharing = sharing
        if self._linear is not None and config.prefix_cache:
            logger.info(
                "common prefixes are computed for each request: the states of %s are kept for running requests only",
                self.spec.architecture,
            )
        self._pool = BlockPool(num_blocks, config.block_size, config.prefix_cache and self._linear is None)
        top_k = max((layer.top_k for layer in self.spec.experts), default=0)
        self._picker = picker_for(config, self._offload, top_k, seat.group.size if seat else 1)
        self._states = StateSlots(config.max_num_seqs) if self._linear is not None else None
        self._scheduler = Scheduler(
            self._pool, config.max_num_seqs, config.max_batched_tokens, self._picker, self._states
        )
        self._eos_ids = _eos_ids(path, blueprint.model.config)
        self._grammars: GrammarCompiler | None = None
        self._path = path
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self.info = {
            "model": str(config.model or path.name),
            "architecture": self.spec.architecture,
            "dtype": str(blueprint.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "weights_bytes": blueprint.footprint.weights,
            "expert_bytes": blueprint.footprint.experts,
            "kv_bytes": self._cache.nbytes,
            "kv_tokens": self.kv_tokens,
            "state_bytes": state_bytes,
            "state_bytes_per_request": self.spec.state_bytes,
            "max_model_len": self.max_model_len,
            "moe_layers": [layer.module for layer in self.spec.experts],
            "experts": [layer.num_experts for layer in self.spec.experts],
            "tables": self._parallel.tables if self._parallel else None,
            "expert_nbytes": blueprint.footprint.expert,
            "dense_bytes": blueprint.footprint.dense,
            "baseline_bytes": baseline,  # this process with all code loaded, before any weight
            "hidden_bytes": self.spec.hidden_size * blueprint.dtype.itemsize,
            "guest_bytes": self._parallel.guest_bytes if self._parallel else 0,
            "own_expert_bytes": (
                self._offload.plan.size.nbytes
                if self._offload
                else sum(layer.pool.nbytes for layer in self._experts.layers)
            ),
        }
        logger.info(
            "%s on %s in %s: weights %s, KV cache %s for %d tokens",
            self.spec.architecture,
            self.device,
            self.info["dtype"],
            format_size(blueprint.footprint.weights),
            format_size(self._cache.nbytes),
            self.kv_tokens,
        )
        if self._linear is not None:
            logger.info(
                "%d layers keep a state: %s for %d requests, %s each",
                len({state.key.layer for state in self.spec.states}),
                format_size(state_bytes),
                config.max_num_seqs,
                format_size(self.spec.state_bytes),
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._cache.num_blocks * self._cache.block_size

    @property
    def has_work(self) -> bool:
        """Whether to step: requests of this rank's own, or the other ranks may have some."""
        return self._scheduler.has_work or (self._parallel is not None and self._parallel.awake)

    def wake(self, number: int) -> None:
        """Take part in steps until all ranks have seen this number and none has work."""
        if self._parallel is not None:
            self._parallel.wake(number)

    def record_routing(self) -> RoutingRecorder:
        """Records the routing of all that this rank computes from now on."""
        self._experts.recorder = RoutingRecorder([layer.top_k for layer in self.spec.experts])
        return self._experts.recorder

    def watch_routers(self) -> RouterWatch:
        """Sees in the next steps, up to its `settle`, how the layers come from the residual stream to their routers."""
        return RouterWatch(self._model, self.spec)

    def place(self, version: int, tables: Sequence[Any]) -> None:
        """Move the experts to these tables. Raises ValueError for tables that are not this model's."""
        if self._parallel is None:
            raise ValueError("tables: this engine has all experts; there is nothing to place")
        self._parallel.place(version, tables)

    def join(self, group: RankGroup) -> list[Any]:
        """Goes on in another group, after a rank was lost or came back; where the experts are then.

        What was in flight stays: its tokens are computed again in the next step. Raises RankLost and what
        `Parallel.join` raises.
        """
        assert self._parallel is not None
        check_alike(group, self._fingerprint, self.config, START_TIMEOUT_S)
        self._join(group)
        sharing = self._sharing if self.device.type == "cpu" else 1
        self._parallel.share_memory(min(self._free, free_memory(self.device) / sharing))  # a lost rank's experts came
        return self._parallel.tables

    def take_reports(self) -> list[Any]:
        """Messages for the front end beside tokens and figures."""
        reports: list[Any] = []
        if self._parallel is not None:
            reports, self._parallel.reports = self._parallel.reports, []
        if self.progress.recording and (spans := self.progress.take_spans()):
            reports.append(Spans(spans=[list(span) for span in spans]))
        return reports

    def submit(self, submit: Submit) -> None:
        """Queues a request. Raises ValueError naming the field when it can never be served."""
        params = SamplingParams.from_dict(submit.params)
        prompt = submit.prompt_ids
        limit = min(self.max_model_len, self.kv_tokens)
        if not prompt:
            raise ValueError("prompt is empty; it must hold at least one token")
        if not all(isinstance(t, int) and 0 <= t < self.vocab_size for t in prompt):
            raise ValueError(f"prompt holds token ids outside the vocabulary of {self.vocab_size}")
        if len(prompt) >= limit:
            raise ValueError(f"prompt has {len(prompt)} tokens; the limit is {limit - 1} (one must be left for output)")
        room = limit - len(prompt)
        if params.max_tokens is not None and params.max_tokens > room:
            raise ValueError(
                f"max_tokens is {params.max_tokens}; after a prompt of {len(prompt)} tokens the limit of {limit}"
                f" leaves {room}"
            )
        grammar = None
        if params.json_schema is not None:
            grammar = self._grammar_compiler().compile_json_schema(params.json_schema)
        sampler = SequenceSampler(
            params,
            prompt,
            self.vocab_size,
            self._eos_ids,
            params.seed if params.seed is not None else secrets.randbits(64),
            grammar,
            room,
        )
        for token in submit.output_ids:
            if sampler.finish_reason or not (isinstance(token, int) and 0 <= token < self.vocab_size):
                raise ValueError("output_ids: the answer had ended already, or holds tokens outside the vocabulary")
            sampler.advance(token)
        life = _Life(sampler=sampler, submitted=time.monotonic(), resumed=bool(submit.output_ids))
        total = len(prompt) + min(params.max_tokens or room, room)
        if sampler.finish_reason:
            raise ValueError("output_ids: the answer had ended already")
        request = Request(submit.request_id, [*prompt, *submit.output_ids], total, submit.cache_salt, life)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)
        if self._offload is not None:
            self._offload.forecast.forget(request_id)

    def step(self) -> list[TokenDelta]:
        """Computes one step; what each request gained, finished requests included.

        Raises RankLost when another rank is gone; the step is then done again after `join`.
        """
        started = time.monotonic_ns()
        counts_LE = self._counts_LE.clone() if self._counts_LE is not None else None
        try:
            return self._step()
        except RankLost:
            if self._counts_LE is not None and counts_LE is not None:
                self._counts_LE.copy_(counts_LE)  # its tokens will be counted when it is done again
            raise
        finally:
            ns = time.monotonic_ns() - started
            self.progress.step_ns += ns
            if isinstance(self._picker, ExpertAware):
                self._picker.end_step(ns)

    def _step(self) -> list[TokenDelta]:
        step = self._scheduler.schedule()
        now = time.monotonic()
        for request_id in step.admitted:
            self._scheduler.get(request_id).payload.started = now
        if self._parallel is not None:
            if self._offload is not None:
                self._offload.announce(self._rows(step))
            plan = self._parallel.agree(sum(step.tokens.values()), self._scheduler.has_work)
            if plan is not None and not step.tokens:
                self._take_part()
        if not step.tokens:
            return []
        if self._parallel is None:
            self.progress.step += 1
        try:
            logits_BV = self._run(step)
            if self._parallel is not None:
                self._parallel.settle_reads()
        except RankLost:
            if self._states is not None:  # some layers have gone on and others not
                self._scheduler.restart(step.tokens)
            raise
        except (ExpertUnreadable, ExpertLate, CpuExpertsFailed, ReadFailed) as error:
            logger.error("%s; %d requests of this step end with it", error, len(step.tokens))
            return [self._fail(request_id, str(error)) for request_id in step.tokens]
        if self._parallel is not None:
            self._parallel.group.settle()
        self._scheduler.commit(step)
        self._steps += 1
        if self.device.type == "cpu" and sum(step.tokens.values()) >= GIVE_BACK_TOKENS:
            give_back()
        requests = [self._scheduler.get(request_id) for request_id in step.samples]
        results = sample(logits_BV, [r.payload.sampler for r in requests]) if requests else []
        return [self._advance(request, result) for request, result in zip(requests, results, strict=True)]

    @torch.inference_mode()
    def _take_part(self) -> None:
        """A step in which only other ranks have tokens."""
        assert self._parallel is not None
        if self._offload is not None:
            self._offload.begin_step(())
        self._parallel.take_part()
        with contextlib.suppress(ReadFailed):  # those say so whose tokens they were
            self._parallel.settle_reads()

    def tend(self) -> bool:
        """What goes on in the background; to be called now and then while there is no work. Whether there is more."""
        return self._offload is not None and self._offload.tend()

    def remember(self) -> None:
        """The end of serving: keeps what makes the next start quicker."""
        if self._offload is not None and self._parallel is None:
            self._offload.remember()

    def stats(self, with_experts: bool) -> Stats:
        counted: dict[str, Any] = {f"{phase}_ns": ns for phase, ns in self.progress.totals_ns.items()}
        counted |= self._parallel.figures() if self._parallel else {}
        counted |= self._offload.figures() if self._offload else {}
        counted |= decode_figures(self._picker) if self._picker else {}
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._pool.used,
            kv_blocks_total=self._cache.num_blocks,
            state_slots_used=self._states.used if self._states else 0,
            state_slots_total=self._states.num_slots if self._states else 0,
            prefix_queried_tokens=self._pool.queried_tokens,
            prefix_hit_tokens=self._pool.hit_tokens,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            expert_counts=[layer.counts_E.tolist() for layer in self._experts.layers] if with_experts else None,
            **counted,
            step_ns=self.progress.step_ns,
        )

    def close(self) -> None:
        """Forgets the functions registered with transformers, which keep the model's memory alive."""
        unplug(self._name)
        if self._offload is not None:
            self._offload.close()

    def _load(self, blueprint: Blueprint, seat: Seat | None) -> MoEFunction:
        """The weights; of the experts only this rank's, where there are several."""
        config = self.config
        if seat is None:
            config.check_one_rank()
            plan = plan_offload(config, blueprint)
            check_weights_fit(blueprint.footprint, self.device, plan.size.nbytes if plan else None)
            experts = load(blueprint, progress=config.progress, offload=plan)
            if plan is not None:
                self._offload = Offload(plan, experts.layers, blueprint, progress=config.progress)
            return experts
        group = seat.group
        self._fingerprint = blueprint.weights.checkpoint.fingerprint
        check_alike(group, self._fingerprint, config, START_TIMEOUT_S)
        if not blueprint.spec.experts:
            raise ValueError("ep: this model has no experts to share out; use --ep 1")
        tables = first_tables(config, [layer.num_experts for layer in blueprint.spec.experts], seat)
        rows = [table.slots_PS[group.position] for table in tables]
        readers = [blueprint.weights.reader(layer) for layer in blueprint.spec.experts]
        own = sum(reader.nbytes * len(row) for reader, row in zip(readers, rows, strict=True))
        plan = None
        if config.expert_memory is not None:
            with _in_turn("disk", DISK_WAIT_S):  # the first measures it for all; together they would measure less
                plan = plan_offload(config, blueprint, seat.local_ranks)
        check_weights_fit(blueprint.footprint, self.device, plan.size.nbytes if plan else own, seat.local_ranks)
        experts = load(blueprint, progress=config.progress and seat.local_rank == 0, slots=rows, offload=plan)
        if plan is not None:
            show = config.progress and seat.local_rank == 0
            self._offload = Offload(plan, experts.layers, blueprint, own=rows, progress=show)
            self._offload.store.timeout_s = min(READ_TIMEOUT_S, wait_s(config.collective_timeout))
            for layer, reader, row in zip(experts.layers, readers, rows, strict=True):
                layer.own = OwnExperts(reader, row)
        for layer in experts.layers:
            layer.overlap = find_overlap(blueprint.model, layer.pool.spec.module)
        self._counts_LE = _together([layer.counts_E for layer in experts.layers])
        for layer, counts_E in zip(experts.layers, self._counts_LE, strict=True):
            layer.counts_E = counts_E[: layer.pool.spec.num_experts]
        self._parallel = Parallel(config, seat, experts.layers, tables)
        return experts

    def _join(self, group: RankGroup) -> None:
        assert self._parallel is not None
        with torch.inference_mode():
            self._parallel.join(group, START_TIMEOUT_S)
            self._parallel.measure()

    def _use_cache(self, num_blocks: int, dtype: torch.dtype, sequences: int) -> None:
        """Makes a KV cache and room for the states of so many sequences; plugs what works on them into the model."""
        self._cache = KVCache(self.spec.attention, num_blocks, self.config.block_size, dtype, self.device)
        self._attention = PagedAttention(self.spec.attention, self._cache)
        attention: Any = self._attention
        experts: Any = self._experts
        if self._parallel is not None or self.progress.recording:
            attention = _timed("attention", attention, self.progress)
        if self._parallel is None and self.progress.recording:
            experts = _timed("experts", experts, self.progress)
        plug(self._model, self._name, attention, experts)
        if self.spec.states:
            pool = StatePool(self.spec.states, sequences, self.device)
            if self._linear is None:
                self._linear = LinearLayers(self._model, self.spec.states, pool)
            self._linear.pool = pool

    def _warm_up(self, dtype: torch.dtype) -> int:
        """Runs a prefill and a decode step over a cache of their own, so that nothing is compiled while serving.

        Returns the bytes that activations and sampling take at their peak on a GPU, where the prefill is as large as
        steps can be; 0 on a CPU, where it is small.
        """
        on_gpu = self.device.type == "cuda"
        config = self.config
        count = min(config.max_batched_tokens, self.max_model_len) if on_gpu else min(32, self.max_model_len)
        blocks = -(-(count + 1) // config.block_size)
        self._use_cache(blocks, dtype, 1)
        before = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        steps = [(count - 1, 0), (1, count - 1)]
        if self._linear is not None:
            self._linear.watch()
            steps.insert(1, (2, count - 3))  # a later chunk of a prompt
        for tokens, start in steps:
            if tokens > 0 and start >= 0:
                span = Span(tokens=[0] * tokens, start=start, blocks=range(blocks), samples=True, state_slot=0)
                batch = make_batch([span], config.block_size, self.device)
                rows = min(config.max_num_seqs, tokens)
                batch = dataclasses.replace(batch, sample_rows=torch.arange(rows, device=self.device))
                params = SamplingParams(temperature=1.0, max_tokens=1)
                sampler = SequenceSampler(params, [0], self.vocab_size, frozenset(), 0)
                sample(self._run_batch(batch), [sampler] * rows)
        if self._linear is not None:
            self._linear.settle()
        for layer in self._experts.layers:
            layer.counts_E.zero_()
            if layer.overlap is not None:
                layer.overlap.settle()
        if self._offload is not None:
            self._offload.forget()
        peak = torch.cuda.max_memory_allocated(self.device) - before if on_gpu else 0
        # The real cache is made next: nothing of this one may be left beside it.
        unplug(self._name)
        del self._cache, self._attention
        if on_gpu:
            torch.cuda.empty_cache()
        return peak

    def _rows(self, step: Step) -> list[Rows]:
        """What is in a step, for those who predict."""
        rows, first = [], 0
        for request_id, count in step.tokens.items():
            request = self._scheduler.get(request_id)
            tokens = request.tokens[request.computed : request.computed + count]
            rows.append(Rows(request_id=request_id, first=first, token_ids=tokens, start=request.computed))
            first += count
        return rows

    def _run(self, step: Step) -> torch.Tensor:
        """Logits [B, V] of the sequences that sample in this step."""
        samples, rows = set(step.samples), self._rows(step)
        spans = [
            Span(
                tokens=row.token_ids,
                start=row.start,
                blocks=request.block_table,
                samples=row.request_id in samples,
                state_slot=request.state_slot,
            )
            for row in rows
            for request in (self._scheduler.get(row.request_id),)
        ]
        return self._run_batch(make_batch(spans, self._cache.block_size, self.device), rows)

    @torch.inference_mode()
    def _run_batch(self, batch: StepBatch, rows: Sequence[Rows] = ()) -> torch.Tensor:
        self._attention.batch = batch
        cache: dict[str, Any] = {}
        if self._linear is not None:
            self._linear.begin(batch)
            cache = {"past_key_values": self._linear.cache}
        if self._offload is not None:
            self._offload.begin_step(rows)
        out = self._model(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.positions_T[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=batch.sample_rows,
            **cache,
        )
        if self._offload is not None:
            self._offload.forecast.end_step()
        return out.logits[0]

    def _fail(self, request_id: str, error: str) -> TokenDelta:
        """Ends a request whose tokens could not be computed."""
        self._finish(request_id)
        return TokenDelta(request_id=request_id, token_ids=[], finish_reason="error", error=error)

    def _finish(self, request_id: str) -> None:
        self._scheduler.finish(request_id)
        if self._offload is not None:
            self._offload.forecast.forget(request_id)

    def _advance(self, request: Request, result: Sampled) -> TokenDelta:
        life: _Life = request.payload
        sampler = life.sampler
        if result.error:
            return self._fail(request.id, result.error)
        resumed, life.resumed = life.resumed, False
        first = not sampler.output_ids or resumed
        sampler.advance(result.token_id)
        self._generated_tokens += 1
        self._scheduler.append(request.id, result.token_id)
        times: dict[str, Any] = {}
        if first:
            if not resumed:  # else the lost rank has counted them
                self._prompt_tokens += request.prompt_len
            now = time.monotonic()
            times = {
                "cached_tokens": request.cached_tokens,
                "queue_s": life.started - life.submitted,
                "prefill_s": now - life.started,
            }
        if sampler.finish_reason:
            self._finish(request.id)
        logprobs = None
        if result.logprob is not None:
            logprobs = [[result.logprob, [[token, value] for token, value in result.top or ()]]]
        return TokenDelta(
            request_id=request.id,
            token_ids=[result.token_id],
            logprobs=logprobs,
            finish_reason=sampler.finish_reason,
            stop_token=sampler.stop_token,
            **times,
        )

    def _grammar_compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self._path, trust_remote_code=self.config.trust_remote_code)
            self._grammars = GrammarCompiler(tokenizer, self.vocab_size, self._eos_ids)
        return self._grammars


def _together(counts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Room [L, E] for the counts of all layers, so that one copy keeps them and one brings them back."""
    return counts[0].new_zeros(len(counts), max(counts_E.shape[0] for counts_E in counts))


def _timed(phase: str, function: Any, progress: Progress) -> Any:
    """The same function with its time on record."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with progress.span(phase):
            return function(*args, **kwargs)

    return timed


def _compile(config: EngineConfig, seat: Seat | None, on_cpu: bool, quantised: bool) -> None:
    """Compiles what is compiled at all, or loads it from the cache of an earlier start, before any request can wait
    for it. One process of a user at a time: the others find in the cache what the first has compiled.
    """
    planner = balance_planner(config) if seat is not None else None
    if config.progress and (seat is None or seat.local_rank == 0):
        logger.info("loading compiled code; the first start on a machine compiles it, which takes up to a minute")
    with _in_turn("compile", COMPILE_WAIT_S):
        if on_cpu:
            warm_up(quantised=quantised)
        if planner is not None:
            planner_warm_up(planner)


@contextlib.contextmanager
def _in_turn(what: str, timeout_s: float) -> Iterator[None]:
    """One process of a user at a time does this; one that holds it for longer is stuck, and is not waited for."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    lock = FileLock(Path(tempfile.gettempdir()) / f"moeyard-{what}-{user}.lock", timeout=timeout_s)
    with contextlib.suppress(TimeoutError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _eos_ids(path: Any, config: Any) -> frozenset[int]:
    """The model's end tokens: generation_config.json's, else the configuration's."""
    file = path / "generation_config.json"
    value = None
    if file.is_file():
        try:
            value = json.loads(file.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"model: {file} is not JSON: {error}") from error
    if value is None:
        value = getattr(config, "eos_token_id", None)
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if isinstance(i, int))
