"""Who is in the group of ranks: evidence against actions on a simulated clock, and whole lives with random failures."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.messages import Beat, Broken, Fatal, Form, Joined, Ready, Shutdown, Stats, Store
from moeyard.launch import membership as module
from moeyard.launch.membership import (
    LAST_WORDS_S,
    Dead,
    Kill,
    Lost,
    Membership,
    Restart,
    Rouse,
    Say,
    Send,
    Serving,
    Welcome,
)

RANK_S, EXCHANGE_S, LOAD_S = 10.0, 60.0, 1000.0
READY = Ready(max_model_len=1, vocab_size=1, kv_tokens=1)


def beat(rank, step=17, layer=3, phase="wait"):
    return Beat(rank=rank, step=step, layer=layer, phase=phase, clock=0)


def broken(epoch=1, step=17, layer=3, error="closed", told=False):
    return Broken(epoch=epoch, step=step, layer=layer, phase="wait", error=error, told=told)


class Script:
    """A membership with a clock, and helpers to bring it somewhere."""

    def __init__(self, size, **options):
        limits = {"rank_timeout": RANK_S, "exchange_timeout": EXCHANGE_S, "load_timeout": LOAD_S}
        self.it = Membership(size, **limits | options)
        self.now = 0.0

    def __getattr__(self, name):
        """`script.ended(1, "how")`: evidence at the clock's time."""
        return lambda *values: getattr(self.it, name)(*values, self.now)

    def after(self, seconds):
        self.now += seconds
        return self.it.tick(self.now)

    def says(self, messages):
        """Several ranks' messages; what they bring about."""
        return [action for rank, message in messages.items() for action in self.message(rank, message)]

    def enter(self, members, epoch):
        """The members make the group of `epoch`, for which the first has been asked; the actions of the last step."""
        forms = self.message(members[0], Store(epoch=epoch, address="host:1"))
        assert forms == [Send(rank, Form(epoch=epoch, members=list(members), address="host:1")) for rank in members]
        return self.says({rank: Joined(epoch=epoch) for rank in members})

    def serve(self):
        """From the start to serving."""
        ranks = tuple(range(len(self.it.members)))
        for rank in ranks:
            actions = self.hello(rank)
            assert actions[0] == Welcome(rank, again=False)
        if len(ranks) > 1:
            assert actions[1:] == [Send(0, Form(epoch=1, members=list(ranks)))]
            assert self.enter(ranks, 1) == []
        assert self.it.state == "loading"
        assert self.says(dict.fromkeys(ranks, READY)) == [Serving(())]
        assert self.it.state == "serving"
        if len(ranks) > 1:
            self.beats(ranks)
        return self

    def beats(self, ranks):
        return self.says({rank: beat(rank) for rank in ranks})

    def kill(self, rank, how="killed by SIGKILL"):
        """The process ends and its last words do not come."""
        assert self.ended({rank: how}) == []
        self.beats([r for r in self.it.members if r != rank])
        return self.after(LAST_WORDS_S)


def only(kind, actions):
    return [action for action in actions if isinstance(action, kind)]


def texts(actions):
    return [action.text for action in only(Say, actions)]


# Loading


def test_one_rank_has_no_group():
    script = Script(1)
    assert script.hello(0) == [Welcome(0, again=False)]
    assert script.message(0, READY) == [Serving(())]
    assert script.it.members == (0,) and script.it.trouble == "" and script.it.lost == {}


@pytest.mark.parametrize("size", [2, 3, 8])
def test_several_form_a_group_first(size):
    script = Script(size).serve()
    assert script.it.members == tuple(range(size)) and script.it.epoch == 1


@pytest.mark.parametrize(
    ("size", "evidence", "reason", "user"),
    [
        (1, [("ended", {0: "exit code 7"})], "the engine process ended (exit code 7)", False),
        (1, [("message", 0, Fatal(error="no luck"))], "the engine failed: no luck", False),
        (1, [("message", 0, Fatal(error="model: bad", user=True))], "model: bad", True),
        (1, [("unreachable", 0, "the connection is gone")], "the engine: the connection is gone", False),
        (1, [("reject", 0, "is version 2, the front end 1")], "the engine is version 2, the front end 1", False),
        (3, [("ended", {1: "exit code 7"})], "rank 1 was lost before it had loaded (exit code 7)", False),
        (3, [("ended", {1: "exit code 7"}), ("message", 1, Fatal(error="no luck"))], "rank 1 failed: no luck", False),
        (3, [("message", 2, broken()), ("ended", {1: "x"})], "rank 1 was lost before it had loaded (x)", False),
        (3, [("message", 2, broken()), ("message", 1, Fatal(error="bad", user=True))], "bad", True),
        (3, [("message", 2, broken())], "rank 2: the group broke at layer 3 of step 17: closed", False),
        (3, [("reject", 1, "is version 2, the front end 1")], "rank 1 is version 2, the front end 1", False),
        (3, [("hello", 3)], "rank 3 came, but the group has 3: give every node the same --ep", True),
        (3, [("hello", 1)], "rank 1 came twice: is the command running twice on its node?", True),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_what_goes_wrong_while_loading_is_the_end(size, evidence, reason, user, restart):
    script = Script(size, restart=restart)
    for rank in range(size):
        script.hello(rank)
    if size > 1:
        script.enter(tuple(range(size)), 1)
    actions = []
    for name, *values in evidence:
        actions += getattr(script, name)(*values)
    for _ in range(30):
        actions += script.after(0.1)
    assert only(Dead, actions) == [Dead(reason, user)]
    assert (script.it.state, script.it.dead_reason) == ("dead", reason)
    assert script.message(0, READY) == [] and script.after(1e6) == []


def test_missing_ranks_have_names():
    script = Script(3)
    script.hello(1)
    assert script.it.missing() == "ranks 0, 2 did not come"
    script.hello(0)
    script.hello(2)
    script.enter((0, 1, 2), 1)
    script.says({0: READY, 2: READY})
    assert script.it.missing() == "rank 1 did not load"


def test_silence_while_loading_is_not_a_stall():
    script = Script(2)
    script.hello(0)
    script.hello(1)
    script.beats([0, 1])
    assert script.after(10 * RANK_S) == [] and script.it.state == "loading"


# One rank


def test_a_single_rank_that_is_silent_or_ends_is_the_end():
    script = Script(1, rank_timeout=300.0).serve()
    assert script.after(299) == []
    script.message(0, Stats())
    assert script.after(299) == []
    assert script.after(1) == [Kill(0), Dead("the engine has not answered for 300 s")]
    script = Script(1).serve()
    assert script.kill(0) == [Dead("the engine process ended (killed by SIGKILL)")]


def test_a_single_rank_can_be_started_again():
    script = Script(1, restart=True).serve()
    actions = script.kill(0)
    assert only(Lost, actions) == [Lost(0)] and Restart(0) in actions and not only(Kill, actions)
    assert texts(actions) == ["rank 0 was lost (killed by SIGKILL); starting it again"]
    assert script.it.members == () and script.it.state == "recovering"
    assert script.hello(0) == [Welcome(0, again=True)]
    assert script.message(0, READY)[-1] == Serving((0,))
    assert script.it.members == (0,) and script.it.lost == {}


# The others go on


def test_a_lost_rank_is_replaced_by_the_others():
    script = Script(4).serve()
    actions = script.kill(2)
    line = "rank 2 was lost (killed by SIGKILL) at layer 3 of step 17"
    assert actions == [Rouse((0, 1, 3)), Lost(2), Say(f"{line}; recovering on ranks 0, 1, 3", bad=True)]
    assert script.it.state == "recovering" and script.it.members == (0, 1, 3)
    assert script.it.lost == {2: "killed by SIGKILL at layer 3 of step 17"}
    assert script.says({0: broken(), 3: broken()}) == []
    assert script.message(1, broken()) == [Send(0, Form(epoch=2, members=[0, 1, 3]))]
    script.now += 0.5
    assert script.enter((0, 1, 3), 2) == [Say(f"{line}; ranks 0, 1, 3 took over 0.5 s later"), Serving(())]
    assert script.it.state == "serving" and script.it.trouble.endswith("took over 0.5 s later")
    assert script.kill(0)[-1].text.endswith("recovering on ranks 1, 3")  # and another, in the epoch after
    script.message(1, broken(epoch=1))  # late, of an epoch that is over
    script.message(3, broken(epoch=2))
    assert script.message(1, broken(epoch=2)) == [Send(1, Form(epoch=3, members=[1, 3]))]


def test_the_last_one_still_forms_a_group():
    script = Script(2).serve()
    script.kill(0)
    assert script.message(1, broken()) == [Send(1, Form(epoch=2, members=[1]))]
    assert Serving(()) in script.enter((1,), 2)
    assert script.kill(1)[-1] == Dead("rank 1 was lost (killed by SIGKILL) at layer 3 of step 17; no rank is left")


def test_a_stalled_rank_is_killed():
    script = Script(3).serve()
    for _ in range(19):
        script.now += 0.5
        assert script.beats([0, 2]) == []
    script.now += 0.5
    actions = script.beats([0, 2])
    assert script.now == RANK_S and actions[0] == Kill(1)
    assert texts(actions)[0].startswith("rank 1 was lost (no sign of life for 10 s) at layer 3 of step 17;")
    assert script.ended({1: "killed by SIGKILL"}) == [] and script.after(1) == []  # that is no second loss
    assert "no sign of life" in script.it.lost[1]


def test_a_hung_rank_is_killed_after_its_own_waits():
    """It beats, but does not leave the group that broke for the others."""
    script = Script(3).serve()
    actions = script.says({0: broken(error="timed out"), 2: broken(error="timed out")})
    assert Rouse((1, 2)) in actions and not only(Kill, actions)
    script.beats([0, 1, 2])
    assert texts(script.after(1)) == [
        "the group of ranks 0, 1, 2 broke at layer 3 of step 17: timed out; looking for the rank that failed"
    ]
    killed_at = None
    while killed_at is None:
        script.beats([0, 1, 2])
        actions = script.after(0.5)
        assert script.now < 100
        killed_at = script.now if Kill(1) in actions else None
    assert EXCHANGE_S < killed_at <= EXCHANGE_S + RANK_S + 1
    assert script.after(0) == [Send(0, Form(epoch=2, members=[0, 2]))]


def test_last_words_say_more_than_an_exit_code():
    script = Script(2).serve()
    assert script.ended({1: "exit code 1"}) == []
    actions = script.message(1, Fatal(error="RuntimeError: no luck"))
    assert texts(actions) == ["rank 1 was lost (RuntimeError: no luck) at layer 3 of step 17; recovering on rank 0"]
    assert not only(Kill, actions)
    script = Script(2).serve()
    assert Kill(1) in script.message(1, Fatal(error="no luck"))  # it still runs


def test_an_exit_code_says_more_than_a_lost_connection():
    script = Script(2).serve()
    assert script.unreachable(1, "the connection is gone") == [] and not script.it.calm
    script.ended({1: "killed by SIGKILL"})
    assert "(killed by SIGKILL)" in texts(script.after(LAST_WORDS_S))[0]
    script = Script(2).serve()
    script.unreachable(1, "the connection is gone")
    actions = script.after(LAST_WORDS_S)
    assert Kill(1) in actions and "(the connection is gone)" in texts(actions)[0]


def test_two_at_once_are_one_line():
    script = Script(4).serve()
    script.ended({1: "killed by SIGKILL", 3: "exit code 1"})
    (line,) = texts(script.after(LAST_WORDS_S))
    assert "rank 1 was lost (killed" in line and "rank 3 was lost (exit code 1)" in line
    assert line.endswith("recovering on ranks 0, 2")


@pytest.mark.parametrize("moment", ["store", "join", "joined"])
def test_another_loss_while_forming_starts_over(moment):
    script = Script(4).serve()
    script.kill(3)
    assert script.says({r: broken() for r in (0, 1, 2)}) == [Send(0, Form(epoch=2, members=[0, 1, 2]))]
    inside = []
    if moment != "store":
        script.message(0, Store(epoch=2, address="host:1"))
        inside = [1, 2]
    if moment == "joined":
        script.message(1, Joined(epoch=2))
    actions = script.kill(0)
    assert Lost(0) in actions and only(Rouse, actions) == ([Rouse(tuple(inside))] if inside else [])
    for rank in inside:  # they entered, so that each must say that it left
        assert only(Send, actions) == []
        actions = script.message(rank, broken(epoch=2))
    assert Send(1, Form(epoch=3, members=[1, 2])) in actions
    assert script.message(0, Store(epoch=2, address="late")) == [Send(0, Shutdown())]
    assert Serving(()) in script.enter((1, 2), 3)
    assert script.it.trouble.count("was lost") == 2


def test_the_others_are_told_which_epoch_is_broken():
    script = Script(4)
    script.hello(0)
    assert script.it.broken == 0
    script = Script(4).serve()
    assert script.it.broken == 0
    script.ended({3: "killed by SIGKILL"})
    assert script.it.broken == 0  # who knows what it still says
    script.beats([0, 1, 2])
    script.after(LAST_WORDS_S)
    assert script.it.broken == 1
    script.says({r: broken(told=True) for r in (0, 1, 2)})
    assert script.it.epoch == 2 and script.it.broken == 1  # the next is being formed
    script.message(0, Store(epoch=2, address="host:1"))
    assert script.it.broken == 1
    script.kill(2)
    assert script.it.broken == 2
    script.says({r: broken(epoch=2, told=True) for r in (0, 1)})
    assert script.it.broken == 2
    assert Serving(()) in script.enter((0, 1), 3)
    assert script.it.broken == 0
    script.message(1, broken(epoch=3))  # the first word of trouble: the others need not wait for their own
    assert script.it.broken == 3


def test_who_was_told_does_not_say_why():
    script = Script(3).serve()
    script.message(1, broken(error="reset by peer"))
    script.says({r: broken(error="told", step=18, told=True) for r in (0, 2)})
    script.enter((0, 1, 2), 2)
    assert script.it.trouble.startswith("the group of ranks 0, 1, 2 broke at layer 3 of step 17: reset by peer;")
    script.kill(0)
    script.says({r: broken(epoch=2, error="told", told=True) for r in (1, 2)})
    script.enter((1, 2), 3)
    assert script.it.trouble.startswith("rank 0 was lost (killed by SIGKILL) at layer 3 of step 17; ")


def test_a_first_member_without_a_store_is_lost():
    script = Script(3).serve()
    script.kill(2)
    script.says({0: broken(), 1: broken()})
    while "no store" not in script.it.lost.get(0, ""):
        script.beats([0, 1])
        actions = script.after(1)
        assert script.now < 2 * EXCHANGE_S
    assert Kill(0) in actions and script.after(0) == [Send(1, Form(epoch=3, members=[1]))]


def test_a_member_that_does_not_join_is_lost():
    script = Script(3).serve()
    script.kill(2)
    script.says({0: broken(), 1: broken()})
    script.message(0, Store(epoch=2, address="a"))
    script.message(0, Joined(epoch=2))
    while not script.it.lost.get(1):
        script.beats([0, 1])
        actions = script.after(5)
        assert script.now < 2 * (LOAD_S + EXCHANGE_S)
    assert script.now >= LOAD_S + EXCHANGE_S and Kill(1) in actions


def test_a_group_that_breaks_with_nobody_lost_is_formed_again_but_not_for_ever():
    script = Script(2).serve()
    for epoch in itertools.count(1):
        actions = script.says({0: broken(epoch=epoch, error="net"), 1: broken(epoch=epoch, error="net")})
        if epoch == module.REFORMS + 1:
            break
        assert Send(0, Form(epoch=epoch + 1, members=[0, 1])) in actions
        assert Serving(()) in script.enter((0, 1), epoch + 1)
        assert "ranks 0, 1 serve again" in script.it.trouble
    (dead,) = only(Dead, actions)
    assert "broke 4 times in 60 s with no rank lost" in dead.reason and dead.reason.endswith(": net")
    script = Script(2).serve()
    for epoch in range(1, 20):  # now and then is no reason to give up
        script.beats([0, 1])
        script.says({rank: broken(epoch=epoch) for rank in (0, 1)})
        assert Serving(()) in script.enter((0, 1), epoch + 1)
        for _ in range(4):
            script.now += module.REFORMS_IN_S / 8
            script.beats([0, 1])


def test_an_epoch_that_never_comes_about_after_a_loss_is_bounded():
    script = Script(3).serve()
    script.kill(2)
    script.says({0: broken(), 1: broken()})
    for epoch in itertools.count(2):
        script.message(0, Store(epoch=epoch, address="a"))
        if script.it.state == "dead":
            break
        script.says({rank: broken(epoch=epoch, error="no route") for rank in (0, 1)})
        assert epoch < 10
    assert script.it.dead_reason.endswith("no route")


def test_a_zombie_is_told_to_end_once():
    script = Script(3).serve()
    script.unreachable(1, "the connection is gone")
    script.after(1)
    assert not script.it.speaks(1) and script.it.present == (0, 2)
    assert script.message(1, beat(1)) == [Send(1, Shutdown())]
    assert script.message(1, Joined(epoch=1)) == []
    assert script.hello(1) == [] and 1 in script.it.lost


def test_a_second_process_of_a_rank_costs_the_rank():
    script = Script(3).serve()
    actions = script.hello(1)
    assert actions[0] == Send(1, Shutdown()) and Kill(1) in actions and Lost(1) in actions
    assert texts(actions)[0] == "rank 1 came twice: is the command running twice on its node?"
    assert texts(script.hello(5)) == ["rank 5 came, but the group has 3: give every node the same --ep"]
    assert script.it.state == "recovering"


@pytest.mark.parametrize(
    ("last", "peer", "where"),
    [
        (beat(1, 0, -1, ""), None, "before its first step"),
        (beat(1, 5, -1, ""), None, "after step 5"),
        (beat(1, 5, -1, "plan"), None, "in step 5"),
        (beat(1, 5, 0), None, "at layer 0 of step 5"),
        (beat(1, 5, 2), broken(step=5, layer=4), "at layer 4 of step 5"),  # a peer saw it later
        (beat(1, 5, 2), broken(step=4, layer=4), "at layer 2 of step 5"),
    ],
)
def test_where_a_rank_was(last, peer, where):
    script = Script(2).serve()
    script.message(1, last)
    if peer is not None:
        script.message(0, peer)
    script.kill(1)
    assert script.it.lost[1] == f"killed by SIGKILL {where}"
    assert script.it.trouble.startswith(f"rank 1 was lost (killed by SIGKILL) {where};")


# Started again


def test_a_lost_rank_is_started_again():
    script = Script(3, restart=True).serve()
    actions = script.kill(0)
    assert actions[:3] == [Rouse((1, 2)), Lost(0), Restart(0)] and texts(actions)[0].endswith("starting it again")
    script.says({1: broken(), 2: broken()})
    script.beats([1, 2])
    assert script.hello(0) == [Welcome(0, again=True), Send(0, Form(epoch=2, members=[0, 1, 2]))]
    assert script.enter((0, 1, 2), 2) == []  # it still loads
    assert script.it.state == "recovering" and script.it.members == (1, 2)
    actions = script.message(0, READY)
    assert actions[-1] == Serving((0,)) and "ranks 0, 1, 2 serve again" in script.it.trouble
    assert script.it.members == (0, 1, 2) and script.it.lost == {}


def test_a_stalled_rank_is_started_again_when_it_is_gone():
    script = Script(2, restart=True).serve()
    for _ in range(25):
        script.now += 0.5
        actions = script.beats([0])
        if actions:
            break
    assert Kill(1) in actions and not only(Restart, actions)
    assert Restart(1) in script.ended({1: "killed by SIGKILL"})
    assert not only(Lost, script.after(1))


def test_restarts_are_counted():
    script = Script(2, restart=True).serve()
    for number in range(1, module.RESTARTS + 2):
        script.beats([0, 1])
        actions = script.kill(1)
        if number > module.RESTARTS:
            break
        assert Restart(1) in actions
        script.message(0, broken(epoch=script.it.epoch))
        script.hello(1)
        script.enter((0, 1), number + 1)
        assert Serving((1,)) in script.message(1, READY)
    (dead,) = only(Dead, actions)
    assert dead.reason.endswith(": 4 times in 10 minutes") and "rank 1 was lost" in dead.reason


def test_a_rank_that_fails_again_while_it_loads_is_lost_once_for_its_requests():
    script = Script(2, restart=True).serve()
    script.kill(1)
    script.message(0, broken())
    script.hello(1)
    script.message(0, Store(epoch=2, address="a"))
    script.message(1, Joined(epoch=2))
    script.ended({1: "exit code 1"})
    script.message(0, beat(0))
    actions = script.after(LAST_WORDS_S)
    assert Restart(1) in actions and not only(Lost, actions)
    assert "was lost again (exit code 1)" in texts(actions)[0]
    script.message(0, broken(epoch=2))
    assert Send(0, Form(epoch=3, members=[0, 1])) in script.hello(1)


def test_a_rank_that_loads_while_another_is_lost_is_not_lost_itself():
    """It leaves and loads again, which counts as no restart."""
    script = Script(3, restart=True).serve()
    script.kill(1)
    script.says({0: broken(), 2: broken()})
    script.hello(1)
    script.enter((0, 1, 2), 2)
    assert Restart(0) in script.kill(0)
    actions = script.says({1: broken(epoch=2, told=True), 2: broken(epoch=2, told=True)})
    assert not only(Restart, actions) and not only(Kill, actions)
    assert len(script.it._restarts[1]) == 1 and set(script.it.lost) == {0, 1}
    assert Send(0, Form(epoch=3, members=[0, 1, 2])) in script.hello(0)
    script.enter((0, 1, 2), 3)
    assert script.says({0: READY, 1: READY})[-1] == Serving((0, 1))


def test_a_process_that_never_comes_back_is_killed_and_counted():
    script = Script(2, restart=True).serve()
    script.kill(1)
    script.message(0, broken())
    actions = []
    while not actions:
        script.beats([0])
        actions = script.after(5)
        assert script.now < 2 * LOAD_S
    assert Kill(1) in actions and "did not come within" in texts(actions)[0]
    script = Script(2, restart=True).serve()
    script.message(0, broken())
    script.message(1, Fatal(error="no luck"))
    while script.it.state != "dead":  # killed, but the system does not let it go
        script.beats([0])
        script.after(5)
        assert script.now < 2 * LOAD_S
    assert "cannot be ended" in script.it.dead_reason


# Whole lives


class World:
    """Ranks that keep the protocol, and fail: the simulated other side of a Membership."""

    def __init__(self, size, restart, seed):
        self.random = random.Random(seed)
        self.it = Membership(
            size, rank_timeout=RANK_S, exchange_timeout=EXCHANGE_S, load_timeout=LOAD_S, restart=restart
        )
        self.now = 0.0
        self.alive = dict.fromkeys(range(size), True)
        self.mute = dict.fromkeys(range(size), False)  # stopped
        self.hung = dict.fromkeys(range(size), False)  # beats, and does nothing else
        self.inside = dict.fromkeys(range(size), 0)  # epoch of the exchange it may wait in
        self.ready = dict.fromkeys(range(size), False)
        self.formed = {}  # epoch -> members
        self.events = Counter()
        self.inbox = []  # (time, rank, message) on its way to the front end
        for rank in range(size):
            self.inbox.append((self.random.random(), rank, "hello"))

    def later(self, rank, message, most=1.0):
        self.inbox.append((self.now + self.random.random() * most, rank, message))

    def take(self, actions):
        for action in actions:
            self.events[type(action)] += 1
            match action:
                case Welcome(rank) if len(self.alive) == 1:
                    self.later(rank, READY, 5.0)
                case Kill(rank):
                    self.alive[rank] = False
                case Restart(rank):
                    assert not self.alive[rank]
                    self.alive[rank], self.mute[rank], self.hung[rank] = True, False, False
                    self.inside[rank], self.ready[rank] = 0, False
                    self.inbox = [it for it in self.inbox if it[1] != rank]
                    self.later(rank, "hello")
                case Send(rank, Form() as form):
                    self.form(rank, form)
                case Lost(rank):
                    assert rank not in self.it.members
                case Serving() if len(self.alive) > 1:
                    assert list(self.it.members) == self.formed[self.it.epoch]

    def form(self, rank, form):
        assert form.epoch == self.it.epoch and rank in form.members
        assert rank not in self.it.lost or self.it._restart
        for member in form.members:  # nobody is asked while another may still wait in an older epoch
            assert self.inside[member] in (0, form.epoch) or not self.alive[member], (member, form)
        if not self.alive[rank] or self.hung[rank]:
            return
        if not form.address:
            self.later(rank, Store(epoch=form.epoch, address="a"))
            return
        self.formed[form.epoch] = form.members
        self.inside[rank] = form.epoch
        if not self.ready[rank]:
            self.ready[rank] = True
            self.later(rank, READY, 5.0)
        self.later(rank, Joined(epoch=form.epoch), 5.0)

    def fail(self, rank, kind):
        if not self.alive[rank]:
            return
        if kind == "die":
            self.alive[rank] = False
        elif kind == "stop":
            self.mute[rank] = True
        elif kind == "hang":
            self.hung[rank] = True
        elif kind == "fatal":
            self.later(rank, Fatal(error="no luck"))
        elif kind == "break":
            self.leave(rank)

    def leave(self, rank, told=False):
        epoch, self.inside[rank] = self.inside[rank], 0
        self.inbox = [it for it in self.inbox if it[1] != rank or not isinstance(it[2], Joined)]
        if epoch:
            self.later(rank, broken(epoch=epoch, told=told), 0.5)

    def step(self, seconds=0.25):
        self.now += seconds
        for rank, epoch in self.inside.items():  # an exchange breaks when a peer is gone or has left
            able = self.alive[rank] and not self.mute[rank] and not self.hung[rank]
            others = [other for other in self.formed.get(epoch, []) if other != rank]
            if able and epoch and any(not self.alive[r] or self.inside[r] != epoch for r in others):
                started = all(self.inside[r] == epoch for r in others if self.alive[r])
                if started or self.random.random() < 0.1:
                    self.leave(rank)
        for rank, epoch in self.inside.items():  # or when the front end says so
            able = self.alive[rank] and not self.mute[rank] and not self.hung[rank]
            if able and 0 < epoch <= self.it.broken and self.random.random() < 0.5:
                self.leave(rank, told=True)
        gone = {rank: "killed by SIGKILL" for rank, alive in self.alive.items() if not alive}
        self.take(self.it.ended(gone, self.now))
        for rank, alive in self.alive.items():
            if not alive:
                self.inbox = [it for it in self.inbox if it[1] != rank or isinstance(it[2], Fatal)]
            elif not self.mute[rank]:
                self.take(self.it.message(rank, beat(rank), self.now))
        due = [it for it in self.inbox if it[0] <= self.now and not self.mute[it[1]]]
        for it in sorted(due, key=lambda it: it[0]):
            if it in self.inbox:
                self.inbox.remove(it)
                _, rank, message = it
                hello = message == "hello"
                self.take(self.it.hello(rank, self.now) if hello else self.it.message(rank, message, self.now))
        self.take(self.it.tick(self.now))
        assert not set(self.it.members) & set(self.it.lost)


FAILURES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["die", "stop", "hang", "fatal", "break"]), st.floats(0.0, 40.0)),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.booleans(), FAILURES, st.integers(0, 1000))
def test_every_life_serves_again_or_ends(size, restart, failures, seed):
    """Whatever fails and when: within the bounds the group serves or is dead, with a reason."""
    world = World(size, restart, seed)
    while world.it.state == "loading":
        world.step()
        assert world.now < 60
    for rank, kind, wait in failures:
        if size == 1 and kind in ("hang", "break"):
            continue  # nobody would notice, and there is no group
        world.fail(rank % size, kind)
        end = world.now + wait
        while world.now < end:
            world.step()
    calm_since = None
    while calm_since is None or world.now - calm_since < 2 * RANK_S:
        world.step()
        busy = world.it.state == "recovering"
        calm_since = None if busy else calm_since or world.now
        assert world.now < 10 * (EXCHANGE_S + RANK_S) + len(failures) * 400, world.it.trouble
    assert world.it.state in ("serving", "dead")
    if world.it.state == "dead":
        assert world.it.dead_reason
    else:
        assert world.it.members
        assert restart <= (set(world.it.members) == set(range(size)))
        survivors = set(range(size)) - set(world.it.lost)
        assert survivors == set(world.it.members)
        assert all(world.alive[rank] for rank in world.it.members)
