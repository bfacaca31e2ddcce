"""The engine with quantised experts: the tokens of a model that has their dequantised weights, in less memory."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_parity import generate, prompts, reference

from moeyard.engine import moe
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.kernels.quantised import FORMATS

OPTIONS = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": "8MiB", "block_size": 8, "progress": False}
OPTIONS |= {"max_num_seqs": 8, "max_batched_tokens": 48}
NEW_TOKENS = 10


def dequantised_copy(path, form, to):
    """The checkpoint with the weights that its experts stand for once they are quantised, made tensor by tensor."""
    tensors = load_file(path / "model.safetensors")
    changed = 0
    for name, tensor in tensors.items():
        matrix = tensor.dim() >= 2 and "experts" in name and "bias" not in name and "shared" not in name
        if matrix and tensor.dim() == 2:  # one expert's, [outputs, inputs]
            tensors[name] = form.quantise(tensor).dequantise(torch.float32)
            changed += 1
        elif matrix:  # gpt-oss: [experts, inputs, outputs]
            rows = [form.quantise(t.t()).dequantise(torch.float32).t() for t in tensor]
            tensors[name] = torch.stack(rows)
            changed += 1
    assert changed
    to.mkdir()
    for file in path.iterdir():
        if file.suffix == ".json":
            (to / file.name).write_bytes(file.read_bytes())
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of an architecture, made once."""
    made = {}

    def of(architecture):
        if architecture not in made:
            made[architecture] = tiny.save(architecture, tmp_path_factory.mktemp(architecture) / "plain")
        return made[architecture]

    return of


@pytest.fixture
def make():
    engines = []

    def made(path, **options):
        engines.append(Engine(EngineConfig(model=str(path), **{**OPTIONS, **options})))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    """Starts compute alike without measuring."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_the_dequantised_model(architecture, name, checkpoints, make, tmp_path):
    path = checkpoints(architecture)
    ids = prompts(131, 6, longest=40)
    engine = make(path, expert_dtype=name)
    found = generate(engine, ids, NEW_TOKENS)
    assert found == reference(dequantised_copy(path, FORMATS[name], tmp_path / "same"), ids, NEW_TOKENS)
    pool = engine._experts.layers[0].pool
    assert pool.up_SND.dtype == torch.uint8 and engine._experts.layers[0].compiled
    plain = make(path)
    assert found != generate(plain, ids, NEW_TOKENS) or name == "int8"
    assert engine.info["expert_bytes"] == sum(layer.pool.nbytes for layer in engine._experts.layers)
    ratio = engine.info["expert_bytes"] / plain.info["expert_bytes"]
    assert ratio < {"int8": 0.3, "fp8": 0.3, "int4": 0.22}[name]
