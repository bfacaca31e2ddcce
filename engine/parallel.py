"""One engine's part in a group of ranks: steps in step, where the experts are, and going on without a lost rank.

Before each step the ranks tell each other, in one small exchange, how many tokens they have, whether they have any
work, and what they have seen of the front end's orders. From that every rank derives the same plan. A rank without
tokens takes part in the layers' exchanges with none; when no rank has work, none does anything.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import __version__
from ..scheduler import cost, placement
from ..scheduler.balance.baselines import PLANNERS, UNCAPPED, Planner
from ..scheduler.choices import DEGREES, DISPATCHERS, choose_step
from ..scheduler.row_budget import RowBudget
from ..scheduler.step_plan import StepPlan
from ..scheduler.table import EMPTY, ExpertTable
from .balance import BalanceFigures, Balancer
from .config import WITHOUT_GUESTS, EngineConfig, format_size, parse_size
from .decode_tables import DecodeTables
from .dispatch import PlanMismatch
from .group import RankGroup
from .guests import GuestRoom
from .memory import free_memory
from .messages import Placed
from .mover import Mover
from .parallel_layer import ParallelLayer, StepContext
from .predict.shared_forecast import SharedForecast
from .progress import Progress
from .row_format import RowFormat
from .step_reads import StepReads

if TYPE_CHECKING:
    from .moe import MoELayer

log = logging.getLogger("moeyard.parallel")


AUTO_GUESTS = 8


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank's place: its group, its place among this machine's ranks, and what the front end knows of the experts.

    `tables` are the rows of `Configure.tables`, `loads` of `Configure.loads`.
    """

    group: RankGroup
    local_rank: int
    local_ranks: int
    tables: Sequence[Any] | None = None
    loads: Sequence[Any] | None = None


def first_tables(config: EngineConfig, experts: Sequence[int], seat: Seat) -> list[ExpertTable]:
    """Where each layer's experts go at start. Raises ValueError for tables or loads of another shape."""
    size = seat.group.size
    if seat.tables is not None:
        tables = [ExpertTable.from_lists(count, rows) for count, rows in zip(experts, seat.tables, strict=True)]
        for table in tables:
            table.check(complete=False)
        return tables
    loads = seat.loads
    if loads is not None and [len(row) for row in loads] != list(experts):
        raise ValueError(
            f"placement: the recorded loads are of {[len(row) for row in loads]} experts per layer; the model has"
            f" {list(experts)}; give the file of this model, or another name for a new one"
        )
    if config.expert_placement == "replicated" and loads is None:
        raise ValueError(
            f"expert_placement replicated: {config.placement} has no recorded loads yet; start with linear, and with"
            " this next time"
        )
    made = []
    for layer, count in enumerate(experts):
        slots = placement.slots_needed(count, size, config.redundant_experts)
        if config.expert_placement == "replicated":
            assert loads is not None
            made.append(placement.replicated(loads[layer], size, slots))
        else:
            plan = placement.linear if config.expert_placement == "linear" else placement.round_robin
            made.append(plan(count, size, slots))
    return made


class Parallel:
    """The state that an engine shares with the other ranks' engines."""

    def __init__(self, config: EngineConfig, seat: Seat, layers: Sequence[MoELayer], tables: Sequence[ExpertTable]):
        self.group = seat.group
        self.progress: Progress = seat.group.progress
        self.awake = True
        self.reports: list[Any] = []
        """Messages for the front end, to be taken by the worker."""
        self._config = config
        self._seat = seat
        self._layers = list(layers)
        self._mover = Mover([layer.own for layer in layers], tables, parse_size(config.move_bytes, "move_bytes"))
        offloaded = layers[0].offloaded
        self._offloaded = offloaded is not None
        forecast = offloaded.forecast if offloaded is not None else None
        self._forecast = forecast if isinstance(forecast, SharedForecast) else None
        self._wake = 0
        self._version = self._aimed = 0
        self._goals: dict[int, list[ExpertTable]] = {}
        self._last_digest = 0
        self._closed_bytes = 0
        self.steps = dict.fromkeys(DISPATCHERS, 0)
        self._context = StepContext(self.group, self._idle_plan())
        top = layers[0].pool.spec
        self._top_k = top.top_k
        self._experts = top.num_experts
        pool = layers[0].pool
        self._row_bytes = RowFormat(pool.hidden, self._top_k, pool.dtype).nbytes
        self._row_bytes_back = pool.hidden * pool.dtype.itemsize
        for layer, table in zip(layers, tables, strict=True):  # until `join`: for warming up
            layer.slot_E = torch.tensor(table.slot_of(self.group.position), device=pool.up_SND.device)
        self._choices: dict[tuple[tuple[int, ...], bool], StepPlan] = {}
        self.balancing = True
        """Whether layers may be balanced where that can pay; on all ranks alike."""
        self._planner = balance_planner(config)
        if self._offloaded and config.balance == "auto":  # its prices know nothing of reads
            self._planner = None
        self._room: GuestRoom | None = None
        self._balance = BalanceFigures()

    # What the front end orders

    def wake(self, number: int) -> None:
        self._wake = max(self._wake, number)
        self.awake = True

    def place(self, version: int, rows: Sequence[Any]) -> None:
        """Raises ValueError for tables that are not this model's."""
        tables = [ExpertTable.from_lists(now.experts, r) for now, r in zip(self._mover.tables, rows, strict=True)]
        for now, table in zip(self._mover.tables, tables, strict=True):
            table.check()
            if (table.ranks, table.slots) != (now.ranks, now.slots):
                raise ValueError(
                    f"tables: {table.ranks} ranks with {table.slots} slots were given; there are {now.ranks} with"
                    f" {now.slots}"
                )
        self._goals[version] = tables
        self._version = max(self._version, version)
        self.awake = True

    # Steps

    @torch.inference_mode()
    def agree(self, tokens: int, has_work: bool) -> StepPlan | None:
        """The plan of the next step; None when no rank has tokens. Moves experts, too, when there are some to move.

        Goes to sleep (`awake`) when nobody has work and all have seen the same orders.
        """
        self.progress.step += 1
        self.progress.layer = -1
        step = self.progress.step
        busy = has_work or self._mover.pending
        mine = [step, tokens, busy, self._wake, self._version, self._last_digest]
        forecast = self._forecast if self.group.size > 1 else None
        if forecast is not None:
            mine += forecast.say(-1).view(np.int64).tolist()
        rows = self.group.all_gather_ints(mine)
        if forecast is not None:
            forecast.hear(-1, np.array([row[6:] for row in rows], dtype=np.int64).view(np.uint8))
        self._check([row[0] for row in rows], "step")
        self._check([row[5] for row in rows], "plan")
        version = min(row[4] for row in rows)
        if version > self._aimed:
            self._aim(version)
            busy = True
        tokens_P = tuple(row[1] for row in rows)
        if not any(row[2] for row in rows) and not busy:
            self.awake = len({(row[3], row[4]) for row in rows}) > 1
            return None
        if self._mover.pending:
            self._move()
        if not any(tokens_P):
            return None
        plan = self._choose(tokens_P)
        plan = dataclasses.replace(plan, step=step, table_digest=self._table_digest ^ self._advance_tables(plan))
        self.steps[plan.dispatcher] += 1
        self._last_digest = plan.digest
        self._context.plan = plan
        if self._context.balancer is not None:
            self._context.balancer.begin(-1, plan)
        return plan

    def _advance_tables(self, plan: StepPlan) -> int:
        """The tables of steps that are not balanced, as they are for this step; their digest."""
        balancer = self._context.balancer
        if balancer is None or balancer.tables is None:
            return 0
        if self.balancing:
            balancer.tables.advance(plan)
        else:
            balancer.tables.clear()
        return balancer.tables.digest

    def take_part(self) -> None:
        """The layers of a step in which this rank has no tokens: its experts compute the others'."""
        for layer in self._layers:
            pool = layer.pool
            device = pool.up_SND.device
            layer(
                torch.empty(0, pool.hidden, dtype=pool.dtype, device=device),
                torch.empty(0, pool.spec.top_k, dtype=torch.long, device=device),
                torch.empty(0, pool.spec.top_k, device=device),
            )

    def settle_reads(self) -> None:
        """After the layers of a step, on every rank: raises ReadFailed when experts could not be read on any."""
        if self._context.reads is not None and self.group.size > 1:
            if self._forecast is None:
                self._context.reads.settle()
            else:
                self._context.reads.settle(self._forecast.tally(), self._forecast.settle)

    def _check(self, values: Sequence[int], what: str) -> None:
        if len(set(values)) > 1:
            by_rank = ", ".join(f"rank {r}: {v}" for r, v in zip(self.group.members, values, strict=True))
            raise PlanMismatch(f"the ranks are not at the same {what} ({by_rank}); that is a defect, please report it")

    def _choose(self, tokens_P: tuple[int, ...]) -> StepPlan:
        """Dispatcher and degree (0 lets each layer choose from its exact counts), and whether layers are balanced."""
        key = (tokens_P, self.balancing)
        if key not in self._choices:
            self._choices[key] = self._make_choice(tokens_P)
            if len(self._choices) > 4096:
                self._choices.pop(next(iter(self._choices)))
        return self._choices[key]

    def _make_choice(self, tokens_P: tuple[int, ...]) -> StepPlan:
        config, constants, balancer = self._config, self._context.constants, self._context.balancer
        forced = None if config.chunks == "auto" else int(config.chunks)
        if forced is None and self._offloaded:
            forced = 1  # an expert that does not stay would be read for each chunk again
        allowed = DISPATCHERS if config.dispatcher == "auto" else (config.dispatcher,)

        def choice(dispatcher: str, degree: int, balanced: bool = False) -> StepPlan:
            return StepPlan(
                step=0, tokens_P=tokens_P, dispatcher=dispatcher, degree=degree, table_digest=0, balanced=balanced
            )

        if constants is None:  # warming up
            return choice(allowed[-1], forced or 1)
        balanced = (
            self.balancing
            and balancer is not None
            and "all_to_all" in allowed
            and cost.balancing_can_pay(balancer.rates, sum(tokens_P) * self._top_k, self.group.size)
        )
        if balanced:
            allowed = ("all_to_all",)  # the other sends every token to every rank, wherever it is needed
        best = choose_step(
            constants,
            tokens_P,
            row_bytes=self._row_bytes,
            row_bytes_back=self._row_bytes_back,
            top_k=self._top_k,
            experts=self._experts,
            allowed=allowed,
            degrees=DEGREES if forced is None else (forced,),
        )
        budget = self._context.budget
        if best.dispatcher == "all_gather" and budget is not None:  # all-to-all sees to it by its exact counts
            best = dataclasses.replace(best, degree=max(best.degree, budget.least_even_degree(tokens_P)))
        open_degree = forced is None and best.dispatcher == "all_to_all" and (best.degree > 1 or balanced)
        return choice(best.dispatcher, 0 if open_degree else best.degree, balanced)

    # Where the experts are

    @property
    def tables(self) -> list[list[list[int]]]:
        return [table.to_lists() for table in self._mover.tables]

    @property
    def guest_bytes(self) -> int:
        """The room that is set aside for experts of other ranks."""
        return self._room.nbytes if self._room is not None else 0

    @property
    def moved_bytes(self) -> int:
        return self._mover.moved_bytes

    def _aim(self, version: int) -> None:
        self._aimed = version
        self._mover.aim(self._goals[version])
        self._goals = {v: goals for v, goals in self._goals.items() if v > version}

    def _move(self) -> None:
        before = self._mover.moved_bytes
        for layer in self._mover.step(self.group):
            self._use(layer)
        log.debug("moved %d bytes of experts", self._mover.moved_bytes - before)
        self._digest_tables()
        if not self._mover.pending and self.group.position == 0:
            self.reports.append(Placed(version=self._aimed, moved=self._mover.moved_bytes, tables=self.tables))

    def _use(self, index: int) -> None:
        """Lets a layer work by its table as it is now."""
        layer, table = self._layers[index], self._mover.tables[index]
        if self.group.size == 1:
            layer.parallel = None
            layer.slot_E = torch.tensor(table.slot_of(0), device=self.group.device)
        elif layer.parallel is None or layer.parallel.context is not self._context:
            layer.parallel = ParallelLayer(self._context, table, index, layer)
        else:
            layer.parallel.use(table)
        if self._forecast is not None and layer.parallel is not None:
            self._forecast.place(index, layer.parallel.dispatchers["all_to_all"].rank_PE == self.group.position)

    def _digest_tables(self) -> None:
        text = repr([table.digest() for table in self._mover.tables])
        self._table_digest = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")

    # Joining a group, the first or the next

    def join(self, group: RankGroup, timeout_s: float) -> None:
        """Takes this engine, with its experts loaded, into a group: all members call it.

        Finds out which experts are where, reads those that no member has (a rank was lost) from the checkpoint, and
        measures the new group. `timeout_s` bounds the wait for a member that still loads. Raises RankLost, or
        ValueError when a member has another build or checkpoint, MemoryError when the experts do not fit.
        """
        self._closed_bytes += self.group.sent_bytes if group is not self.group else 0
        self.group = group
        mover = self._mover
        group.put("ready", {"slots": [layer.own.num_slots for layer in self._layers], "step": self.progress.step})
        said = group.get_all("ready", timeout_s)
        slots_L = [max(s["slots"][index] for s in said) for index in range(len(self._layers))]
        self.progress.step = max(s["step"] for s in said)
        self.progress.layer = -1
        flat = [e for layer, n in zip(self._layers, slots_L, strict=True) for e in _padded(layer.own.contents, n)]
        rows_P = group.all_gather_ints(flat)
        found, start = [], 0
        for layer, slots in zip(self._layers, slots_L, strict=True):
            rows = [_without_repeats(row[start : start + slots]) for row in rows_P]
            found.append(ExpertTable.from_lists(layer.pool.spec.num_experts, rows))
            start += slots
        goals = [placement.repair(table) for table in found]
        self._make_room(goals)
        mover.tables = [table.with_slots(goal.slots) for table, goal in zip(found, goals, strict=True)]
        mover.aim(goals)
        mover.step(group, unlimited=True)
        # Reading takes as long as the disk does: waited for here, not in an exchange with its short limit.
        group.put("placed", 1)
        group.get_all("placed", timeout_s)
        self._goals.clear()
        self._version = self._aimed = self._last_digest = 0
        self._choices.clear()
        self._context = StepContext(group, self._idle_plan())
        self._context.reads = StepReads(group) if self._offloaded else None
        self._context.balancer = self._make_balancer()
        if self._forecast is not None:
            self._forecast.join(group.position, group.size)
        for index in range(len(self._layers)):
            self._use(index)
        if self._context.balancer is not None:
            self._context.balancer.tables = DecodeTables(self._context.balancer, self._top_k)
        self._digest_tables()
        self.awake = True

    def share_memory(self, free: float) -> None:
        """Tells the ranks how many bytes this one has left when weights and KV cache are there; every rank calls it.

        Half of that is for what a layer receives from the others: skew can slow a step down, but not take more. Raises
        ValueError when the largest steps could need more however they are cut.
        """
        if self.group.size == 1:
            return
        pool = self._layers[0].pool
        bytes_P = tuple(row[0] for row in self.group.all_gather_ints([int(free / 2)]))
        budget = RowBudget(
            bytes_P=bytes_P,
            # Each of two chunks on the way, and of their sums.
            row_bytes=2 * (self._row_bytes + self._row_bytes_back) + 16 * self._top_k,
            # Gathered, its intermediate vectors, its output; and where it is in the order of experts.
            pair_bytes=(2 * pool.hidden + pool.up_SND.shape[1] + pool.width) * pool.dtype.itemsize + 32,
            most_pairs=self._top_k,
        )
        budget.parts(self._config.max_batched_tokens)
        self._context.budget = budget
        if self._context.balancer is not None:
            self._context.balancer.most_rows_P = budget.most_pairs_P
        self._choices.clear()

    def measure(self) -> None:
        """Measures the group's exchanges and the experts; every rank calls it at the same time."""
        from .measure import measure, movable

        if self.group.size == 1:
            return
        context = self._context
        planner = partial(self._planner_trial, context.balancer) if context.balancer is not None else None
        show = self._config.progress and self._seat.local_rank == 0
        context.constants = measure(self.group, self._layers[0], planner=planner, progress=show)
        if context.balancer is not None:
            context.balancer.rates = cost.rates(
                context.constants,
                row_bytes=self._row_bytes,
                row_bytes_back=self._row_bytes_back,
                top_k=self._top_k,
                experts=self._experts,
                ranks=self.group.size,
                beside=self.group.device.type == "cuda",
            )
        # Every rank has watched its own layers; they move tokens only where all can.
        can_PL = self.group.all_gather_ints([movable(layer) for layer in self._layers])
        for layer, can_P in zip(self._layers, zip(*can_PL, strict=True), strict=True):
            assert layer.parallel is not None
            layer.parallel.moves_shared = all(can_P)
        self._choices.clear()

    def _planner_trial(self, balancer: Balancer) -> None:
        """A plan for a layer like these, of rows that are not even: for its time."""
        rows_PE = np.tile(np.arange(self._experts)[::-1] ** 2 + 1, (self.group.size, 1))
        balancer.trial(0, rows_PE)

    def _make_balancer(self) -> Balancer | None:
        from .measure import machine_number

        if self._planner is None or self.group.size == 1:
            return None
        if self._room is None:
            layer = max(self._layers, key=lambda layer: layer.cutter.nbytes())
            nbytes = guest_bytes(self._config, layer.cutter.nbytes(), layer.pool.num_slots)
            if self._offloaded:
                nbytes = 0  # their weights would have to be in memory at their homes
            self._room = GuestRoom(nbytes, layer.cutter, self.group.device)
        machines = [row[0] for row in self.group.all_gather_ints([machine_number()])]
        nodes = list(dict.fromkeys(machines))
        return Balancer(
            self.group,
            self._planner,
            self._room,
            node_P=[nodes.index(m) for m in machines],
            figures=self._balance,
            keep=self._config.balance not in UNCAPPED,
            early=self._planner is PLANNERS["priced"],
        )

    def _make_room(self, goals: Sequence[ExpertTable]) -> None:
        if self._offloaded:
            for layer, goal in zip(self._layers, goals, strict=True):
                layer.own.grow(max(goal.slots, layer.own.num_slots))
            return
        needed = sum(
            (goal.slots - layer.pool.num_slots) * layer.pool.reader.nbytes
            for layer, goal in zip(self._layers, goals, strict=True)
            if goal.slots > layer.pool.num_slots
        )
        if not needed:
            return
        # While a tensor grows there are two of it.
        needed += max(layer.pool.up_SND.nbytes for layer in self._layers)
        device = self.group.device
        free = free_memory(device) / (self._seat.local_ranks if device.type == "cpu" else 1)
        if needed > free:
            raise MemoryError(
                f"rank {self.group.rank} cannot take over experts of {format_size(needed)}: {format_size(free)} is free"
                f" on {device.type}; use more ranks, or --on-rank-loss restart"
            )
        for layer, goal in zip(self._layers, goals, strict=True):
            if goal.slots > layer.pool.num_slots:
                layer.pool.grow(goal.slots)
                layer.resized()

    def _idle_plan(self) -> StepPlan:
        dispatcher = "all_to_all" if self._config.dispatcher == "auto" else self._config.dispatcher
        return StepPlan(
            step=self.progress.step, tokens_P=(0,) * self.group.size, dispatcher=dispatcher, degree=1, table_digest=0
        )

    # Figures

    def figures(self) -> dict[str, int]:
        """The counters of `Stats` that are about several ranks."""
        dispatchers = [d for layer in self._layers if layer.parallel for d in layer.parallel.dispatchers.values()]
        return {
            "sent_rows": sum(d.sent_rows for d in dispatchers),
            "least_rows": sum(d.least_rows for d in dispatchers),
            "sent_bytes": self._closed_bytes + self.group.sent_bytes,
            "moved_bytes": self.moved_bytes,
            "steps_all_gather": self.steps["all_gather"],
            "steps_all_to_all": self.steps["all_to_all"],
            # All ranks make the same plans: one tells.
            **{f"balance_{k}": v for k, v in dataclasses.asdict(self._balance).items() if not self.group.position},
        }


def balance_planner(config: EngineConfig) -> Planner | None:
    """What the option names, `auto` being the priced one; None for none."""
    if config.balance == "native" or config.dispatcher == "all_gather":
        return None
    return PLANNERS["priced" if config.balance == "auto" else config.balance]


def guest_bytes(config: EngineConfig, expert: int, slots: int) -> int:
    """The room for guests: what the option says, or that of as many experts as a rank has, at most eight; none for
    planners that move no weights. Raises ValueError for room in which no expert fits.
    """
    if config.balance in WITHOUT_GUESTS:
        return 0
    if config.guest_memory is None:
        return min(slots, AUTO_GUESTS) * expert
    nbytes = parse_size(config.guest_memory, "guest_memory")
    if 0 < nbytes < expert:
        raise ValueError(
            f"guest_memory is {config.guest_memory}, and an expert of this model takes {format_size(expert)}; give as"
            " much, or 0 for no guests"
        )
    return nbytes


def check_alike(group: RankGroup, fingerprint: str, config: EngineConfig, timeout_s: float) -> None:
    """Raises ValueError naming the first rank that has another build, checkpoint or options than the first member."""
    options = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("model", "revision", "threads", "progress")
    }
    mine = {
        "moeyard": __version__,
        "torch": torch.__version__.partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "checkpoint": fingerprint,
        "options": repr(sorted(options.items())),
    }
    group.put("identity", mine)
    first, *others = group.get_all("identity", timeout_s)
    for rank, other in zip(group.members[1:], others, strict=True):
        for name, value in other.items():
            if value != first[name]:
                detail = (
                    "" if name in ("checkpoint", "options") else f" ({value}; rank {group.members[0]}: {first[name]})"
                )
                raise ValueError(
                    f"rank {rank} has another {name} than rank {group.members[0]}{detail}; all ranks need the same"
                )


def _padded(row: Sequence[int], length: int) -> list[int]:
    return [*row, *[EMPTY] * (length - len(row))]


def _without_repeats(row: Sequence[int]) -> list[int]:
    """A swap that broke off halfway can leave an expert twice on a rank: the second does not count."""
    seen: set[int] = set()
    return [EMPTY if expert in seen else (seen.add(expert) or expert) for expert in row]  # type: ignore[func-returns-value]
