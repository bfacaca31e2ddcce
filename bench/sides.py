"""The engines under measurement, each in its own process: `python -m moeyard.bench.sides NAME`.

The process reads one JSON request per line (`{"op": ..., ...}`), does it and answers with one JSON line; between two
requests it waits in a read and uses no core. The other end is `turns.Side`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PROBE_STEPS = 24
PROBE_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`requests` prompts of `input_len` tokens at once, `output_len` new tokens each.

    `method` is the transformers function it is compared with: `generate` or `generate_batch`.
    """

    name: str
    requests: int
    input_len: int
    output_len: int
    method: str = "generate"

    @property
    def counted_tokens(self) -> int:
        """What its rate counts: output tokens, or prompt tokens where there is one output token each."""
        return self.requests * (self.output_len if self.output_len > 1 else self.input_len)


class MoeyardSide:
    """Our engine, in process: no HTTP, no tokenizer."""

    def load(self, config: dict[str, Any], **_: Any) -> dict[str, Any]:
        from ..engine import engine
        from ..engine.config import EngineConfig
        from ..kernels.warm_up import warm_up

        self._cuda = config["device"] == "cuda"
        if not self._cuda:
            warm_up()  # compiled code belongs to the baseline, as the libraries' own does
        self._baseline = _memory_before(config["model"], self._cuda)
        start = time.perf_counter()
        self._engine = engine.Engine(EngineConfig(**config))
        self._turns = 0
        return {"load_s": time.perf_counter() - start}

    def turn(self, workload: dict[str, Any], prompts: list[list[int]], routing: bool = False) -> dict[str, Any]:
        """`seconds` from the first submit to the last token; per request, its `tokens` and the `stamps` of each.

        With `routing`, `experts_touched` too: distinct experts per MoE layer in steps of one token per request, on
        average (0.0 without such a step). Counting takes time between steps.
        """
        from ..engine.messages import Submit
        from ..engine.params import SamplingParams

        w = Workload(**workload)
        params = SamplingParams(temperature=0.0, max_tokens=w.output_len, ignore_eos=True).to_dict()
        self._turns += 1
        ids = [f"{self._turns}-{i}" for i in range(len(prompts))]
        tokens: dict[str, list[int]] = {i: [] for i in ids}
        stamps: dict[str, list[float]] = {i: [] for i in ids}
        touched = _Touched(self._engine, w.requests) if routing else None
        start = time.perf_counter()
        for request_id, prompt in zip(ids, prompts, strict=True):
            self._engine.submit(Submit(request_id=request_id, prompt_ids=prompt, params=params))
        while self._engine.has_work:
            for delta in self._engine.step():
                if delta.error:
                    raise RuntimeError(f"request {delta.request_id}: {delta.error}")
                tokens[delta.request_id] += delta.token_ids
                stamps[delta.request_id] += [time.perf_counter() - start] * len(delta.token_ids)
            if touched is not None:
                touched.after_step()
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "tokens": [tokens[i] for i in ids], "stamps": [stamps[i] for i in ids]}
        return answer if touched is None else {**answer, "experts_touched": touched.mean}

    def memory(self) -> dict[str, int]:
        states = self._engine.info["state_bytes"]
        return {"baseline_bytes": self._baseline, "peak_bytes": memory_peak(self._cuda), "state_bytes": states}


class _Touched:
    """Counts the distinct experts of each step of one token per request, from the engine's running totals."""

    def __init__(self, engine: Any, requests: int) -> None:
        self._engine = engine
        self._requests = requests
        self._last = engine.stats(with_experts=True)
        self._seen: list[int] = []

    def after_step(self) -> None:
        now = self._engine.stats(with_experts=True)
        no_prompt = now.prompt_tokens == self._last.prompt_tokens
        if no_prompt and now.generated_tokens - self._last.generated_tokens == self._requests:
            for before, after in zip(self._last.expert_counts, now.expert_counts, strict=True):
                self._seen.append(sum(a > b for a, b in zip(after, before, strict=True)))
        self._last = now

    @property
    def mean(self) -> float:
        return sum(self._seen) / len(self._seen) if self._seen else 0.0


class TransformersSide:
    """transformers' own loops over the same checkpoint."""

    def load(self, config: dict[str, Any], cache_tokens: int, requests: int) -> dict[str, Any]:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if config["threads"] is not None:
            torch.set_num_threads(config["threads"])
        self._cuda = config["device"] == "cuda"
        self._baseline = _memory_before(config["model"], self._cuda)
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config["model"], dtype=getattr(torch, config["dtype"])
        )
        self._model = model.to(config["device"]).eval()
        self._model.generation_config.eos_token_id = None  # nothing ends an output but its length
        gc.freeze()  # generate_batch collects garbage at its end; what is loaded need not be searched each time
        # Blocks (of 256 tokens) for twice the largest workload, so that its scheduler never waits for room, and our
        # token budget. Either one left out would be solved for from most of the memory there is.
        self._batching = transformers.ContinuousBatchingConfig(
            num_blocks=2 * (requests + cache_tokens // 256 + 1), max_batch_tokens=config["max_batched_tokens"]
        )
        return {"load_s": time.perf_counter() - start}

    def use(self, implementation: str) -> dict[str, Any]:
        """Takes this experts implementation from now on."""
        self._model.set_experts_implementation(implementation)
        return {}

    def probe(self, workload: dict[str, Any], gather_limit: int, expert_bytes: int) -> dict[str, Any]:
        """`seconds` of a shortened run of the workload with each experts implementation, the best of `PROBE_ROUNDS`.

        `skipped` says why one was not tried: `batched_mm` copies the weights of every token's experts
        (`expert_bytes` per token and layer), which must stay below `gather_limit` bytes.
        """
        w = Workload(**workload)
        short = dataclasses.replace(w, output_len=min(w.output_len, 1 + PROBE_STEPS))
        prompts = [[(7 * i + j) % 251 for j in range(w.input_len)] for i in range(w.requests)]
        runs: dict[str, list[float]] = {name: [] for name in EXPERTS_IMPLEMENTATIONS}
        skipped: dict[str, str] = {}
        gathered = w.requests * w.input_len * expert_bytes
        if gathered > gather_limit:
            skipped["batched_mm"] = f"would copy {gathered / 2**30:.1f} GiB of expert weights per layer"
        # In rounds, so that a busy moment of the machine does not fall on one of them alone; the first one warms up.
        for _ in range(1 + PROBE_ROUNDS):
            for name in EXPERTS_IMPLEMENTATIONS:
                if name in skipped:
                    continue
                try:
                    self.use(name)
                    runs[name].append(self._run(short, prompts)[0])
                except (ImportError, ValueError, RuntimeError) as error:
                    skipped[name] = f"{type(error).__name__}: {error}"
        seconds = {name: min(times[1:]) for name, times in runs.items() if name not in skipped}
        if not seconds:
            raise RuntimeError(f"no experts implementation of transformers runs this model: {skipped}")
        return {"seconds": seconds, "skipped": skipped}

    def turn(self, workload: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
        seconds, tokens = self._run(Workload(**workload), prompts)
        return {"seconds": seconds, "tokens": tokens}

    def _run(self, w: Workload, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        import torch
        from transformers import GenerationConfig

        options = GenerationConfig(do_sample=False, max_new_tokens=w.output_len, pad_token_id=0)
        start = time.perf_counter()
        if w.method == "generate_batch":
            # The manager, with its cache, is kept between turns, and the time ends at the last token's stamp: stopping
            # the manager's thread, which a service does not do, is not counted.
            outputs = self._model.generate_batch(
                prompts,
                generation_config=options,
                continuous_batching_config=self._batching,
                record_timestamps=True,
                persistent_manager=True,
                max_new_tokens=w.output_len,
            ).values()
            end = max((stamp for output in outputs for stamp in output.timestamps or ()), default=time.perf_counter())
            return end - start, [list(output.generated_tokens) for output in outputs]
        ids = torch.tensor(prompts, device=self._model.device)
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        tokens = out[:, ids.shape[1] :].tolist()
        return time.perf_counter() - start, tokens

    def memory(self) -> dict[str, int]:
        return {"baseline_bytes": self._baseline, "peak_bytes": memory_peak(self._cuda)}


def _memory_before(model: str, cuda: bool) -> int:
    """Bytes this process holds with every library imported and no weight loaded: the model is drawn on the meta device,
    which pulls in its code. Resident memory, or what torch took of the GPU."""
    import psutil
    import torch
    import transformers

    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
    return torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss


def memory_peak(cuda: bool) -> int:
    """Most bytes that this process held, or torch of the GPU."""
    import torch

    if cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, not inherited from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


SIDES: dict[str, type] = {"moeyard": MoeyardSide, "transformers": TransformersSide}


def main() -> None:
    serve(SIDES[sys.argv[1]]())


def serve(side: Any) -> None:
    """Answers requests, which are calls of the side's methods, until there are no more."""
    # Answers keep the real standard output; whatever a library prints goes with the log.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("op"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
