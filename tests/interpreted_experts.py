"""The Triton kernels in Triton's interpreter, on a CPU. `test_triton` runs this file in a process of its own:
the interpreter has to be chosen before the kernels are imported.

The interpreter is slow, so that everything here is tiny, and no size is a multiple of another.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from test_offload import OPTIONS
from test_parity import generate, prompts, reference
from test_tile_list import ROUTINGS, check
from transformers import AutoModelForCausalLM

from moeyard.engine import moe, offload_plan
from moeyard.engine.config import EngineConfig
from moeyard.engine.device_experts import grouped_experts_of
from moeyard.engine.engine import Engine
from moeyard.engine.loader import draw, load
from moeyard.kernels import grouped_experts as module
from moeyard.kernels.activation import Activation
from moeyard.kernels.grouped_experts import expert_major, grouped_experts, listed_experts
from moeyard.kernels.route_few import route_few
from moeyard.kernels.tile_config import ExpertTiles, TileShape
from moeyard.scheduler.cost import LinkCost
from moeyard.scheduler.offload_cost import DiskCost

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 5, 40, 24, 6, 3
SWIGLU = Activation()
GPT_OSS = Activation(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
TILES = ExpertTiles(up=TileShape(rows=16, columns=32, depth=16), down=TileShape(rows=16, columns=16, depth=16, group=4))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def case(activation=SWIGLU, *, tokens=TOKENS, bias=False, dtype=torch.float32, slots=EXPERTS, seed=0):
    """(x, ids, weights, up, down, biases) of random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw_numbers(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = 2 * WIDTH if activation.gated else WIDTH
    x = draw_numbers(tokens, HIDDEN)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator)
    up, down = draw_numbers(slots, rows, HIDDEN) / HIDDEN**0.5, draw_numbers(slots, HIDDEN, WIDTH) / WIDTH**0.5
    biases = {}
    if bias:
        biases = {"up_bias_SN": draw_numbers(slots, rows), "down_bias_SD": draw_numbers(slots, HIDDEN)}
    return x, ids, weights, up, down, biases


def one(x, slot, up, down, activation, biases):
    """What one expert makes of one row, in float64."""
    h = up[slot].double() @ x.double()
    if biases:
        h += biases["up_bias_SN"][slot].double()
    y = down[slot].double() @ activation(h)
    return y + biases["down_bias_SD"][slot].double() if biases else y


def wanted(x, ids, weights, up, down, activation, biases, slots=None):
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for t, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            slot = e if slots is None or not 0 <= e < len(slots) else slots[e]
            if 0 <= e < (len(up) if slots is None else len(slots)) and slot >= 0:
                out[t] += weights[t, k].double() * one(x[t], slot, up, down, activation, biases)
    return out


def assert_near(out, right, dtype):
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), right, rtol=TOLERANCES[dtype], atol=4 * TOLERANCES[dtype])


@pytest.mark.parametrize("tokens", [2, TOKENS])
@pytest.mark.parametrize(
    ("activation", "bias"),
    [
        (SWIGLU, False),
        (GPT_OSS, True),
        (Activation(limit=0.5), False),
        (Activation(kind="gelu"), True),
        (Activation(kind="gelu_tanh", interleaved=True), False),
        (Activation(kind="relu_squared", gated=False), False),
        (Activation(kind="relu"), False),
        (Activation(kind="gelu", gated=False), True),
    ],
)
def test_activations_and_layouts(activation, bias, tokens):
    """Two tokens are computed pair by pair, more by the grouped GEMMs."""
    x, ids, weights, up, down, biases = case(activation, tokens=tokens, bias=bias)
    out, counts = grouped_experts(x, ids, weights, up, down, activation, **biases)
    assert_near(out, wanted(x, ids, weights, up, down, activation, biases), torch.float32)
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=EXPERTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, TOKENS])
def test_other_types(dtype, tokens):
    x, ids, weights, up, down, biases = case(GPT_OSS, tokens=tokens, bias=True, dtype=dtype)
    out, _ = grouped_experts(x, ids.int(), weights.to(dtype), up, down, GPT_OSS, **biases)
    right = wanted(x, ids, weights.to(dtype), up, down, GPT_OSS, biases)
    assert_near(out, right, dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_and_scattered_slots(routing):
    """Experts with no rows, all rows, none at all; in slots in any order, one shared by two, one nowhere. The other
    slots hold NaN, so that reading one shows."""
    ids = torch.tensor(ROUTINGS[routing])
    x, _, _, up, down, biases = case(tokens=len(ids), bias=True, slots=9)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    slots = [7, -1, 2, 0, 8, 2]
    for slot in set(range(9)) - set(slots):
        for tensor in (up, down, *biases.values()):
            tensor[slot] = torch.nan
    right = wanted(x, ids, weights, up, down, SWIGLU, biases, slots)
    for tiles in (None, TILES):
        out, counts = grouped_experts(
            x, ids, weights, up, down, SWIGLU, **biases, slot_E=torch.tensor(slots), tiles=tiles
        )
        assert_near(out, right, torch.float32)
        named = [e for e in ids.flatten().tolist() if 0 <= e < 6 and slots[e] >= 0]
        assert torch.equal(counts, torch.bincount(torch.tensor(named, dtype=torch.long), minlength=6))


def test_slots_apart_in_one_buffer():
    """As of a pool whose slots are padded, and rows of x that are part of longer ones."""
    x, ids, weights, up, down, _ = case()
    room = torch.full((EXPERTS, up[0].numel() + 13), torch.nan)
    apart = room[:, : up[0].numel()].unflatten(1, up.shape[1:])
    apart.copy_(up)
    rows = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :HIDDEN]
    for tokens in (2, TOKENS):
        out, _ = grouped_experts(rows[:tokens], ids[:tokens], weights[:tokens], apart, down, SWIGLU)
        right = wanted(x[:tokens], ids[:tokens], weights[:tokens], up, down, SWIGLU, {})
        assert_near(out, right, torch.float32)
    # 32 of its 40 values: rows that are copied first
    out, _ = grouped_experts(x[:, 3:35], ids, weights, up[:, :, 3:35].contiguous(), down[:, 3:35].contiguous(), SWIGLU)
    part = [x[:, 3:35], ids, weights, up[:, :, 3:35], down[:, 3:35]]
    assert_near(out, wanted(*part, SWIGLU, {}), torch.float32)


def test_tiles_that_experts_fill_several_of():
    """More rows of an expert than a tile has, in groups of tiles."""
    x, ids, weights, up, down, _ = case(tokens=21)
    ids[:, 0] = 4
    out, _ = grouped_experts(x, ids, weights, up, down, SWIGLU, tiles=TILES)
    assert_near(out, wanted(x, ids, weights, up, down, SWIGLU, {}), torch.float32)


def test_rows_that_lie_by_expert():
    """Room for 9 rows of each expert, of which most is garbage."""
    _, _, _, up, down, biases = case(bias=True)
    counts = [0, 9, 1, 4, 0, 2]
    x = torch.full((EXPERTS * 9, HIDDEN), torch.nan)
    for e, count in enumerate(counts):
        x[e * 9 : e * 9 + count] = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(e))
    out = expert_major(
        x, torch.tensor(counts), torch.arange(EXPERTS) * 9, up, down, SWIGLU, most_rows=20, **biases, tiles=TILES
    )
    for e, count in enumerate(counts):
        for row in range(e * 9, e * 9 + count):
            assert_near(out[row], one(x[row], e, up, down, SWIGLU, biases), torch.float32)


def test_a_deterministic_row_does_not_depend_on_the_others(monkeypatch):
    """To the bit: alone or among others, in any order. And the choice of tiles is the same, whatever the number."""
    chosen = set()
    real = module.choose_tiles

    def note(*args, **options):
        chosen.add(real(*args, **options))
        return next(iter(chosen))

    monkeypatch.setattr(module, "choose_tiles", note)
    x, ids, weights, up, down, _ = case(tokens=19)
    together, _ = grouped_experts(x, ids, weights, up, down, SWIGLU, deterministic=True)
    for rows in ([3], [18, 3, 0], list(range(18, -1, -1))):
        out, _ = grouped_experts(x[rows], ids[rows], weights[rows], up, down, SWIGLU, deterministic=True)
        assert torch.equal(out, together[rows])
    assert len(chosen) == 1


@pytest.mark.parametrize("routing", ROUTINGS)
def test_few_pairs_are_routed_in_one_launch(routing):
    ids = ROUTINGS[routing]
    for rows, slots in ((16, None), (2, [7, -1, 2, 0, 31, 2])):
        slot_E = None if slots is None else torch.tensor(slots)
        check(route_few(torch.tensor(ids), 6, rows, slot_E), ids, 6, rows, slots)


def test_more_pairs_are_routed_like_few(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 40, (20, 9), generator=generator)
    check(route_few(ids.int(), 40, 32), ids.tolist(), 40, 32)
    taken = []
    monkeypatch.setattr(module, "route_few", lambda *args: taken.append("few") or route_few(*args))
    monkeypatch.setattr(module, "MOST_PAIRS", 2 * TOP_K + 1)
    for tokens in (2, 3):
        x, ids, weights, up, down, _ = case(tokens=tokens)
        out, _ = grouped_experts(x, ids, weights, up, down, SWIGLU, tiles=TILES)
        assert_near(out, wanted(x, ids, weights, up, down, SWIGLU, {}), torch.float32)
    assert taken == ["few"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_layer_of_the_engine(architecture, tmp_path):
    """With the kernels in the place that they have on a GPU."""
    path = tiny.save(architecture, tmp_path / architecture)
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    (layer, *_) = load(blueprint, progress=False).layers
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    experts = model.get_submodule(layer.pool.spec.module)
    assert layer.grouped is None and layer.why_not_grouped == ""
    layer.grouped = grouped_experts_of(layer.pool, layer.gate)
    spec = layer.pool.spec
    for tokens in (0, 1, 6):
        x = torch.randn(tokens, layer.pool.down_SDI.shape[1], generator=torch.Generator().manual_seed(tokens))
        ids = torch.rand(tokens, spec.num_experts, generator=torch.Generator().manual_seed(1)).topk(spec.top_k).indices
        weights = torch.full((tokens, spec.top_k), 0.3)
        before = layer.counts_E.clone()
        with torch.no_grad():
            torch.testing.assert_close(layer(x, ids, weights), experts(x, ids, weights), rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.counts_E - before, torch.bincount(ids.flatten(), minlength=spec.num_experts))


def test_an_engine_whose_experts_are_not_all_in_memory(tmp_path, monkeypatch):
    """As on a GPU: groups of experts as they come."""
    monkeypatch.setattr(moe, "few_rows_of", lambda layer, progress: 4)
    disk = DiskCost(reads={4: LinkCost(1, 1)}, sequential_fs_per_byte=1, expert_bytes=9)
    monkeypatch.setattr(offload_plan, "disk_constants", lambda files, progress: SimpleNamespace(values=disk))
    path = tiny.save("gpt_oss", tmp_path / "model", num_hidden_layers=1)
    ids, groups = prompts(131, 1, longest=9), []
    engine = Engine(EngineConfig(model=str(path), expert_memory="60%", **OPTIONS))
    (layer,) = engine._experts.layers
    assert layer.pool.memory is None  # its layout is not the file's, so that places are slots, as on a GPU
    layer.grouped, layer._compiled = grouped_experts_of(layer.pool, layer.gate), False
    listed = layer.grouped.listed
    layer.grouped.listed = lambda *args: groups.append(len(args[3])) or listed(*args)
    assert generate(engine, ids, 2) == reference(path, ids, 2)
    assert engine.stats(False).expert_misses > 0 and len(groups) > 2
    engine.close()


def test_groups_that_the_host_knows():
    x, _, _, up, down, biases = case(bias=True)
    token_R, starts, slots = torch.tensor([4, 0, 0, 1, 2, 3, 4], dtype=torch.int32), [0, 2, 2, 7], [5, 1, 0]
    for options in ({"tiles": TILES}, {"deterministic": True}):
        out = listed_experts(x, token_R, starts, slots, up, down, SWIGLU, **biases, **options)
        for row, token in enumerate(token_R.tolist()):
            slot = slots[0] if row < 2 else slots[2]
            assert_near(out[row], one(x[token], slot, up, down, SWIGLU, biases), torch.float32)
    # Deterministic: the same to the bit when one group comes without the other.
    alone = listed_experts(x, token_R[2:].clone(), [0, 5], [0], up, down, SWIGLU, **biases, deterministic=True)
    assert torch.equal(alone, out[2:])
    with pytest.raises(ValueError, match="starts"):
        listed_experts(x, token_R, [1, 7], [0], up, down, SWIGLU)
    with pytest.raises(ValueError, match=r"slots: \[6\] are not all in 0\.\.5"):
        listed_experts(x, token_R, [0, 7], [6], up, down, SWIGLU)
    with pytest.raises(ValueError, match=r"token_R: .* of int32"):
        listed_experts(x, token_R.long(), [0, 7], [0], up, down, SWIGLU)


@pytest.mark.parametrize("tokens", [2, TOKENS])
def test_ids_that_32_bits_do_not_hold(tokens):
    x, ids, weights, up, down, _ = case(tokens=tokens)
    ids[1, 0] = 2**32 + 1
    out, counts = grouped_experts(x, ids, weights, up, down, SWIGLU)
    assert_near(out, wanted(x, ids, weights, up, down, SWIGLU, {}), torch.float32)
    assert int(counts.sum()) == tokens * TOP_K - 1


def test_no_tokens():
    x, ids, weights, up, down, _ = case()
    out, counts = grouped_experts(x[:0], ids[:0], weights[:0], up, down, SWIGLU)
    assert out.shape == (0, HIDDEN) and counts.tolist() == [0] * EXPERTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(5, 41)}, r"up_SND: \[6, 48, 41\]"),
        ({"x_TD": torch.zeros(5, 40, dtype=torch.float64)}, "x_TD: contiguous rows of float32"),
        ({"ids_TK": torch.zeros(4, 3, dtype=torch.int64)}, r"ids_TK: \[5, 3\]"),
        ({"ids_TK": torch.zeros(5, 3)}, "ids_TK: .* of int32 or int64"),
        ({"weights_TK": torch.zeros(5, 2)}, r"weights_TK: \[5, 3\]"),
        ({"up_SND": torch.zeros(6, 48, 40).half()}, "up_SND: .* of float32"),
        ({"down_SDI": torch.zeros(6, 24, 40).mT}, "down_SDI: each slot's weight must be contiguous"),
        ({"up_bias_SN": torch.zeros(6, 24)}, r"up_bias_SN: \[6, 48\]"),
        ({"slot_E": torch.zeros(6)}, "slot_E: .* of int32 or int64"),
        ({"activation": Activation(gated=False)}, r"up_SND: \[6, 24, 40\]"),
    ],
)
def test_refusals(change, message):
    x, ids, weights, up, down, _ = case()
    arguments = {"x_TD": x, "ids_TK": ids, "weights_TK": weights, "up_SND": up, "down_SDI": down}
    with pytest.raises(ValueError, match=message):
        grouped_experts(**(arguments | {"activation": SWIGLU} | change))


def test_refusals_of_rows_by_expert():
    x, _, _, up, down, _ = case()
    counts = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"most_rows: 6 is not in 0\.\.5"):
        expert_major(x, counts, counts, up, down, SWIGLU, most_rows=6)
    with pytest.raises(ValueError, match="first_E"):
        expert_major(x, counts, counts[:5], up, down, SWIGLU)
