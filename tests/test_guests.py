"""Guests: column parts add up to the expert, whatever its activation; packing, room, relays."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeyard.engine.guests import Cutter, GuestRoom, run_guests, run_guests_on_all
from moeyard.engine.parallel import guest_bytes

D, WIDTH, SLOTS = 12, 10, 3


class Pool:
    """The tensors of an ExpertPool."""

    format = None

    def __init__(self, rows: int, bias: bool) -> None:
        self.up_SND, self.down_SDI = torch.randn(SLOTS, rows, D), torch.randn(SLOTS, D, WIDTH)
        self.up_bias_SN = torch.randn(SLOTS, rows) if bias else None
        self.down_bias_SD = torch.randn(SLOTS, D) if bias else None


def halves(x):
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def pairs(x):
    gate, up = x[..., ::2].clamp(max=7), x[..., 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def mixed(x):
    """An activation of the whole vector: no part gives its own columns."""
    return F.softmax(x, dim=-1)


WAYS = {"halves": (halves, 2 * WIDTH), "pairs": (pairs, 2 * WIDTH), "plain": (nn.GELU(), WIDTH)}


def expert(pool, slot, gate, x_RD):
    bias = (None, None) if pool.up_bias_SN is None else (pool.up_bias_SN[slot], pool.down_bias_SD[slot])
    return F.linear(gate(F.linear(x_RD, pool.up_SND[slot], bias[0])), pool.down_SDI[slot], bias[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, WIDTH])
@pytest.mark.parametrize("name", WAYS)
def test_parts_add_up_to_the_expert(name, parts, bias):
    gate, rows = WAYS[name]
    pool = Pool(rows, bias)
    cutter = Cutter(pool, gate)
    assert cutter.layout == name and cutter.most_parts == 8
    x_RD, weights = torch.randn(7, D), torch.rand(7, 1)
    number = torch.full((7, 1), 3)
    total = torch.zeros(7, D)
    for part in range(parts):
        packed = cutter.pack(1, part, parts)
        assert packed.numel() == cutter.nbytes(part, parts) <= cutter.nbytes() // parts + 64 * 8 + 8 * (D + rows)
        relayed = cutter.cut(cutter.pack(1), part, parts)
        assert torch.equal(relayed, packed) or torch.allclose(  # what is between the tensors may be anything
            cutter.unpack(relayed, part, parts).up_ND, cutter.unpack(packed, part, parts).up_ND
        )
        total += run_guests(x_RD, number, weights, {3: cutter.unpack(packed, part, parts)}, gate)
    torch.testing.assert_close(total, weights * expert(pool, 1, gate, x_RD), rtol=1e-4, atol=1e-4)


def test_other_rows_of_a_guest_need_not_be_finite():
    pool = Pool(WIDTH, False)
    cutter = Cutter(pool, nn.GELU())
    x_RD = torch.randn(2, D)
    x_RD[1] = torch.inf
    args = (torch.tensor([[0], [-1]]), torch.ones(2, 1), {0: cutter.unpack(cutter.pack(1))}, nn.GELU())
    assert torch.equal(run_guests_on_all(x_RD, *args)[1], torch.zeros(D))
    torch.testing.assert_close(run_guests_on_all(x_RD, *args)[0], run_guests(x_RD, *args)[0])


def test_an_activation_that_cannot_be_cut():
    cutter = Cutter(Pool(WIDTH, False), mixed)
    assert cutter.layout == "" and cutter.most_parts == 1


def test_rows_name_some_of_several_guests():
    gate, rows = WAYS["halves"]
    pool = Pool(rows, False)
    cutter = Cutter(pool, gate)
    guests = {9 - slot: cutter.unpack(cutter.pack(slot)) for slot in range(SLOTS)}  # any numbers, in any order
    x_RD = torch.randn(5, D)
    numbers = torch.tensor([[0, 2], [-1, 1], [2, -1], [-1, -1], [1, 0]])
    weights = torch.rand(5, 2)
    wanted = torch.zeros(5, D)
    for row in range(5):
        for choice in range(2):
            if (slot := int(numbers[row, choice])) >= 0:
                wanted[row] += weights[row, choice] * expert(pool, slot, gate, x_RD[row : row + 1])[0]
    named = torch.where(numbers < 0, -1, 9 - numbers)
    for run in (run_guests, run_guests_on_all):
        torch.testing.assert_close(run(x_RD, named, weights, guests, gate), wanted, rtol=1e-4, atol=1e-4)


def test_the_room_has_whole_slots_and_parts_behind_them():
    cutter = Cutter(Pool(WAYS["halves"][1], True), halves)
    expert = cutter.nbytes()
    room = GuestRoom(3 * expert + expert // 2, cutter, torch.device("cpu"))
    assert room.slots == 3
    for parts in (1, 3, 8):  # uneven parts fit too
        room.first_part(1)
        taken = [room.whole(0, expert)]
        taken += [room.part(cutter.nbytes(part, parts)) for _ in range(2) for part in range(parts)]
        for number, place in enumerate(taken):
            place.fill_(number)
        assert all(bool((place == number).all()) for number, place in enumerate(taken))
        assert room.slots_for(sum(place.numel() for place in taken[1:])) <= 2
    assert room.most_used >= 3 * expert
    with pytest.raises(AssertionError, match="do not fit"):
        for _ in range(20):
            room.part(expert)
    with pytest.raises(AssertionError, match="do not fit"):
        room.whole(3, expert)


def test_the_room_copies_an_expert_to_another_slot():
    pool = Pool(WAYS["pairs"][1], True)
    cutter = Cutter(pool, pairs)
    expert = cutter.nbytes()
    room = GuestRoom(3 * expert, cutter, torch.device("cpu"))
    for slot in range(3):
        room.whole(slot, expert).copy_(cutter.pack(slot))
    room.copy(2, 0)
    room.copy(1, 1)
    for slot, there in ((0, 2), (1, 1), (2, 2)):
        torch.testing.assert_close(cutter.unpack(room.whole(slot, expert)).up_ND, pool.up_SND[there])


def test_a_room_too_small_for_an_expert_is_refused():
    def room(text, balance="auto"):
        return guest_bytes(SimpleNamespace(guest_memory=text, balance=balance), 2048, slots=3)

    assert (room(None), room("0B"), room("2KiB"), room("1MiB")) == (3 * 2048, 0, 2048, 2**20)
    assert room(None, "metro") == 0  # moves no weights
    with pytest.raises(ValueError, match="guest_memory is 1KiB, and an expert"):
        room("1KiB")
