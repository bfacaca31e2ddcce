"""`bench throughput --against llama.cpp`: the file it reads, and how it is driven, with a stand-in for the library."""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeyard.bench import gguf_file, shapes, throughput
from moeyard.bench.llama_side import LlamaSide
from moeyard.bench.results import Result, figures_of
from moeyard.bench.roofline import ModelCost, Peaks
from moeyard.bench.sides import Workload

TINY = shapes.BenchShape(
    hidden=64, layers=2, experts=8, top_k=2, expert_width=32, vocab=512, heads=4, kv_heads=2, head_dim=16, positions=256
)
VOCAB = 11


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    return parser.parse_args(argv)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llama_cpp, which is not installed; pip install 'moeyard\[llama\]'"):
        throughput.run(parse("--against", "llama.cpp"))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match="qwen3_moe only, not for mixtral"):
        gguf_file.gguf_of(tmp_path, tmp_path / "out")


def test_the_file_has_every_weight(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors.torch import load_file

    model = shapes.make_checkpoint(TINY, tmp_path)
    path = gguf_file.gguf_of(model, tmp_path)
    written = path.stat().st_mtime_ns
    assert gguf_file.gguf_of(model, tmp_path) == path and path.stat().st_mtime_ns == written
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = load_file(model / "model.safetensors")
    sizes = sum(weight.numel() for weight in weights.values())
    assert sum(int(tensor.n_elements) for tensor in tensors.values()) == sizes
    stacked = torch.stack([weights[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(8)])
    stored = torch.from_numpy(tensors["blk.1.ffn_up_exps.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(stored.view(stacked.shape), stacked)


def test_ratios_have_the_names_that_are_asked_for() -> None:
    cost = ModelCost(
        moe_layers=1, experts=2, top_k=1, expert_params=1, dense_params=1, head_params=1, embedding_params=1, layers=1,
        kv_elements=1, query_elements=1, itemsize=2,
    )  # fmt: skip
    sizes = (("batch", 16, 64, 8), ("single", 1, 64, 8), ("prefill", 1, 1024, 1))
    results = [
        Result(workload=Workload(name=n, requests=r, input_len=i, output_len=o), ours=[1.0], theirs=[x], equal=[1.0])
        for x, (n, r, i, o) in zip((2.0, 3.0, 4.0), sizes, strict=True)
    ]
    memory = {"peak_bytes": 2, "baseline_bytes": 1}
    setup: Any = SimpleNamespace(cost=cost, kv_bytes=1, config={})
    figures = figures_of(results, setup, Peaks(flops_per_s=1.0, bytes_per_s=1.0), memory, "llama.cpp")
    wanted = {"llama_ratio_16": 2.0, "llama_ratio_1": 3.0, "llama_ratio_prefill": 4.0}
    assert {name: value for name, value in figures.items() if "_ratio_" in name and "memory" not in name} == wanted
    assert figures["llama_output_tokens_per_s_16"] == 16 * 8 / 2


class FakeLlama:
    """After a token t comes t + 1; keeps each batch as (sequence, position, token, whether logits are asked for)."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int, int, bool]]] = []

    def __getattr__(self, name: str):
        if name.endswith("default_params"):
            return lambda: SimpleNamespace(kv_unified=False)
        return lambda *args: 1

    def llama_vocab_n_tokens(self, vocab: object) -> int:
        return VOCAB

    def llama_batch_init(self, size: int, embd: int, sequences: int):
        rows = [[0] for _ in range(size)]
        return SimpleNamespace(
            n_tokens=0, token=[0] * size, pos=[0] * size, n_seq_id=[0] * size, seq_id=rows, logits=[0] * size
        )

    def llama_decode(self, context: object, batch) -> int:
        rows = range(batch.n_tokens)
        self.batches.append([(batch.seq_id[i][0], batch.pos[i], batch.token[i], bool(batch.logits[i])) for i in rows])
        return 0

    def llama_get_logits_ith(self, context: object, i: int):
        values = (ctypes.c_float * VOCAB)()
        values[(self.batches[-1][i][2] + 1) % VOCAB] = 1.0
        return ctypes.cast(values, ctypes.POINTER(ctypes.c_float))


def test_requests_are_sequences_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lib = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", lib)
    side = LlamaSide()
    side.load(path="x", threads=1, tokens=20, requests=2, batch=4)
    workload = {"name": "batch", "requests": 2, "input_len": 3, "output_len": 3}
    answer = side.turn(workload=workload, prompts=[[1, 2, 3], [4, 5, 6]])
    assert answer["tokens"] == [[4, 5, 6], [7, 8, 9]]
    assert lib.batches == [
        [(0, 0, 1, False), (0, 1, 2, False), (0, 2, 3, True), (1, 0, 4, False)],  # no more than `batch` in one
        [(1, 1, 5, False), (1, 2, 6, True)],
        [(0, 3, 4, True), (1, 3, 7, True)],
        [(0, 4, 5, True), (1, 4, 8, True)],
    ]
