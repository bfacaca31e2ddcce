"""What a GPU changes: skipped without one, and what several change without two."""

import itertools

import pytest
import tiny
import torch
import world
from test_dispatchers import (
    DISPATCHERS,
    EXPERTS,
    HIDDEN,
    LOADS,
    PLACEMENTS,
    TOKENS,
    by_contract,
    in_chunks,
    inputs,
    table_of,
    wanted,
)
from test_offload import MANY
from test_parity import generate, prompts, reference
from test_ranks import check_tokens, run_ranks, shared_out

from moeyard.engine import constants, device_experts
from moeyard.engine.config import EngineConfig
from moeyard.engine.engine import Engine
from moeyard.engine.experts import ExpertPool
from moeyard.engine.host_compute import HostCompute
from moeyard.engine.host_experts import HostPool
from moeyard.engine.loader import draw, load
from moeyard.engine.moe import MoELayer
from moeyard.kernels.activation import Activation
from moeyard.scheduler import placement
from moeyard.scheduler.step_plan import StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one device for each rank; needs two")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_float32_tokens_on_a_gpu_equal_transformers_on_a_cpu(architecture, tmp_path):
    path = tiny.save(architecture, tmp_path / architecture)
    engine = Engine(
        EngineConfig(
            model=str(path), dtype="float32", device="cuda", max_num_seqs=32, max_batched_tokens=96, progress=False
        )
    )
    ids = prompts(engine.vocab_size, 8)
    ours = generate(engine, ids, 16)
    engine.close()
    assert ours == reference(path, ids, 16)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_runs_and_frees_its_blocks(architecture, tmp_path):
    path = tiny.save(architecture, tmp_path / architecture, hidden_size=64, moe_intermediate_size=32)
    engine = Engine(EngineConfig(model=str(path), dtype="bfloat16", device="cuda", progress=False))
    out = generate(engine, prompts(engine.vocab_size, 8), 16)
    assert all(len(tokens) == 16 for tokens in out)
    assert engine.stats(False).kv_blocks_used == 0
    engine.close()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"host_memory": "50%"}, {"residency": "lru"}])
@pytest.mark.parametrize("memory", ["50%", "25%", "6.3%"])
def test_experts_come_to_a_gpu_from_host_memory(architecture, options, memory, tmp_path):
    path = tiny.save(architecture, tmp_path / architecture, **MANY[architecture])
    ids = prompts(100, 4)
    config = {"model": str(path), "dtype": "float32", "device": "cuda", "progress": False, "expert_memory": memory}
    engine = Engine(EngineConfig(**config, **options))
    ours = generate(engine, ids, 10)
    stats, host = engine.stats(with_experts=False), engine._offload.source.host
    size = engine._offload.plan.size
    engine.close()
    assert ours == reference(path, ids, 10)
    assert stats.expert_misses > 0 and host.pinned
    assert size.reading == 0 and size.nbytes <= engine.info["expert_bytes"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("misses", ["auto", "copy", "cpu"])
@pytest.mark.parametrize("host_memory", ["100%", "50%"])
def test_missing_experts_are_copied_or_computed_by_the_cpu(host_memory, misses, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny.save(architecture, tmp_path / architecture, **MANY[architecture])
    ids = prompts(100, 4)
    config = {"model": str(path), "dtype": "float32", "device": "cuda", "progress": False, "expert_memory": "12%"}
    engine = Engine(EngineConfig(**config, misses=misses, host_memory=host_memory))
    ours = generate(engine, ids, 10)
    stats, (record,) = engine.stats(with_experts=False), constants.find("misses")
    engine.close()
    assert ours == reference(path, ids, 10)  # the CPU's sums differ in their last bits: no token hangs on that here
    assert record.key["pinned"] and record.values == engine._offload.ways.costs
    assert (stats.expert_on_cpu > 0) == (misses == "cpu") or misses == "auto"
    if misses == "copy" or host_memory == "50%":
        assert stats.expert_copied > 0
    elif misses == "cpu":
        assert stats.expert_copied == 0


def test_pinned_slots_are_copied_behind_what_the_gpu_computes_with_their_place(tmp_path):
    path = tiny.save("qwen3_moe", tmp_path / "model", hidden_size=512, moe_intermediate_size=256)
    config = EngineConfig(model=str(path), dtype="float32", device="cuda", progress=False)
    blueprint = draw(config, path)
    reader = blueprint.weights.reader(blueprint.spec.experts[0])
    device, host = ExpertPool(reader, 1, blueprint.device), HostPool(reader, 2, blueprint.device)
    for slot in range(2):
        host.fill(slot, slot)
    assert host.pinned and host.up_SND.is_pinned() and host.down_SDI.is_pinned()
    host.send(0, device.views(0))
    assert torch.equal(device.up_SND[0].cpu(), host.up_SND[0])
    x = torch.eye(device.up_SND.shape[2], device=blueprint.device)
    busy = torch.randn(4096, 4096, device=blueprint.device)
    for _ in range(40):
        busy = busy @ busy / 4096**0.5
    out = x @ device.up_SND[0].t()  # waits for all of that
    host.mark()
    host.send(1, device.views(0))
    torch.testing.assert_close(out.cpu(), host.up_SND[0].t(), rtol=1e-5, atol=1e-5)
    assert torch.equal(device.up_SND[0].cpu(), host.up_SND[1])
    host.close()
    assert not host.pinned


@pytest.mark.parametrize("tokens", [2, 64])
def test_rows_go_to_the_cpu_and_back_once(tokens, tmp_path):
    """Few tokens go as they are, of many only the rows; both while the GPU is at something else."""
    path = tiny.save("qwen3_moe", tmp_path / "model")
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cuda", progress=False), path)
    reader = blueprint.weights.reader(blueprint.spec.experts[0])
    pool = HostPool(reader, 2, blueprint.device)
    for slot in range(2):
        pool.fill(slot, slot)
    layer = MoELayer(blueprint.model.get_submodule(reader.spec.module), pool)
    compute = HostCompute([layer], pool, 16)
    x = torch.randn(tokens, pool.up_SND.shape[2], device=blueprint.device)
    token_R = torch.tensor([0, 1, 1, 0, 1], device=blueprint.device)
    y = compute.start(0, [0, 1], [0, 1], [0, 2, 5], x, token_R).wait(60)
    assert y.is_pinned()
    rows = x.cpu()[token_R.cpu()]
    for low, high, slot in ((0, 2, 0), (2, 5, 1)):
        wanted = layer.gate(rows[low:high] @ pool.up_SND[slot].t()) @ pool.down_SDI[slot].t()
        torch.testing.assert_close(y[low:high], wanted, rtol=1e-4, atol=1e-4)
    assert compute.close(60)
    pool.close()


def dispatchers_on(group):
    """Every dispatcher, placement and load with everything on the group's device, against a loop on the CPU."""
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) / HIDDEN**0.5
    wrong, cases = [], 0
    for case in itertools.product(DISPATCHERS, PLACEMENTS, LOADS, (1, 4)):
        name, place, (tokens, routing), degree = case
        table = table_of(place, group.size)
        tokens_P = TOKENS[tokens][: group.size]
        if degree > 1 and not any(tokens_P):
            continue
        x, ids, weights = inputs(tokens_P[group.position], routing, seed=group.position)
        right = wanted(x, ids, weights, matrices)
        plan = StepPlan(step=1, tokens_P=tokens_P, dispatcher=name, degree=degree, table_digest=3)
        there = [t.to(group.device) for t in (x, ids, weights)]
        rest = (plan, table.slots_PS[group.position], matrices.to(group.device))
        dispatcher = DISPATCHERS[name](group, table)
        out = by_contract(dispatcher, *there, *rest) if degree == 1 else in_chunks(dispatcher, *there, *rest)[0]
        if out.device.type != group.device.type:
            wrong.append((*case, f"a result on {out.device}"))
        if out.shape != right.shape or not torch.allclose(out.cpu(), right, rtol=1e-4, atol=1e-4):
            wrong.append((*case, "another result"))
        cases += 1
    return wrong, cases


def exchanges(group):
    """What every exchange gives for numbers that name their sender."""
    here, size = group.position, group.size
    mine = torch.full((2, 3), float(here), device=group.device)
    gathered, first = group.all_gather(mine)
    summed, second = group.reduce_scatter(torch.arange(2.0 * size, device=group.device)[:, None] + here)
    # Position p sends p + q rows to position q, so that rows are uneven and one pair has none.
    sends, receives = [here + q for q in range(size)], [p + here for p in range(size)]
    sent = torch.full((sum(sends), 2), float(here), device=group.device)
    swapped, third = group.all_to_all(sent, sends, receives)
    for pending in (first, second, third):
        pending.wait()
    counts = group.all_gather_counts(torch.tensor([here, 7]))
    after = torch.empty(4, device=group.device)
    if size > 1:
        ring = [((here + 1) % size, torch.full((4,), float(here), device=group.device))]
        group.exchange_flat(ring, [((here - 1) % size, after)])
    tensors = (gathered, summed, swapped, counts, after)
    assert all(t.device.type == group.device.type for t in (gathered, summed, swapped, after))
    return [t.cpu().tolist() for t in tensors]


def check_exchanges(size, device):
    for rank, (gathered, summed, swapped, counts, after) in enumerate(world.run_world(size, exchanges, device=device)):
        assert gathered == [[float(p)] * 3 for p in range(size) for _ in range(2)]
        assert summed == [[float(size * row + sum(range(size)))] for row in (2 * rank, 2 * rank + 1)]
        assert swapped == [[float(p)] * 2 for p in range(size) for _ in range(p + rank)]
        assert counts == [[p, 7] for p in range(size)]
        assert size == 1 or after == [float((rank - 1) % size)] * 4


def check_dispatchers(size, device):
    for wrong, cases in world.run_world(size, dispatchers_on, device=device):
        assert not wrong and cases > 100


def check_engines(size, device, path, options, moves):
    by_rank = shared_out(prompts(131, 4, longest=30, seed=3), size)
    goal = [placement.round_robin(8, size).to_lists()] * 3
    orders = [[(1, 1, goal)]] * size if moves else ()
    results = world.run_world(size, run_ranks, path, by_rank, 8, options, orders, device=device)
    check_tokens(path, by_rank, results, 8)
    for _, facts in results:
        assert facts["stats"].step_ns > 0
        if moves:
            assert facts["tables"] == goal


def test_the_exchanges_of_one_rank_over_nccl():
    check_exchanges(1, "cuda")


def test_dispatchers_of_one_rank_over_nccl_give_the_specifications_result():
    check_dispatchers(1, "cuda")


def test_an_engine_alone_in_its_group_over_nccl(tmp_path):
    check_engines(1, "cuda", tiny.save("qwen3_moe", tmp_path / "model"), {}, False)


@two_gpus
def test_the_exchanges_of_two_ranks_over_nccl():
    check_exchanges(2, "cuda")


@two_gpus
def test_dispatchers_of_two_ranks_over_nccl_give_the_specifications_result():
    check_dispatchers(2, "cuda")


@two_gpus
@pytest.mark.parametrize(
    "options", [{"dispatcher": "all_to_all", "chunks": "2"}, {"dispatcher": "all_gather", "chunks": "1"}, {}]
)
def test_two_engines_over_nccl_while_their_experts_move(tmp_path, options):
    path = tiny.save("qwen3_moe", tmp_path / "model")
    check_engines(2, "cuda", path, {**options, "move_bytes": "1B"}, True)


def experts_case(dtype, tokens, activation, seed=0):
    """Experts of odd sizes on the device, and their routing with ids of -1."""
    generator = torch.Generator().manual_seed(seed)
    experts, hidden, width, top_k = 11, 200, 72, 3
    rows = 2 * width if activation.gated else width
    shapes = ((tokens, hidden), (experts, rows, hidden), (experts, hidden, width), (experts, rows), (experts, hidden))
    x, up, down, up_bias, down_bias = (torch.randn(*s, generator=generator) for s in shapes)
    up, down = up / hidden**0.5, down / width**0.5
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    tensors = [t.to(dtype).cuda() for t in (x, up, down, up_bias, down_bias)]
    return tensors, ids.cuda(), weights.cuda()


def by_rows(tensors, ids, weights, activation):
    """The same in float64, expert by expert."""
    x, up, down, up_bias, down_bias = (t.double() for t in tensors)
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        y = activation(x @ up[e].T + up_bias[e]) @ down[e].T + down_bias[e]
        out += torch.where(ids == e, weights.double(), 0).sum(1, keepdim=True) * y
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 5, 40, 150, 1000])
def test_triton_experts_equal_a_loop_in_float64(dtype, tokens):
    """Pairs, one launch's sort and PyTorch's, and every height of tiles, deterministic ones too."""
    grouped = pytest.importorskip("moeyard.kernels.grouped_experts")
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for activation in (Activation(), Activation(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)):
        tensors, ids, weights = experts_case(dtype, tokens, activation)
        x, up, down, up_bias, down_bias = tensors
        right = by_rows(tensors, ids, weights, activation)
        for deterministic in (False, True):
            out, counts = grouped.grouped_experts(
                x, ids, weights, up, down, activation, up_bias_SN=up_bias, down_bias_SD=down_bias,
                deterministic=deterministic,
            )  # fmt: skip
            torch.testing.assert_close(out.double(), right, rtol=tolerance, atol=tolerance)
            assert torch.equal(counts.cpu(), torch.bincount(ids[ids >= 0].cpu(), minlength=11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_rows_do_not_depend_on_the_others(dtype):
    grouped = pytest.importorskip("moeyard.kernels.grouped_experts")
    (x, up, down, *_), ids, weights = experts_case(dtype, 700, Activation())
    together, _ = grouped.grouped_experts(x, ids, weights, up, down, Activation(), deterministic=True)
    for rows in ([3], [5, 699, 3], list(range(350)), list(range(699, -1, -1))):
        out, _ = grouped.grouped_experts(x[rows], ids[rows], weights[rows], up, down, Activation(), deterministic=True)
        assert torch.equal(out, together[rows])


@pytest.mark.parametrize("tokens", [2, 40, 600])
def test_triton_experts_wait_for_nothing_and_fit_into_a_graph(tokens):
    grouped = pytest.importorskip("moeyard.kernels.grouped_experts")
    (x, up, down, *_), ids, weights = experts_case(torch.bfloat16, tokens, Activation())
    first, _ = grouped.grouped_experts(x, ids, weights, up, down, Activation())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped.grouped_experts(x, ids, weights, up, down, Activation())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, counts = grouped.grouped_experts(x, ids, weights, up, down, Activation())
    graph.replay()
    assert torch.equal(out, first)
    (x_new, *_), ids_new, weights_new = experts_case(torch.bfloat16, tokens, Activation(), seed=1)
    for old, new in ((x, x_new), (ids, ids_new), (weights, weights_new)):
        old.copy_(new)
    graph.replay()
    right, right_counts = grouped.grouped_experts(x_new, ids_new, weights_new, up, down, Activation())
    assert torch.equal(out, right) and torch.equal(counts, right_counts)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_layers_run_on_the_triton_kernels_and_can_do_without(architecture, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    path = tiny.save(architecture, tmp_path / architecture)
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cuda"), path)
    (layer, *_) = load(blueprint, progress=False).layers
    assert layer.grouped is not None and layer.why_not_grouped == ""
    spec = layer.pool.spec
    for tokens in (1, 30):
        x = torch.randn(tokens, layer.pool.down_SDI.shape[1], device="cuda")
        ids = torch.rand(tokens, spec.num_experts, device="cuda").topk(spec.top_k).indices
        weights = torch.rand(tokens, spec.top_k, device="cuda")
        out, counts = layer.run_local(x, ids, weights)
        plain, plain_counts = layer._many_rows(x, ids, weights)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(counts, plain_counts)
    monkeypatch.setattr(device_experts, "why_no_triton", lambda: "triton is away")
    layer.resized()
    assert layer.grouped is None and layer.why_not_grouped == "triton is away"
