"""The engine with quantised experts: the tokens of a model that has their dequantised weights, in less memory."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_parity import generate, prompts, reference

from moeyard.bench.quantised_error import format_errors
from moeyard.engine import moe, offload_plan
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.loader import draw
from moeyard.engine.quantised_layouts import layout_of
from moeyard.engine.quantised_reader import check_quantised
from moeyard.kernels.quantised import FORMATS, FP8, INT4, MXFP4, Format
from moeyard.launch.plan import run as show_plan
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost

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

    def of(architecture, **changes):
        key = architecture, *changes.items()
        if key not in made:
            made[key] = tiny.save(architecture, tmp_path_factory.mktemp(architecture) / "plain", **changes)
        return made[key]

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
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))


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


def test_offloaded_experts_are_kept_quantised(checkpoints, make):
    path = checkpoints("qwen3_moe")
    ids = prompts(131, 6, longest=40)
    whole = make(path, expert_dtype="int8")
    expected = generate(whole, ids, NEW_TOKENS)
    budget = "30KiB"
    engine, plain = make(path, expert_dtype="int8", expert_memory=budget), make(path, expert_memory=budget)
    assert generate(engine, ids, NEW_TOKENS) == expected
    generate(plain, ids, NEW_TOKENS)
    # The same memory holds more experts, so fewer are read; what is read are the checkpoint's own bytes.
    few, many = plain._offload.store, engine._offload.store
    assert many.size.expert == whole._experts.layers[0].pool.reader.nbytes < few.size.expert / 3
    assert many.size.slots > few.size.slots
    assert many.figures.read_bytes < few.figures.read_bytes
    assert many.figures.misses < few.figures.misses
    assert many.most_used <= many.size.nbytes <= 30 * 1024


# Checkpoints as they are published


def publish(path, to, method, change):
    """The checkpoint with `change(name, tensor)`, which gives the tensors by name that are stored instead."""
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        tensors |= change(name, tensor) or {name: tensor}
    to.mkdir()
    for file in path.iterdir():
        if file.suffix == ".json":
            (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text()) | {"quantization_config": method}
    (to / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def as_mxfp4(name, tensor):
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {}
    made = [MXFP4.quantise(t.t()) for t in tensor]
    values, scales = torch.stack([m.values for m in made]), torch.stack([m.scales for m in made])
    return {f"{name}_blocks": values.view(*scales.shape, 16), f"{name}_scales": scales}


BLOCKS = Format(name="fp8", kind=FP8, rows=8, columns=16)


def as_fp8(name, tensor, form=BLOCKS):
    if not name.endswith("proj.weight"):
        return {}
    made = form.quantise(tensor)
    return {name: made.values.view(torch.float8_e4m3fn), f"{name}_scale_inv": made.scales}


GROUPS = Format(name="int4", kind=INT4, columns=8, zeros=True)


def nibbles(matrix):
    """[N, K] values of a 4-bit matrix."""
    return torch.stack((matrix.values & 15, matrix.values >> 4), -1).flatten(1).int()


def packed(values, order=range(8)):
    """int32 of eight neighbours in the last dimension each; the i-th lowest bits are of neighbour order[i]."""
    eights = values.view(*values.shape[:-1], -1, 8).long()
    bits = sum(eights[..., place] << (4 * i) for i, place in enumerate(order))
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()


def half(form, tensor):
    """A quantised matrix whose scales are exactly float16, as these checkpoints have them."""
    made = form.quantise(tensor)
    made.scales.copy_(made.scales.half())
    return made


def as_gptq(name, tensor):
    if not (name.endswith("proj.weight") and ".experts." in name):
        return {}
    made, stem = half(GROUPS, tensor), name.removesuffix(".weight")
    made.zeros.clamp_(min=1)
    return {
        f"{stem}.qweight": packed(nibbles(made)).t(),
        f"{stem}.qzeros": packed((made.zeros.int() - 1).t().contiguous()),
        f"{stem}.scales": made.scales.t().half(),
        f"{stem}.g_idx": torch.arange(tensor.shape[1], dtype=torch.int32) // 8,
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def as_awq(name, tensor):
    if not (name.endswith("proj.weight") and ".experts." in name):
        return {}
    made, stem = half(GROUPS, tensor), name.removesuffix(".weight")
    return {
        f"{stem}.qweight": packed(nibbles(made).t().contiguous(), AWQ_ORDER),
        f"{stem}.qzeros": packed(made.zeros.int().t().contiguous(), AWQ_ORDER),
        f"{stem}.scales": made.scales.t().half(),
    }


def plain_of(change):
    """The tensor that what `change` stores stands for, made with nothing of the loader's."""

    def same(name, tensor):
        stored = change(name, tensor)
        if not stored:
            return {}
        if change is as_mxfp4:
            return {name: torch.stack([MXFP4.quantise(t.t()).dequantise(torch.float32).t() for t in tensor])}
        made = BLOCKS.quantise(tensor) if change is as_fp8 else half(GROUPS, tensor)
        if change is as_gptq:
            made.zeros.clamp_(min=1)
        return {name: made.dequantise(torch.float32)}

    return same


PUBLISHED = {
    "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}, as_mxfp4, {"quant_method": "mxfp4"}),
    "fp8": ("qwen3_moe", {}, as_fp8, {"quant_method": "fp8", "weight_block_size": [8, 16]}),
    "gptq": ("qwen3_moe", {}, as_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}),
    "awq": ("qwen3_moe", {}, as_awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """A quantised checkpoint, and the tokens of the model that its weights stand for."""
    architecture, changes, change, method = PUBLISHED[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    plain = tiny.save(architecture, folder / "plain", **changes)
    path = publish(plain, folder / "quantised", method, change)
    same = publish(plain, folder / "same", {}, plain_of(change))
    config = json.loads((same / "config.json").read_text())
    del config["quantization_config"]
    (same / "config.json").write_text(json.dumps(config))
    ids = prompts(131, 6, longest=40)
    return SimpleNamespace(name=request.param, path=path, same=same, ids=ids, expected=reference(same, ids, NEW_TOKENS))


def test_published_checkpoints_stay_quantised(published, make):
    engine = make(published.path)
    assert generate(engine, published.ids, NEW_TOKENS) == published.expected
    reader = engine._experts.layers[0].pool.reader
    assert reader.format.name == {"gptq": "int4", "awq": "int4"}.get(published.name, published.name)
    stored = sum(part.nbytes for parts in reader.parts(0).values() for part in parts.values())
    plain = make(published.same)
    # Scales of float16 and packed zero points are kept as float32 and bytes.
    assert stored <= reader.nbytes < plain._experts.layers[0].pool.reader.nbytes / (2 if "q" in published.name else 3)
    assert engine.info["expert_bytes"] == sum(layer.pool.nbytes for layer in engine._experts.layers)


def test_published_checkpoints_are_read_as_they_are_stored(published, make):
    engine, plain = (make(path, expert_memory="50%") for path in (published.path, published.same))
    assert generate(engine, published.ids, NEW_TOKENS) == published.expected
    assert generate(plain, published.ids, NEW_TOKENS) == published.expected
    found, wanted = engine._offload.store.figures, plain._offload.store.figures
    assert 0 < found.read_bytes / found.misses < wanted.read_bytes / wanted.misses / 2


def test_published_checkpoints_can_be_dequantised(published, make):
    engine = make(published.path, expert_dtype="plain")
    assert generate(engine, published.ids, NEW_TOKENS) == published.expected
    assert engine._experts.layers[0].pool.format is None


@pytest.mark.parametrize(
    ("quantisation", "says"),
    [
        ({"quant_method": "bitsandbytes"}, r"quantised \(bitsandbytes\), which is not supported"),
        ({"quant_method": "fp8"}, r"\(fp8 without weight_block_size\)"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 8}, r"\(gptq of 8 bits\)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"\(gptq in the format marlin\)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"\(awq in the format gemv\)"),
        ({}, r"quantised \(of no name\)"),
    ],
)
def test_other_layouts_are_refused_by_name(quantisation, says):
    with pytest.raises(ValueError, match=says + ".*use one of those or a plain checkpoint"):
        layout_of(quantisation)


def refused(path, **options):
    with pytest.raises(ValueError) as error:
        draw(EngineConfig(model=str(path), **{**OPTIONS, **options}), path)
    return str(error.value)


def test_what_cannot_be_is_refused_with_a_remedy(published, checkpoints):
    assert "quantised already" in (says := refused(published.path, expert_dtype="int8")) and "plain" in says
    odd = checkpoints("qwen3_moe", moe_intermediate_size=25)
    says = refused(odd, expert_dtype="int4")
    assert "int4 needs an even number of inputs, not 25; choose fp8 or int8" in says
    dense = checkpoints("qwen3")
    assert "this model has no experts; leave it out" in refused(dense, expert_dtype="fp8")
    path = checkpoints("qwen3_moe")
    blueprint = draw(EngineConfig(model=str(path), **OPTIONS, expert_dtype="fp8"), path)
    with pytest.raises(ValueError, match=r"only the CPU's kernels compute with quantised experts.*--device cpu"):
        check_quantised("fp8", blueprint.weights, blueprint.spec, torch.device("cuda"))


def changed(path, to, change):
    """A copy of a checkpoint whose tensors `change` has changed."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    to.mkdir()
    for file in path.iterdir():
        if file.suffix == ".json":
            (to / file.name).write_bytes(file.read_bytes())
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_damage_of_quantised_tensors_is_named(published, tmp_path, make):
    names = [name for name in load_file(published.path / "model.safetensors") if "layers.1.mlp.experts" in name]
    scales = next(name for name in names if "scale" in name and "down" in name)
    says = refused(changed(published.path, tmp_path / "missing", lambda tensors: tensors.pop(scales)))
    assert "checkpoint: " in says and "layers.1.mlp.experts" in says and "down_proj" in says

    def cut(tensors):
        tensors[scales] = tensors[scales][:, :1].contiguous()

    path = changed(published.path, tmp_path / "short", cut)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.*scales.*expected.*found"):
        make(path)


def test_inputs_in_an_order_of_their_own_are_refused(tmp_path, checkpoints, make):
    plain = checkpoints("qwen3_moe")
    path = publish(plain, tmp_path / "gptq", PUBLISHED["gptq"][3], as_gptq)

    def shuffle(tensors):
        name = next(name for name in tensors if name.endswith("g_idx"))
        tensors[name] = tensors[name].flip(0).contiguous()

    with pytest.raises(ValueError, match=r"desc_act.*use a checkpoint that was made with desc_act false"):
        make(changed(path, tmp_path / "shuffled", shuffle))


def test_plan_counts_quantised_bytes(checkpoints, capsys):
    path = checkpoints("qwen3_moe")
    assert show_plan(EngineConfig(model=str(path), **OPTIONS, expert_dtype="int8")) == 0
    out = capsys.readouterr().out
    expert = 48 * 48 + 48 * 4 + 48 * 24 + 48 * 4
    assert "experts in int8, on cpu" in out
    assert f"{24 * expert / 1024:.3g} KiB" in out and f"{expert / 1024:.3g} KiB each" in out


def test_errors_by_format(checkpoints, published):
    plain, *others = format_errors(EngineConfig(model=str(checkpoints("gpt_oss")), **OPTIONS))
    assert (plain.name, plain.weights, plain.outputs) == ("float32", 0.0, 0.0)
    assert [e.name for e in others] == list(FORMATS)
    assert all(e.nbytes < plain.nbytes / 3 and 0 < e.weights < 0.1 and 0 < e.outputs < 0.2 for e in others)
    small = {e.name: e for e in others}
    assert small["int8"].weights < small["fp8"].weights < small["int4"].weights
    assert format_errors(EngineConfig(model=str(published.path), **OPTIONS)) == []  # what they were is not known
