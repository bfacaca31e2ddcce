"""A group that another thread aborts: whoever waits in it leaves it at once, and can be in the next one."""

import threading
import time
import types

import pytest
import torch
import world

from moeyard.engine import group as module
from moeyard.engine.config import EngineConfig
from moeyard.engine.group import RankGroup, RankLost, make_store
from moeyard.engine.messages import Broken, Configure, Form, Joined, Shutdown, Store
from moeyard.engine.progress import Progress
from moeyard.engine.seating import Seating
from moeyard.engine.worker import Rank

BOUND_S = 30.0  # less than the groups' own limit


def until(condition):
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def abort_when(group, condition):
    """Aborts from a thread of its own, twice."""

    def run():
        until(condition)
        time.sleep(0.1)  # into the wait
        group.abort()
        group.abort()

    threading.Thread(target=run, daemon=True).start()


def words_of(error):
    return error.told, error.phase, error.reason


EXCHANGES = {
    "counts": lambda group: group.all_gather_ints([1]),
    "all to all": lambda group: group.all_to_all(torch.ones(6, 2), [1, 2, 3], [1, 2, 3])[1].wait(),
    "point to point": lambda group: group.exchange_flat([], [(1, torch.empty(3))]),
    "key": lambda group: group.get_all("never", 60.0),
}


def leave_exchanges(group):
    """Rank 0 waits for the others, which do nothing, in one exchange after the other."""
    seen = []
    for name, exchange in EXCHANGES.items():
        if group.position == 0:
            abort_when(group, lambda group=group: group.progress.phase == "wait")
            with pytest.raises(RankLost) as caught:
                exchange(group)
            seen.append((name, words_of(caught.value)))
            with pytest.raises(RankLost, match="the front end said"):
                group.put("late", 1)
            group._store.set(f"left {name}", "")
        else:
            until(lambda name=name, group=group: group._store.check([f"left {name}"]))
            if name != "key":
                with pytest.raises(RankLost) as caught:
                    group.all_gather_ints([1])
                seen.append((name, words_of(caught.value)))
        group = world.next_group(group)
        assert group.all_gather_ints([group.position]) == [[0], [1], [2]]
    group.close()
    group.abort()  # too late, and nothing
    return seen


def form_with_an_absent_one(group, there):
    """Ranks 0 and 1 form a group with rank 2, which is there or not but connects to nobody."""
    if group.position == 0:
        store, address = make_store("127.0.0.1")
        group._store.set(f"address {there}", address)
    else:
        store, address = None, group._store.get(f"address {there}").decode()
    group.close()  # torch takes one at a time
    result = None
    if group.position < 2:
        entered = []
        with pytest.raises(RankLost) as caught:
            RankGroup(
                epoch=2,
                members=[0, 1, 2],
                rank=group.rank,
                address=address,
                device=group.device,
                timeout_s=60,
                progress=group.progress,
                store=store,
                on_begin=lambda new: abort_when(
                    entered.append(new) or new, lambda: group._store.check([f"go {there}"])
                ),
            )
        result = words_of(caught.value)
        entered[0].close()
    else:
        if there:
            module._reach_store(address, lambda: None).set("2/here/2", "1")
        time.sleep(0.5)
        group._store.set(f"go {there}", "")
    group.put(f"done {there}", 1)
    group.get_all(f"done {there}", BOUND_S)
    return result


@pytest.fixture(scope="module")
def ranks():
    made = world.World(3)
    yield made
    made.close()


def test_whoever_waits_leaves_at_once(ranks):
    told, *others = ranks.run(leave_exchanges)
    said = (True, "wait", "the front end said that the group is broken")
    assert told == [(name, said) for name in EXCHANGES]
    for other in others:  # nobody told them: they see that connections end
        assert [name for name, _ in other] == [name for name in EXCHANGES if name != "key"]
        assert not any(was_told for _, (was_told, _, _) in other)


@pytest.mark.parametrize("there", [False, True])
def test_a_group_that_is_being_formed(ranks, there):
    """Before the last one has come, and inside of torch's own wait for it."""
    *told, _ = ranks.run(form_with_an_absent_one, there)
    phase = "forming the group" if there else "wait"
    assert told == [(True, phase, "the front end said that the group is broken")] * 2


# NCCL, without it


class Calls(list):
    """Names of what was called, in order."""

    def named(self, name):
        return lambda *args, **kwargs: self.append(name)


@pytest.fixture
def nccl(monkeypatch):
    """A group of one on a GPU that is not there; what is called of torch."""
    calls = Calls()
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(module.dist, name, calls.named(name))
    monkeypatch.setattr(module.dist.distributed_c10d, "_abort_process_group", calls.named("abort all"))
    monkeypatch.setattr(module.torch.cuda, "synchronize", calls.named("synchronize"))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    store, address = make_store("127.0.0.1")
    it = RankGroup(
        epoch=1,
        members=[0],
        rank=0,
        address=address,
        device=torch.device("cuda", 0),
        timeout_s=5,
        progress=Progress(),
        store=store,
    )
    backend = types.SimpleNamespace(abort=calls.named("abort NCCL"))
    it._process_group = types.SimpleNamespace(_get_backend=lambda device: backend)
    assert calls == ["init_process_group", "new_group"]
    calls.clear()
    return it, calls, backend


def test_nccl_is_aborted_once(nccl):
    it, calls, _ = nccl
    it.settle()
    assert calls == ["synchronize"]
    it.abort()
    it.abort()
    it.close()
    it.close()
    it.abort()
    assert calls == ["synchronize", "abort NCCL", "destroy_process_group"]


def test_a_group_on_gpus_that_nobody_aborted_is_when_it_closes(nccl):
    it, calls, _ = nccl
    it.close()
    it.abort()
    assert calls == ["abort all"] and not it.aborted


@pytest.mark.parametrize(
    "call",
    [
        lambda it: it.settle(),
        lambda it: it.all_gather_ints([1]),
        lambda it: it.all_gather(torch.ones(1, 1)),
        lambda it: module.Pending(it, types.SimpleNamespace(wait=lambda: None)).wait(),
    ],
    ids=["settle", "counts", "start", "wait"],
)
def test_what_nccl_left_behind_is_not_believed(nccl, call):
    """There an exchange that was aborted may seem to have ended well."""
    it, _, _ = nccl
    it.abort()
    with pytest.raises(RankLost) as caught:
        call(it)
    assert caught.value.told


def test_an_exchange_that_is_aborted_meanwhile_is_not_believed(nccl):
    it, _, _ = nccl
    with pytest.raises(RankLost):
        module.Pending(it, types.SimpleNamespace(wait=it.abort)).wait()


def test_an_abort_that_fails_is_told_and_does_not_raise(nccl, caplog):
    it, _, backend = nccl

    def fail():
        raise RuntimeError("no luck")

    backend.abort = fail
    it.abort()
    assert it.aborted and "the group of epoch 1 was not aborted" in caplog.text


# Who is told, and when


class FakeConnection:
    """What the front end says, as a list; what it hears."""

    def __init__(self, *incoming):
        self.endpoint = "ipc://nowhere"
        self.incoming, self.sent, self.deferred = list(incoming), [], []

    def receive(self, timeout_s):
        return self.incoming.pop(0)

    def receive_new(self, timeout_s):
        return None

    def send(self, message):
        self.sent.append(message)

    def check(self):
        pass


class FakeGroup:
    """Joins at once. `at_begin` is run in the middle."""

    made = ()
    at_begin = staticmethod(lambda group: None)

    def __init__(self, *, epoch, on_begin, **options):
        self.epoch, self.aborts, self.closed = epoch, 0, False
        self.made.append(self)
        on_begin(self)
        self.at_begin(self)
        if self.aborts:
            raise RankLost(Progress(), RuntimeError("told"), told=True)

    def abort(self):
        self.aborts += 1

    def close(self):
        self.closed = True


@pytest.fixture
def seating(monkeypatch):
    monkeypatch.setattr("moeyard.engine.seating.RankGroup", FakeGroup)
    monkeypatch.setattr(FakeGroup, "made", [])

    def make(*incoming):
        return Seating(EngineConfig(ep=2, device="cpu"), Rank(), "127.0.0.1", FakeConnection(*incoming))

    return make


def form(epoch):
    return Form(epoch=epoch, members=[0, 1], address="127.0.0.1:1")


def test_only_a_group_that_is_broken_is_aborted(seating):
    it = seating()
    it.hear_broken(1)  # nothing there yet
    assert it.take(form(2)) is None
    (second,) = FakeGroup.made
    it.hear_broken(1)  # late
    assert second.aborts == 0
    it.hear_broken(2)
    it.hear_broken(2)
    assert second.aborts == 2 and not second.closed
    assert it.take(form(3)) is None
    assert second.closed and FakeGroup.made[-1].aborts == 0


@pytest.mark.parametrize("moment", ["before", "while"])
def test_news_that_overtake_the_way_in(seating, monkeypatch, moment):
    it = seating()
    if moment == "before":
        it.hear_broken(4)
    else:
        monkeypatch.setattr(FakeGroup, "at_begin", staticmethod(lambda group: it.hear_broken(group.epoch)))
    with pytest.raises(RankLost):
        it.take(form(4))
    assert it.group is None and FakeGroup.made[0].closed


def test_a_loss_while_this_rank_loads_is_not_its_failure(seating):
    it = seating(form(5), form(6))
    loads = []

    def load(config, seat):
        loads.append(seat.group.epoch)
        if len(loads) == 1:
            raise RankLost(it.progress, RuntimeError("Connection closed by peer"))
        return "engine"

    assert it.load(load, Configure(config={})) == "engine"
    assert loads == [5, 6] and [group.closed for group in FakeGroup.made] == [True, False]
    broken = Broken(epoch=5, step=0, layer=-1, phase="", error="Connection closed by peer")
    assert it._connection.sent == [Joined(epoch=5), broken, Joined(epoch=6)]


def test_the_first_member_makes_a_store_for_each_epoch(seating):
    it = seating(Form(epoch=7, members=[0, 1]), Shutdown())
    assert it.load(None, Configure(config={})) is None
    (said,) = it._connection.sent
    assert isinstance(said, Store) and said.epoch == 7 and list(it._stores) == [7]
