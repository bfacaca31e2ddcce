"""llama.cpp under measurement, through llama-cpp-python's batch interface: `python -m moeyard.bench.llama_side NAME`.

Every request is a sequence. Prompts go in as one batch, then each step is a batch of one token per sequence, and the
most likely token is taken.
"""

from __future__ import annotations

import time
from typing import Any

from .sides import Workload


class LlamaSide:
    """Answers `turns.Side.call`."""

    def load(self, path: str, threads: int, tokens: int, requests: int, batch: int) -> dict[str, Any]:
        """`tokens`: most of one request, prompt and output; `batch`: most of a step."""
        import llama_cpp
        import psutil

        self._lib = llama_cpp
        self._baseline = psutil.Process().memory_info().rss
        start = time.perf_counter()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        # Sequences keep keys and values apart, so that none attends past the others' masked ones.
        params.n_ctx, params.n_seq_max = tokens * requests, requests
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {requests} sequences of {tokens} tokens")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._most = batch
        self._batch = llama_cpp.llama_batch_init(batch, 0, 1)
        return {"load_s": time.perf_counter() - start}

    def turn(self, workload: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
        """`seconds` from the prompts to the last token; `tokens` per request."""
        w = Workload(**workload)
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        start = time.perf_counter()
        wanted = [(seq, i, token) for seq, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        lasts = [len(prompt) - 1 for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        while wanted:
            for first in range(0, len(wanted), self._most):
                self._decode(wanted[first : first + self._most], lasts, tokens)
            lasts = [last + 1 for last in lasts]
            done = len(tokens[0]) == w.output_len
            wanted = [] if done else [(seq, lasts[seq], given[-1]) for seq, given in enumerate(tokens)]
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def _decode(self, entries: list[tuple[int, int, int]], lasts: list[int], tokens: list[list[int]]) -> None:
        """One batch of (sequence, position, token); appends what follows each sequence's last one."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (seq, position, token) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
            batch.logits[i] = position == lasts[seq]
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {code} for {len(entries)} tokens")
        for i, (seq, position, _) in enumerate(entries):
            if position == lasts[seq]:
                logits = self._lib.llama_get_logits_ith(self._context, i)
                tokens[seq].append(int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax()))

    def memory(self) -> dict[str, int]:
        from .sides import memory_peak

        return {"baseline_bytes": self._baseline, "peak_bytes": memory_peak(False)}


def main() -> None:
    from .sides import serve

    serve(LlamaSide())


if __name__ == "__main__":
    main()
