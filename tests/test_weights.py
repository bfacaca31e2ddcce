"""Loading: equal to transformers' own, expert by expert, and every kind of damage named."""

import json
import shutil
import struct

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeyard.engine.checkpoint import OPEN_FILES, Checkpoint
from moeyard.engine.config import EngineConfig
from moeyard.engine.loader import draw, load


def blueprint_of(path, dtype="float32"):
    return draw(EngineConfig(model=str(path), dtype=dtype, device="cpu"), path)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_weight_equals_what_transformers_loads(architecture, tmp_path):
    path = tiny.save(architecture, tmp_path / "model", max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    blueprint = blueprint_of(path)
    experts = load(blueprint, progress=False)
    wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    state = wanted.state_dict()
    names = set(state) - set(blueprint.weights.experts)
    ours = blueprint.model.state_dict()
    assert names <= set(ours)
    for name in names:
        assert torch.equal(ours[name], state[name]), name
        assert ours[name].dtype == state[name].dtype, name
    for name, buffer in wanted.named_buffers():
        assert torch.equal(blueprint.model.get_buffer(name), buffer), name
    assert len(experts.layers) == len(blueprint.spec.experts)
    for layer in experts.layers:
        spec, pool = layer.pool.spec, layer.pool
        for parameter in spec.parameters:
            tensor = state[f"{spec.module}.{parameter}"]
            tensor = tensor.transpose(1, 2) if spec.is_transposed and tensor.dim() == 3 else tensor
            assert torch.equal(getattr(pool, pool._names[parameter]), tensor), (spec.module, parameter)


def test_bfloat16_keeps_what_must_stay_float32(tmp_path):
    path = tiny.save("deepseek_v3", tmp_path / "model")
    blueprint = blueprint_of(path, "bfloat16")
    load(blueprint, progress=False)
    wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    ours = blueprint.model.state_dict()
    for name in set(wanted) - set(blueprint.weights.experts):
        assert ours[name].dtype == wanted[name].dtype, name


def test_one_expert_is_read_alone(tmp_path, monkeypatch):
    for architecture in ("qwen3_moe", "gpt_oss"):
        blueprint = blueprint_of(tiny.save(architecture, tmp_path / architecture))
        checkpoint = blueprint.weights.checkpoint
        elements = 0
        original = checkpoint.read_part

        def counted(part, _original=original):
            nonlocal elements
            tensor = _original(part)
            elements += tensor.numel()
            return tensor

        monkeypatch.setattr(checkpoint, "read_part", counted)
        reader = blueprint.weights.reader(blueprint.spec.experts[1])
        read = reader.read(2)
        assert elements == sum(t.numel() for t in read.values()) == reader.nbytes // 4


@pytest.fixture
def damaged(tmp_path):
    """A checkpoint of per-expert tensors whose tensors a test may change before it is read."""

    def make(change=None, architecture="qwen3_moe", raw=None):
        path = tmp_path / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        tiny.save(architecture, path)
        file = path / "model.safetensors"
        if change:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
        if raw:
            file.write_bytes(raw(file.read_bytes()))
        return path

    return make


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
DENSE = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(DENSE), [DENSE, "missing", "expected shape [64, 48]", "found none"]),
        (lambda t: t.pop(EXPERT), [EXPERT, "missing", "model.safetensors", "expected 8", "found 7"]),
        (lambda t: t.update({"stray": torch.zeros(2)}), ["stray", "unexpected", "model.safetensors", "expected none"]),
        (
            lambda t: t.update({DENSE: torch.zeros(3, 4)}),
            [DENSE, "model.safetensors", "expected shape [64, 48]", "found [3, 4]"],
        ),
        (
            lambda t: t.update({EXPERT: torch.zeros(24, 47)}),
            [EXPERT, "model.safetensors", "expected shape [24, 48]", "found [24, 47]"],
        ),
        (lambda t: t.update({DENSE: torch.zeros(64, 48, dtype=torch.int8)}), [DENSE, "I8", "expected one of"]),
        (
            lambda t: t.update({DENSE: torch.zeros(64, 48, dtype=torch.int64)}),
            [DENSE, "I64", "expected one to be kept"],
        ),
        (lambda t: t.update({EXPERT: torch.zeros(24, 48, dtype=torch.int64)}), [EXPERT, "I64", "torch.float32"]),
    ],
    ids=[
        "missing",
        "missing expert",
        "extra",
        "wrong shape",
        "wrong expert shape",
        "wrong type",
        "integer",
        "integer expert",
    ],
)
def test_damage_is_named(damaged, change, parts):
    with pytest.raises(ValueError) as error:
        blueprint_of(damaged(change))
    for part in parts:
        assert part in str(error.value)


def test_all_experts_of_another_width(damaged):
    def widen(tensors):
        for name in list(tensors):
            if ".experts." in name and "down_proj" in name:
                tensors[name] = torch.zeros(48, 25)

    blueprint = blueprint_of(damaged(widen))
    with pytest.raises(ValueError, match=r"down_proj.*expected shape \[1, 48, 24\], found \[1, 48, 25\]"):
        load(blueprint, progress=False)


def _header(data, change):
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _overlap(header):
    other = next(n for n, i in header.items() if n != DENSE and i.get("shape") == header[DENSE]["shape"])
    header[DENSE]["data_offsets"] = header[other]["data_offsets"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (lambda d: d[:-5], "truncated in tensor .*: expected .* bytes, found"),
        (lambda d: d[:6], "truncated or not safetensors"),
        (lambda d: d + b"xx", "too long"),
        (lambda d: b"\xff" * 8 + d[8:], "truncated or not safetensors"),
        (lambda d: d[:8] + b"{" * 20 + d[28:], "damaged header"),
        (
            lambda d: _header(d, lambda h: h[DENSE].update(shape=[1, 2])),
            "damaged header: tensor .*q_proj.* needs 8 bytes",
        ),
        (lambda d: _header(d, lambda h: h[DENSE].update(dtype="Q9")), "unknown type Q9"),
        (lambda d: _header(d, _overlap), "damaged header: tensor .* expected at byte .*, found at"),
    ],
)
def test_tampered_files_are_refused(damaged, raw, message):
    with pytest.raises(ValueError, match=message):
        blueprint_of(damaged(raw=raw))


def test_an_index_that_does_not_fit(tmp_path):
    path = tiny.save("qwen3_moe", tmp_path / "model", max_shard_size="60KB")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"]["ghost"] = files[0]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tensor ghost is missing: .* expects it in {files[0]}"):
        Checkpoint(path)
    (path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"expects {files[1]}, which is not in"):
        Checkpoint(path)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, save it again as safetensors"):
        Checkpoint(tmp_path)


def test_few_files_are_open_at_once(tmp_path):
    path = tiny.save("mixtral", tmp_path / "model", max_shard_size="40KB")
    checkpoint = Checkpoint(path)
    for name in checkpoint.entries:
        checkpoint.read(name)
        assert len(checkpoint._open) <= OPEN_FILES
