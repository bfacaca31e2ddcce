"""Ranks with quantised experts: what moves between them are the quantised bytes, and the tokens stay the same."""

import pytest
import tiny
import torch
import world
from test_parity import prompts, reference
from test_quantised_experts import dequantised_copy
from test_ranks import run_ranks, shared_out, table_lists, turned

from moeyard.engine.config import EngineConfig
from moeyard.engine.experts import ExpertPool
from moeyard.engine.guests import Cutter, GuestRoom, run_guests
from moeyard.engine.loader import draw
from moeyard.engine.moe import MoELayer
from moeyard.kernels.quantised import FORMATS

EXPERTS, RANKS = 7, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("qwen") / "plain", num_experts=EXPERTS)


def pool_of(path, name):
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu", expert_dtype=name), path)
    reader = blueprint.weights.reader(blueprint.spec.experts[0])
    pool = ExpertPool(reader, 2, torch.device("cpu"))
    for slot, expert in enumerate((5, 3)):
        pool.fill(slot, expert)
    return pool, blueprint.model.get_submodule(reader.spec.module)


@pytest.mark.parametrize("name", FORMATS)
def test_a_guest_is_the_quantised_expert(path, name):
    pool, module = pool_of(path, name)
    layer = MoELayer(module, pool)
    cutter = layer.cutter
    plain = Cutter(pool_of(path, "auto")[0], layer.gate)
    assert cutter.most_parts == 1 < plain.most_parts  # its scales are of more columns than a part has
    packed = cutter.pack(1)
    assert packed.numel() == cutter.nbytes() < plain.nbytes() / 3
    room = GuestRoom(2 * cutter.nbytes(), cutter, torch.device("cpu"))
    room.whole(1, cutter.nbytes()).copy_(packed)
    guest = cutter.unpack(room.whole(1, cutter.nbytes()))
    x = torch.randn(5, pool.hidden, generator=torch.Generator().manual_seed(0))
    numbers, weights = torch.full((5, 1), 9), torch.full((5, 1), 0.5)
    found = run_guests(x, numbers, weights, {9: guest}, layer.gate)
    own, _ = layer.run_local(x, torch.ones(5, 1, dtype=torch.long), weights)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    assert (found != 0).any()


def test_a_slot_is_packed_with_its_scales(path):
    pool, _ = pool_of(path, "int4")
    packed = pool.pack(0)
    assert packed.nbytes == pool.reader.nbytes == pool.empty_pack().nbytes
    wanted = [tensor.clone() for tensor in pool.tensors(0)]
    pool.unpack(1, packed, 5)
    assert pool.contents == [5, 5]
    assert all(torch.equal(a, b) for a, b in zip(wanted, pool.tensors(1), strict=True))
    pool.grow(3)
    assert all(torch.equal(a, b) for a, b in zip(wanted, pool.tensors(1), strict=True))


def test_experts_move_as_quantised_bytes(path, tmp_path):
    one = world.World(RANKS)
    try:
        by_rank = shared_out(prompts(131, 4, longest=30, seed=6), RANKS)
        orders = [[(1, 1, table_lists(turned, EXPERTS, RANKS, 4))]] * RANKS
        options = {"expert_dtype": "int8", "balance": "native"}
        results = one.run(run_ranks, path, by_rank, 16, options, orders)
    finally:
        one.close()
    same = dequantised_copy(path, FORMATS["int8"], tmp_path / "same")
    texts = [prompt for mine in by_rank for prompt in mine]
    assert [tokens for out, _ in results for tokens in out] == reference(same, texts, 16)
    plain = pool_of(path, "auto")[0].reader.nbytes
    for _, facts in results:
        moved, expert = facts["history"][-1][0], facts["expert_bytes"]
        assert facts["tables"] == table_lists(turned, EXPERTS, RANKS, 4)
        assert expert < plain / 3
        assert moved > 0 and moved % expert == 0 and moved // expert >= 3 * 3  # layers, experts that changed places
