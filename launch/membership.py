"""Who is in the group of ranks: evidence goes in, actions come out, and time is a number that the caller passes.

A rank comes (`Hello`), is configured, joins the group of an epoch, loads, and serves. When a rank is lost the epoch is
broken: every other member is told (`Membership.broken`) and must leave it (`Broken`) or be ended, and then the next
epoch is formed, from those that are left or with the lost ones started again. Every wait here has a bound; what does
not keep it is ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.messages import Beat, Broken, Fatal, Form, Joined, Ready, Shutdown, Store

LAST_WORDS_S = 0.3
"""How long messages of a process that ended may still be on the way: they say more than an exit code."""
BLAME_S = 2.0
"""How long it may take to see which process ended, after another has said that the group broke."""
RESTARTS, RESTARTS_IN_S = 3, 600.0
"""How often one rank is started again, in how many seconds; a rank lost more often is not worth it."""
REFORMS, REFORMS_IN_S = 3, 60.0
"""How often the group is formed again although nobody was lost."""


# Actions


@dataclass(frozen=True)
class Welcome:
    """Send this rank its configuration, with the tables that `tables` says are current (a rank that comes again)."""

    rank: int
    again: bool


@dataclass(frozen=True)
class Send:
    rank: int
    message: Any


@dataclass(frozen=True)
class Rouse:
    """Make these ranks take part in an exchange, so that the idle ones notice too that the group is broken."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Kill:
    rank: int


@dataclass(frozen=True)
class Restart:
    rank: int


@dataclass(frozen=True)
class Lost:
    """This rank serves no more: what it worked on is for others."""

    rank: int


@dataclass(frozen=True)
class Serving:
    """The group serves; `back` are ranks that had been lost."""

    back: tuple[int, ...]


@dataclass(frozen=True)
class Say:
    """One line for the log. `bad`: something was lost."""

    text: str
    bad: bool = False


@dataclass(frozen=True)
class Dead:
    """The end: nothing can be served any more. `user` when the user's input is the reason."""

    reason: str
    user: bool = False


Action = Welcome | Send | Rouse | Kill | Restart | Lost | Serving | Say | Dead


@dataclass
class _Rank:
    """One process of a rank, from its start; a restart begins another."""

    since: float = 0.0  # when it was started, or, once it is over, given up
    here: bool = False  # said Hello
    entered: int = 0  # epoch that it was told to join and did not call broken: it may be waiting inside an exchange
    joined: int = 0  # epoch that it has joined
    ready: bool = False
    over: bool = False  # it was given up: what it still says counts for nothing
    told_off: bool = False  # and it was told so
    gone: bool = False  # its process has ended
    beat: Beat | None = None
    heard: float | None = None  # when it last gave a sign of life
    doom: tuple[float, str] | None = None  # when it will count as lost, and why, if nothing says it better before


@dataclass
class _Break:
    """What is known of the trouble between two epochs that serve."""

    since: float
    members: tuple[int, ...]
    losses: list[str] = field(default_factory=list)
    told: int = 0  # of `losses`
    broken: Broken | None = None  # the latest of a rank that found out by itself
    told_broken: bool = False
    opened_with: int = 0  # how many of `losses` were known when the group was last formed


class Membership:
    """The state of a group of `size` ranks. Methods take evidence and return what to do, in order.

    `epoch` is the last that was begun, `served` the last that came to serve. `state` is "loading", "serving",
    "recovering" or "dead"; `members` those that serve, or will go on to, in group
    order; `lost` says of the others why; `trouble` is the last trouble and how it ended, for people. `rank_timeout` is
    the longest silence of a rank, `exchange_timeout` the longest wait inside an exchange, `load_timeout` the longest
    loading, all in seconds. With `restart` lost ranks are started again, otherwise the others go on without them.
    """

    def __init__(
        self, size: int, *, rank_timeout: float, exchange_timeout: float, load_timeout: float, restart: bool = False
    ) -> None:
        assert size >= 1
        self.state = "loading"
        self.epoch = 0
        self.served = 0
        self.members = tuple(range(size))
        self.lost: dict[int, str] = {}
        self.trouble = ""
        self.dead_reason = ""
        self._grouped = size > 1
        self._rank_timeout = rank_timeout
        self._exchange_timeout = exchange_timeout
        self._load_timeout = load_timeout
        self._restart = restart
        self._ranks = {rank: _Rank() for rank in range(size)}
        self._phase = "gather"  # then "store", then "join"
        self._phase_since: float | None = None
        self._break: _Break | None = None
        self._blamed: tuple[float, str] | None = None  # while loading: when to give up, and what a rank said
        self._restarts: dict[int, deque[float]] = {rank: deque() for rank in range(size)}
        self._reforms: deque[float] = deque()
        self._actions: list[Action] = []

    # Evidence

    def hello(self, rank: int, now: float) -> list[Action]:
        """The process of a rank came. The caller has checked its version."""
        it = self._ranks.get(rank)
        if it is None:
            self._refuse(rank, f"rank {rank} came, but the group has {len(self._ranks)}: give every node the same --ep")
        elif it.over:
            return self.message(rank, None, now)
        elif it.here:
            self._refuse(rank, f"rank {rank} came twice: is the command running twice on its node?")
            if self.state != "dead":
                self._lose(rank, "another process took its place", now)
        else:
            it.here, it.heard = True, now
            self._act(Welcome(rank, again=rank in self.lost))
        return self._advance(now)

    def reject(self, rank: int, why: str, now: float) -> list[Action]:
        """A rank cannot work with the others: it `why`, for example "is version 1.2, the front end 1.3"."""
        self._act(Send(rank, Shutdown()))
        if self.state == "loading" or not self._grouped:
            self._die(f"rank {rank} {why}" if self._grouped else f"the engine {why}")
        elif rank in self._ranks:
            self._lose(rank, f"it {why}", now)
        return self._advance(now)

    def message(self, rank: int, message: Any, now: float) -> list[Action]:
        """Any other message of a rank; those that are not about membership are signs of life."""
        it = self._ranks.get(rank)
        if it is not None and it.over and not it.told_off:
            it.told_off = True
            return [Send(rank, Shutdown())]  # it was thought dead, and has been replaced
        if it is None or not it.here or self.state == "dead":
            return []
        it.heard = now
        match message:
            case Beat():
                it.beat = message
            case Store(epoch=self.epoch) if self._phase == "store" and rank == self._target()[0]:
                self._enter(message.address, now)
            case Joined(epoch=self.epoch):
                it.joined = self.epoch
            case Ready():
                it.ready = True
            case Broken(epoch=self.epoch):
                it.entered = it.joined = 0
                self._broke(rank, message, now)
            case Fatal():
                self._lose(rank, message.error, now, user=message.user, failed=True)
        return self._advance(now)

    def ended(self, how: Mapping[int, str], now: float) -> list[Action]:
        """These ranks' processes ended, and how. Saying it again is nothing.

        What is known at one time comes in one call: what follows may start a rank again, whose end is then old news.
        """
        for rank, words in how.items():
            it = self._ranks[rank]
            if not it.gone:
                it.gone = True
                if not it.over:
                    it.doom = (now + LAST_WORDS_S, words)
        return self._advance(now)

    def unreachable(self, rank: int, why: str, now: float) -> list[Action]:
        """A message to or from a rank was lost: it cannot go on, alive or not."""
        it = self._ranks[rank]
        if it.doom is None and not it.over:
            it.doom = (now + LAST_WORDS_S, why)
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        return self._advance(now)

    @property
    def calm(self) -> bool:
        """Whether nothing is about to happen, so that nobody has to look often."""
        return self.state != "recovering" and not any(it.doom for it in self._ranks.values())

    def speaks(self, rank: int) -> bool:
        """Whether what this rank says counts: it came, and was not given up since."""
        return rank in self._ranks and self._ranks[rank].here

    @property
    def broken(self) -> int:
        """The newest epoch that is broken and that a rank may still be in; 0 when there is none."""
        if self.state != "recovering":
            return 0
        return self.epoch if self._phase == "gather" else self.epoch - 1

    @property
    def alone(self) -> bool:
        """Whether the group is one rank, which needs no others and no heartbeat."""
        return not self._grouped

    @property
    def present(self) -> tuple[int, ...]:
        """The ranks that came and were not given up since."""
        return tuple(rank for rank in self._ranks if self.speaks(rank))

    def die(self, reason: str) -> list[Action]:
        """The caller cannot go on."""
        self._die(reason)
        actions, self._actions = self._actions, []
        return actions

    def missing(self) -> str:
        """Which ranks the start still waits for, and for what, for people."""
        absent = [rank for rank, it in self._ranks.items() if not it.here]
        if absent:
            return f"{ranks_text(absent)} did not come"
        loading = [rank for rank, it in self._ranks.items() if not it.ready]
        return f"{ranks_text(loading)} did not load"

    # Decisions

    def _act(self, *actions: Action) -> None:
        self._actions += actions

    def _target(self) -> tuple[int, ...]:
        """The ranks of the group to be formed, in order."""
        return tuple(self._ranks) if self._restart or self.state == "loading" else self.members

    def _advance(self, now: float) -> list[Action]:
        if self.state != "dead":
            self._settle_doom(now)
            self._watch_silence(now)
        if self.state in ("loading", "recovering"):
            self._restart_lost(now)
            self._form(now)
        self._tell(now)
        actions, self._actions = self._actions, []
        return actions

    def _settle_doom(self, now: float) -> None:
        for rank, it in self._ranks.items():
            if it.doom is not None and now >= it.doom[0]:
                why, it.doom = it.doom[1], None
                self._lose(rank, why, now)
        if self._blamed is not None and now >= self._blamed[0]:
            self._die(self._blamed[1])

    def _watch_silence(self, now: float) -> None:
        """Ranks that load are not watched: `load_timeout` bounds that, and a large import can silence a rank."""
        if self.state not in ("serving", "recovering"):
            return
        for rank, it in self._ranks.items():
            watched = it.ready and (it.beat is not None or not self._grouped)
            if watched and it.heard is not None and now - it.heard >= self._rank_timeout:
                self._lose(rank, f"no sign of life for {self._rank_timeout:g} s", now)

    def _refuse(self, rank: int, why: str) -> None:
        self._act(Send(rank, Shutdown()))
        if self.state == "loading":
            self._die(why, user=True)
        elif self.state != "dead":
            self._act(Say(why, bad=True))

    def _lose(self, rank: int, why: str, now: float, *, user: bool = False, failed: bool = False) -> None:
        """This rank's process is of no more use. What is left of it is ended."""
        it = self._ranks[rank]
        if self.state == "dead" or it.over:
            return
        if self.state == "loading":
            self._die(self._why_not_loaded(rank, why, user, failed), user)
            return
        again = rank in self.lost  # it was being started again
        where = self._where(rank)
        self._ranks[rank] = _Rank(since=now, over=True, gone=it.gone)
        if not it.gone:
            self._act(Kill(rank))
        if not self._grouped and not self._restart:
            self._die(self._why_alone(why, failed))
            return
        self._start_break(now)
        self._rouse()
        assert self._break is not None
        self.lost[rank] = f"{why} {where}".strip()
        self.members = tuple(member for member in self.members if member != rank)
        self._break.losses.append(f"rank {rank} was lost {'again ' * again}({why}){' ' * bool(where)}{where}")
        if not again:
            self._act(Lost(rank))
        if not self._restart and not self.members:
            self._die(f"{'; '.join(self._break.losses)}; no rank is left")

    def _why_not_loaded(self, rank: int, why: str, user: bool, failed: bool) -> str:
        if user:
            return why
        if not self._grouped:
            return self._why_alone(why, failed)
        return f"rank {rank} failed: {why}" if failed else f"rank {rank} was lost before it had loaded ({why})"

    def _why_alone(self, why: str, failed: bool) -> str:
        """The words for a group of one, where "rank 0" tells nobody anything."""
        if failed:
            return f"the engine failed: {why}"
        if why.startswith("no sign of life"):
            return f"the engine has not answered for {self._rank_timeout:g} s"
        return f"the engine process ended ({why})" if self._ranks[0].gone else f"the engine: {why}"

    def _broke(self, rank: int, message: Broken, now: float) -> None:
        if self.state == "loading":
            words = f"rank {rank}: the group broke {place(message)}: {message.error}"
            self._blamed = self._blamed or (now + BLAME_S, words)
            return
        entered_anew = self._phase != "gather"
        self._start_break(now)
        if entered_anew:
            self._rouse()
        assert self._break is not None
        if self._break.broken is None or not message.told:
            self._break.broken = message

    def _start_break(self, now: float) -> None:
        """The epoch is broken: back to waiting until everybody is out of it."""
        if self._break is None:
            self._break = _Break(since=now, members=self.members)
            self.state = "recovering"
        if self._phase != "gather":
            self._phase, self._phase_since = "gather", now

    def _rouse(self) -> None:
        if inside := tuple(rank for rank in self._target() if self._ranks[rank].entered):
            self._act(Rouse(inside))

    def _restart_lost(self, now: float) -> None:
        """Starts lost ranks again, once their processes are gone."""
        for rank in [rank for rank, it in self._ranks.items() if self._restart and it.over and it.gone]:
            times = self._restarts[rank]
            while times and now - times[0] > RESTARTS_IN_S:
                times.popleft()
            if len(times) >= RESTARTS:
                assert self._break is not None
                times_text = f"{len(times) + 1} times in {RESTARTS_IN_S / 60:g} minutes"
                self._die(f"{self._break.losses[-1]}: {times_text}")
                return
            times.append(now)
            self._ranks[rank] = _Rank(since=now)
            self._act(Restart(rank))

    def _form(self, now: float) -> None:
        """One step towards the next epoch, or the end of a wait that took too long."""
        if self.state == "dead":
            return
        if self._phase_since is None:
            self._phase_since = now
        waited = now - self._phase_since
        target = self._target()
        ranks = [self._ranks[rank] for rank in target]
        if self._phase == "gather":
            if all(it.here and not it.entered for it in ranks):
                self._open(target, now)
            else:
                self._end_late_leavers(waited, now)
        elif self._phase == "store" and waited >= self._exchange_timeout and self.state == "recovering":
            self._lose(target[0], f"it made no store within {self._exchange_timeout:g} s", now)
        elif self._phase == "join":
            if all((it.joined == self.epoch or not self._grouped) and it.ready for it in ranks):
                self._serve(now)
            elif self.state == "recovering" and waited >= (limit := self._exchange_timeout + self._load_timeout):
                for rank in target:
                    if self._ranks[rank].joined != self.epoch or not self._ranks[rank].ready:
                        self._lose(rank, f"it did not join within {limit:g} s", now)

    def _end_late_leavers(self, waited: float, now: float) -> None:
        if self.state != "recovering":
            return
        # A rank's own wait, of the same length, may have begun just before; it is to end first.
        limit = self._exchange_timeout + self._rank_timeout
        for rank in self._target():
            it = self._ranks[rank]
            if it.entered and waited >= limit:
                self._lose(rank, f"it did not leave the broken group within {limit:g} s", now)
            elif not it.here and now - it.since >= self._load_timeout:
                if it.over:
                    self._die(f"rank {rank} cannot be ended, nor started again: {self.lost[rank]}")
                else:
                    self._lose(rank, f"it did not come within {self._load_timeout:g} s", now)

    def _open(self, target: tuple[int, ...], now: float) -> None:
        """All are free: a new epoch begins with a store at the first rank."""
        if self._break is not None and len(self._break.losses) == self._break.opened_with:
            while self._reforms and now - self._reforms[0] > REFORMS_IN_S:
                self._reforms.popleft()
            if len(self._reforms) >= REFORMS:
                assert self._break.broken is not None
                broken = self._break.broken
                self._die(
                    f"the group of {ranks_text(target)} broke {len(self._reforms) + 1} times in {REFORMS_IN_S:g} s"
                    f" with no rank lost, the last time {place(broken)}: {broken.error}"
                )
                return
            self._reforms.append(now)
        if self._break is not None:
            self._break.opened_with = len(self._break.losses)
        self.epoch += 1
        self._phase_since = now
        if self._grouped:
            self._phase = "store"
            self._act(Send(target[0], Form(epoch=self.epoch, members=list(target))))
        else:
            self._phase = "join"

    def _enter(self, address: str, now: float) -> None:
        self._phase, self._phase_since = "join", now
        target = self._target()
        for rank in target:
            self._ranks[rank].entered = self.epoch
            self._act(Send(rank, Form(epoch=self.epoch, members=list(target), address=address)))

    def _serve(self, now: float) -> None:
        back = tuple(rank for rank in self._target() if rank in self.lost)
        self.members = self._target()
        for rank in back:
            del self.lost[rank]
        self.state, self.served = "serving", self.epoch
        self._blamed = None
        if self._break is not None:
            self._tell(now)
            names = ranks_text(self.members)
            took_over = "took over" if self._break.losses and not back else "serve again"
            if len(self.members) == 1 and took_over == "serve again":
                took_over = "serves again"
            self.trouble = f"{self._summary()}; {names} {took_over} {now - self._break.since:.1f} s later"
            self._act(Say(self.trouble))
            self._break = None
        self._act(Serving(back))

    def _die(self, reason: str, user: bool = False) -> None:
        if self.state == "dead":
            return
        self.state, self.dead_reason = "dead", reason
        self._act(Dead(reason, user))

    # Words

    def _tell(self, now: float) -> None:
        """The line about what was lost since the last one, as soon as there is something to say."""
        it = self._break
        if it is None or self.state != "recovering":
            return
        them = "it" if len(self.lost) == 1 else "them"
        how = f"starting {them} again" if self._restart else f"recovering on {ranks_text(self.members)}"
        if len(it.losses) > it.told:
            self._act(Say(f"{'; '.join(it.losses[it.told :])}; {how}", bad=True))
            it.told = len(it.losses)
        elif it.broken is not None and not it.losses and not it.told_broken and now - it.since >= LAST_WORDS_S:
            it.told_broken = True
            self._act(Say(f"{self._summary()}; looking for the rank that failed", bad=True))
        self.trouble = f"{self._summary()}; {how if it.losses else 'looking for the rank that failed'}"

    def _summary(self) -> str:
        assert self._break is not None
        if self._break.losses:
            return "; ".join(self._break.losses)
        broken = self._break.broken
        assert broken is not None
        return f"the group of {ranks_text(self._break.members)} broke {place(broken)}: {broken.error}"

    def _where(self, rank: int) -> str:
        """Where a rank was last known to be. A peer in the same exchange may know it better than the last beat."""
        if not self._grouped:
            return ""
        beat = self._ranks[rank].beat
        broken = None if self._break is None else self._break.broken
        if beat is None or (broken is not None and (broken.step, broken.layer) > (beat.step, beat.layer)):
            return "" if broken is None else place(broken)
        return place(beat)


def place(it: Beat | Broken) -> str:
    """Where in its work a rank is, for people."""
    if it.layer >= 0:
        return f"at layer {it.layer} of step {it.step}"
    if it.phase:
        return f"in step {it.step}"
    return f"after step {it.step}" if it.step else "before its first step"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 2`, `ranks 0, 1, 3`."""
    names = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(names) != 1)} {', '.join(names)}"
