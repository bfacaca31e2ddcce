"""What is measured, when it is measured again, and that all ranks then hold the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch

from moeyard.engine import constants, measure
from moeyard.engine.config import EngineConfig
from moeyard.engine.loader import draw, load
from moeyard.engine.measure import pair_classes, rank_constants, time_experts
from moeyard.scheduler.cost import NO_EXPERTS, Constants


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    path = tiny.save("qwen3_moe", tmp_path_factory.mktemp("model"))
    blueprint = draw(EngineConfig(model=str(path), dtype="float32", device="cpu"), path)
    return load(blueprint, progress=False).layers[0]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "_ROWS_PER_EXPERT", (1, 16, 64))
    return tmp_path


class Done:
    def wait(self):
        pass


class FakeGroup:
    """The first of two ranks; `other` makes the second one's integers from the first one's."""

    size, position, device, sent_bytes = 2, 0, torch.device("cpu"), 7

    def __init__(self, other=lambda values: values):
        self.other = other
        self.collectives, self.weights = 0, []

    def all_gather_ints(self, values):
        return [list(map(int, values)), list(map(int, self.other(list(values))))]

    def all_gather_counts(self, counts_N):
        self.collectives += 1
        return counts_N[None].repeat(2, 1)

    def all_gather(self, rows):
        self.collectives += 1
        self.sent_bytes += rows.nbytes
        return rows, Done()

    def reduce_scatter(self, rows):
        return self.all_gather(rows)

    def all_to_all(self, rows, sends, receives):
        assert sends == receives == [len(rows) // 2] * 2
        return self.all_gather(rows)

    def exchange_flat(self, sends, receives):
        self.weights += [(target, len(tensor)) for target, tensor in sends]
        assert not receives


@pytest.mark.parametrize(
    ("machine_P", "near", "far", "together"),
    [
        ([1], [], [], 1),
        ([1, 1], [(0, 1)], [], 2),
        ([1, 1, 1], [(0, 1)], [], 3),
        ([5, 5, 5, 5], [(0, 1), (2, 3)], [], 4),
        ([1, 2], [], [(0, 1)], 1),
        ([1, 2, 1, 2], [(0, 2), (1, 3)], [(0, 1), (2, 3)], 2),
        ([1, 1, 2, 3, 3], [(0, 1), (3, 4)], [(0, 2)], 1),
        ([1, 2, 3, 4], [], [(0, 1), (2, 3)], 1),
    ],
)
def test_pairs_of_ranks(machine_P, near, far, together):
    assert pair_classes(machine_P) == [("near", near, 1), ("far", far, together)]


def test_times_of_experts_are_of_some_and_of_many_rows(layer):
    samples = time_experts(layer)
    assert {experts for experts, _, _ in samples} == {1, 4, 8}
    assert {rows // experts for experts, rows, _ in samples} == {1, 16, 64}
    assert all(ns > 0 for *_, ns in samples)
    assert layer.pool.num_slots == 8 and layer.pool.up_SND.shape[0] == 8


def test_a_part_of_a_layer_computes_as_the_layer_does(layer):
    x_RD, weights_RK = torch.randn(6, 48), torch.rand(6, 2)
    slots_RK = torch.tensor([[2, 4], [3, 2], [4, -1], [2, 3], [3, 3], [4, 2]])
    part = measure._some_of(layer, 2, 3)
    out, counts_S = part.run_local(x_RD, torch.where(slots_RK < 0, slots_RK, slots_RK - 2), weights_RK)
    wanted, wanted_S = layer.run_local(x_RD, slots_RK, weights_RK)
    assert torch.allclose(out, wanted) and counts_S.tolist() == wanted_S[2:5].tolist()


def test_moments_in_which_something_else_ran_do_not_count():
    quiet, busy = [[8, n] for n in (100, 101, 102)], [[8, 5000]] * 6
    assert measure.undisturbed([*busy, *quiet, [9, 7], [9, 6]]) == [[8, 102], [9, 6]]


def test_cases_that_would_take_too_long_are_left_out(layer, monkeypatch):
    monkeypatch.setattr(measure, "_EXPERTS_BUDGET_S", 0.0)
    assert len({tuple(case) for *case, _ in time_experts(layer)}) == 4


def test_a_rank_measures_once(layer, monkeypatch):
    layer = copy.copy(layer)
    first = rank_constants(layer)
    assert first.values.few_rows == layer.few_rows and first.samples["experts"]
    with monkeypatch.context() as patched:
        patched.setattr(measure, "time_experts", lambda *args: pytest.fail("there is a file"))
        assert rank_constants(layer).values == first.values
    monkeypatch.setattr(type(layer), "measure_few_rows", lambda self: 77)
    assert rank_constants(layer, force=True).values.few_rows == 77
    assert rank_constants(layer).values.few_rows == 77
    assert len(constants.find("rank")) == 1


def test_ranks_agree_on_the_worst(layer):
    def slower(values):
        return [2 * value for value in values] if len(values) == 19 else values

    alone, group = FakeGroup(), FakeGroup(slower)
    sent = group.sent_bytes
    agreed = measure.measure(group, layer)
    assert group.collectives and group.sent_bytes == sent
    (record,) = constants.find("group")
    assert record.values == agreed and (record.key["ranks"], record.key["machines"]) == (2, "2")
    # Both have that file now: nothing is measured, and still the worst counts.
    assert measure.measure(alone, layer) == agreed and not alone.collectives
    assert measure.measure(group, layer).to_list() == [2 * value for value in agreed.to_list()]


def test_one_rank_without_a_file_makes_all_measure(layer):
    measure.measure(FakeGroup(), layer)
    (before,) = constants.find("group")

    def no_file(values):
        return [0] if values == [True] else values

    group = FakeGroup(no_file)
    agreed = measure.measure(group, layer)
    (after,) = constants.find("group")
    assert group.collectives and agreed == after.values
    assert after.samples != before.samples


def test_one_rank_of_each_machine_writes(layer):
    group = FakeGroup()
    group.position = 1
    group.exchange_flat = lambda sends, receives: None
    measure.measure(group, layer)
    assert constants.find("group") == []


@pytest.mark.parametrize("machines", [1, 2])
def test_weights_are_sent_as_large_as_an_expert(layer, monkeypatch, machines):
    other = 12345 if machines == 2 else measure.machine_number()
    group = FakeGroup(lambda values: [other] if values == [measure.machine_number()] else values)
    monkeypatch.setattr(measure, "_SMALLEST_WEIGHTS", 2**12)
    agreed = measure.measure(group, layer)
    assert {target for target, _ in group.weights} == {1}
    assert max(size for _, size in group.weights) == layer.pool.reader.nbytes
    assert agreed.near == agreed.far  # there is one class of pairs
    assert constants.find("group")[0].key["machines"] == ("2" if machines == 1 else "1+1")


def test_the_planner_is_timed_once_it_is_given(layer):
    without = measure.measure(FakeGroup(), layer)
    plans = []
    agreed = measure.measure(FakeGroup(), layer, planner=lambda: plans.append(1))
    assert without.planner_ns == 0 < agreed.planner_ns and plans
    plans.clear()
    assert measure.measure(FakeGroup(), layer, planner=lambda: plans.append(1)) == agreed
    assert measure.measure(FakeGroup(), layer) == agreed and not plans


def test_constants_of_another_rank_are_checked(layer):
    group = FakeGroup(lambda values: values[:-1] if len(values) == 19 else values)
    with pytest.raises(ValueError, match="18 values, not 19"):
        measure.measure(group, layer)
    assert replace(Constants.from_list(range(19)), planner_ns=0).far.alpha_ns == 13


# Shared experts


class Shared:
    """What `overlap.Overlap` knows of shared experts."""

    def __init__(self, weights=640, enabled=True, row=(48, torch.float32)):
        self.weights, self.enabled, self.row, self.calls = weights, enabled, row, []

    def compute(self, x_1TD):
        self.calls.append(tuple(x_1TD.shape))
        return x_1TD * 2


def with_shared(layer, **changes):
    it = copy.copy(layer)
    it.overlap = Shared(**changes)
    return it


def test_shared_experts_are_measured_with_the_layers_own(layer):
    one = with_shared(layer)
    agreed = measure.measure(FakeGroup(), one)
    assert agreed.shared.ps_per_row + agreed.shared.base_ns + agreed.shared.per_expert_ns > 0
    assert set(one.overlap.calls) == {(1, tokens, 48) for tokens in (1, 16, 64)}
    (record,) = constants.find("group")
    assert record.key["shared"] == 640 and {row[0] for row in record.samples["shared"]} == {1}
    one.overlap.calls.clear()
    assert measure.measure(FakeGroup(), one) == agreed and not one.overlap.calls
    other = with_shared(layer, weights=1280)  # the same routed experts beside other shared ones
    measure.measure(FakeGroup(), other)
    assert other.overlap.calls and len(constants.find("group")) == 2


@pytest.mark.parametrize(
    "changes", [{"enabled": False}, {"row": (24, torch.float32)}, {"row": (48, torch.bfloat16)}, {"row": None}]
)
def test_shared_experts_that_cannot_be_computed_elsewhere_are_not(layer, changes):
    one = with_shared(layer, **changes)
    assert measure.measure(FakeGroup(), one).shared == NO_EXPERTS and not one.overlap.calls
    assert not measure.movable(one) and not measure.movable(layer) and measure.movable(with_shared(layer))
    assert constants.find("group")[0].key["shared"] == 0
