"""The MoE layer: the experts function that transformers' models call after their own router has chosen.

T: tokens, K: experts per token, D: hidden size, E: experts, R: rows (token and expert pairs).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.expert_loop import expert_loop
from ..kernels.grouped_mm import grouped_mm
from ..scheduler.cost import NO_LIMIT
from .device_experts import device_experts
from .dispatch import LocalDispatcher
from .experts import ExpertPool
from .guests import Cutter
from .measure import few_rows_of
from .overlap import Overlap
from .own_experts import OwnExperts
from .parallel_layer import ParallelLayer
from .recorder import RoutingRecorder

if TYPE_CHECKING:
    from .offloaded_layer import OffloadedLayer

ROW_COUNTS = (4, 8, 16, 32, 64, 128, 256)
"""Rows per expert at which the compiled kernels for few rows are timed against the way for more."""
PANEL_ROW_COUNTS = (16, 64, 256, 768)
"""Rows per expert at which the compiled kernels for many rows are timed against one GEMM per expert."""
_TRIAL_S = 0.5
"""When so much time went into one count, larger ones are not tried, and the way found so far is taken for them."""
_LOSSES = 2
"""One after the other that end the search: a single one may be a busy moment."""
_TRIAL_EXPERTS = 4
_TRIAL_REPEATS = 3


class MoELayer:
    """One layer's experts: sends tokens to the ranks that have theirs, runs this rank's, combines.

    `counts_E` counts this rank's tokens for each expert. Without `parallel` all experts are here.
    """

    def __init__(self, module: nn.Module, pool: ExpertPool):
        self.pool = pool
        self.local = LocalDispatcher(pool.num_slots)
        gate: Any = module._apply_gate if pool.spec.has_gate else module.act_fn
        self.gate: Any = gate
        self.cutter = Cutter(pool, gate)
        self._few_rows = _few_rows_function(pool, self.gate)
        self._panel_rows = _panel_rows_function(pool, self.gate)
        self._compiled = self._few_rows is not None
        self.grouped, self.why_not_grouped = device_experts(pool, gate)
        """The Triton kernels, or on a GPU the reason why they do not run this layer's experts."""
        self.swiglu = self._compiled and pool.format is None and _plain_swiglu(pool, gate)
        # Mean rows per expert up to which the compiled kernels run; `calibrate` measures it.
        self.few_rows = 16
        # The same of the kernels that pack weights, from there on; PyTorch's GEMMs above it.
        self.panel_rows = 0
        self.counts_E = torch.zeros(pool.spec.num_experts, dtype=torch.long, device=pool.up_SND.device)
        self.parallel: ParallelLayer | None = None
        self.slot_E: torch.Tensor | None = None
        """Where each expert is when it is not in the slot of its number; -1 leaves out one that is not here."""
        self.overlap: Overlap | None = None
        self.offloaded: OffloadedLayer | None = None
        """Where the experts come from when memory holds a part of them only."""
        self.own: ExpertPool | OwnExperts = pool
        """This rank's row of the expert table: the pool itself, or with `offloaded` the experts that are read here."""

    def __call__(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The experts' weighted outputs [T, D] for the router's choice."""
        if self.parallel is None and self.slot_E is None and self.offloaded is None:
            out_TD, counts_E = self.run_local(x_TD, ids_TK, weights_TK)
            self.counts_E += counts_E
            return out_TD
        counts_E = self._count(ids_TK)
        self.counts_E += counts_E
        if self.offloaded is not None and not (self.parallel is None and self.slot_E is None):
            self.offloaded.routed(ids_TK, weights_TK)
        if self.parallel is not None:
            return self.parallel.run(self, x_TD, ids_TK, weights_TK)
        if self.overlap is not None:
            self.overlap.run()
        if self.slot_E is None:
            assert self.offloaded is not None
            return self.offloaded.run(x_TD, ids_TK, weights_TK, counts_E)
        slots_TK = self.slot_E[ids_TK.clamp_min(0)].masked_fill_(ids_TK < 0, -1)
        return self.run_own(x_TD, slots_TK, weights_TK)

    def _count(self, ids_TK: torch.Tensor) -> torch.Tensor:
        flat = ids_TK.reshape(-1)
        padded_E = self.counts_E.new_zeros(self.counts_E.shape[0] + 1)
        return padded_E.scatter_add_(0, flat + 1, torch.ones_like(flat))[1:]

    def run_own(
        self,
        x_RD: torch.Tensor,
        slots_RK: torch.Tensor,
        weights_RK: torch.Tensor,
        pairs: int | None = None,
        deadline: float = math.inf,
    ) -> torch.Tensor:
        """Weighted sums [R, D] over the slots of `own` that each row names, as of `run_local`.

        With `offloaded` it raises what that does, also when its experts are not all read by `deadline` (monotonic).
        """
        if self.offloaded is None:
            return self.run_local(x_RD, slots_RK, weights_RK, pairs)[0]
        assert isinstance(self.own, OwnExperts)
        ids_RK, slots = self.own.experts_in(slots_RK), self.own.num_slots
        return self.offloaded.run(x_RD, ids_RK, weights_RK, self._count(ids_RK), experts=slots, deadline=deadline)

    def run_local(
        self, x_RD: torch.Tensor, slots_RK: torch.Tensor, weights_RK: torch.Tensor, pairs: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sums [R, D] over the slots of this rank that each row names, and the rows of each slot; -1 adds
        nothing.

        `pairs` is the number of slots named, when it is known to be less than all.
        """
        if not x_RD.shape[0]:
            return x_RD.new_empty(0, x_RD.shape[1]), self.counts_E.new_zeros(self.pool.num_slots)
        if self.grouped is not None:
            return self.grouped(x_RD, slots_RK, weights_RK)
        pairs = slots_RK.numel() if pairs is None else pairs
        if self.takes_few_rows(pairs, self.pool.num_slots):
            return self._few_rows(x_RD, slots_RK, weights_RK)
        if self.takes_panels(pairs, self.pool.num_slots):
            return self._panel_rows(x_RD, slots_RK, weights_RK)
        return self._many_rows(x_RD, slots_RK, weights_RK)

    @property
    def compiled(self) -> bool:
        """Whether there are compiled kernels for this layer's rows."""
        return self._compiled

    def takes_few_rows(self, pairs: int, experts: int) -> bool:
        """Whether so many pairs of a row and one of `experts` are for the kernels for few rows."""
        return self._few_rows is not None and pairs <= self.few_rows * experts

    def takes_panels(self, pairs: int, experts: int) -> bool:
        """Whether so many pairs, too many for the kernels for few rows, are for those that pack weights."""
        return self._panel_rows is not None and pairs <= self.panel_rows * experts

    @property
    def panels_always(self) -> bool:
        """Whether those are the way for any number of rows beyond few."""
        return self._panel_rows is not None and self.panel_rows == NO_LIMIT

    def _many_rows(
        self, x_TD: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dispatch, one GEMM per expert or a grouped one, combine."""
        pool = self.pool
        if self._compiled:
            from ..kernels.grouped_linear import combine
            from ..kernels.sort_rows import sort_rows

            rows = sort_rows(slots_TK, pool.num_slots)
            y_RD = expert_loop(
                x_TD,
                rows.token_R,
                rows.counts_E,
                pool.up,
                pool.down,
                self.gate,
                pool.up_bias_SN,
                pool.down_bias_SD,
            )
            return combine(y_RD, rows.position_TK, weights_TK), rows.counts_E
        if x_TD.device.type == "cpu" or pool.format is not None:
            token_R, counts_S, state = self.local.route(slots_TK, weights_TK)
            y_RD = expert_loop(
                x_TD, token_R, counts_S, pool.up, pool.down, self.gate, pool.up_bias_SN, pool.down_bias_SD
            )
        else:
            rows_RD, counts_S, state = self.local.dispatch(x_TD, slots_TK, weights_TK)
            h_RI = self.gate(grouped_mm(rows_RD, pool.up_SND, counts_S, pool.up_bias_SN))
            y_RD = grouped_mm(h_RI, pool.down_SDI, counts_S, pool.down_bias_SD)
        return self.local.combine(y_RD, state), counts_S

    def resized(self) -> None:
        """The pool has other tensors now: what was bound to the old ones is made again."""
        self.local = LocalDispatcher(self.pool.num_slots)
        self._few_rows = _few_rows_function(self.pool, self.gate)
        self._panel_rows = _panel_rows_function(self.pool, self.gate)
        self.grouped, self.why_not_grouped = device_experts(self.pool, self.gate)

    def measure_few_rows(self) -> int:
        """The largest of `ROW_COUNTS` at which the compiled kernels for few rows are the fastest way, 0 if at none.

        Timed on a few of the layer's own experts: milliseconds for small experts, a fraction of a second for large
        ones.
        """
        if self._few_rows is None:
            return 0
        best, lost = 0, 0
        for rows in ROW_COUNTS:
            more = self._panel_rows if self.panel_rows >= rows and self._panel_rows is not None else self._many_rows
            few_s, more_s = self._time_ways(rows, self._few_rows, more)
            if few_s <= more_s:
                best, lost = rows, 0
            elif (lost := lost + 1) == _LOSSES:
                break
        return best

    def measure_panel_rows(self) -> int:
        """Rows per expert up to which the kernels that pack weights are faster than PyTorch's GEMMs here, `NO_LIMIT`
        where they always are, 0 at none. Timed in the same way.
        """
        if self._panel_rows is None:
            return 0
        best = 0
        for rows in PANEL_ROW_COUNTS:
            panel_s, plain_s = self._time_ways(rows, self._panel_rows, self._many_rows)
            if panel_s < plain_s:
                best = rows
            if (panel_s + plain_s) * _TRIAL_REPEATS > _TRIAL_S:
                return NO_LIMIT if best == rows else best
        return NO_LIMIT if best == PANEL_ROW_COUNTS[-1] else best

    def _time_ways(self, rows: int, *ways: Any) -> list[float]:
        """Least seconds of each way with so many rows for each of a few experts, in turns, with other experts each
        time: a step finds none of them in a cache, either.
        """
        slots = self.pool.num_slots
        experts = min(_TRIAL_EXPERTS, slots)
        x_TD = torch.randn(experts * rows, self.pool.hidden).to(self.pool.dtype)
        first_TK = torch.arange(experts).repeat(rows)[:, None]
        weights_TK = torch.ones_like(first_TK, dtype=x_TD.dtype)
        seconds: list[list[float]] = [[] for _ in ways]
        for turn in range(_TRIAL_REPEATS):
            for number, (way, times) in enumerate(zip(ways, seconds, strict=True)):
                ids_TK = (first_TK + (turn * len(ways) + number) * experts) % slots
                start = time.perf_counter()
                way(x_TD, ids_TK, weights_TK)
                times.append(time.perf_counter() - start)
        return [min(times) for times in seconds]


def calibrate(layers: Sequence[MoELayer], *, progress: bool = False) -> None:
    """Sets up to how many rows per expert each layer uses its compiled kernels: by the file of measured constants, so
    that two starts compute alike, or measured now, once for each shape of layer.
    """
    known: dict[tuple[Any, ...], tuple[int, int]] = {}
    for layer in layers:
        pool = layer.pool
        shape = (pool.up_SND.shape, pool.dtype, pool.format, pool.spec.has_bias, pool.spec.has_gate)
        if shape not in known:
            known[shape] = few_rows_of(layer, progress), layer.panel_rows
        layer.few_rows, layer.panel_rows = known[shape]


def _is_swiglu(gate: Any, width: int) -> bool:
    """Whether a gate is silu(first half) * second half, tried on numbers rather than read off its name."""
    scales = torch.tensor([1.0, 8.0, 100.0, 10000.0])[:, None]  # a clamp shows only on large numbers
    sample = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * scales
    first, second = sample.chunk(2, dim=-1)
    return torch.allclose(gate(sample), F.silu(first) * second, rtol=1e-5, atol=1e-6)


def _plain_swiglu(pool: ExpertPool, gate: Any) -> bool:
    return pool.spec.has_gate and not pool.spec.has_bias and _is_swiglu(gate, pool.up_SND.shape[1])


def _few_rows_function(pool: ExpertPool, gate: Any) -> Any:
    """A function of (x_TD, ids_TK, weights_TK) for few rows per expert, which gives (out_TD, counts_E), or None.

    One compiled call for the whole layer where the experts are plain SwiGLU, else compiled pieces around their own
    gate.
    """
    if pool.up_SND.device.type != "cpu" or pool.dtype not in (torch.float32, torch.bfloat16):
        return None
    if pool.format is not None:
        return _few_quantised_rows(pool, gate)
    from ..kernels.grouped_linear import combine, grouped_linear
    from ..kernels.small_experts import small_experts
    from ..kernels.sort_rows import sort_rows

    if _plain_swiglu(pool, gate):
        return lambda x_TD, ids_TK, weights_TK: small_experts(x_TD, ids_TK, weights_TK, pool.up_SND, pool.down_SDI)

    def pieces(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sort_rows(ids_TK, pool.num_slots)
        groups = (rows.starts, rows.experts_G)
        h_RI = gate(grouped_linear(x_TD, pool.up_SND, *groups, pool.up_bias_SN, rows.token_R))
        y_RD = grouped_linear(h_RI.contiguous(), pool.down_SDI, *groups, pool.down_bias_SD)
        return combine(y_RD, rows.position_TK, weights_TK), rows.counts_E

    return pieces


def _few_quantised_rows(pool: ExpertPool, gate: Any) -> Any:
    from ..kernels.grouped_linear import combine
    from ..kernels.quantised_linear import MOST_INPUTS, quantised_linear
    from ..kernels.sort_rows import sort_rows

    if max(pool.hidden, pool.width) > MOST_INPUTS:
        return None

    def pieces(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sort_rows(ids_TK, pool.num_slots)
        groups = (rows.starts, rows.experts_G)
        up: Any = pool.up
        down: Any = pool.down
        h_RI = gate(quantised_linear(x_TD, up, *groups, pool.up_bias_SN, rows.token_R))
        y_RD = quantised_linear(h_RI.contiguous(), down, *groups, pool.down_bias_SD)
        return combine(y_RD, rows.position_TK, weights_TK), rows.counts_E

    return pieces


def _panel_rows_function(pool: ExpertPool, gate: Any) -> Any:
    """The same for many rows per expert: weights are packed as they are used. None where they cannot be."""
    if pool.up_SND.device.type != "cpu" or pool.up_SND.dtype not in (torch.float32, torch.bfloat16):
        return None
    from ..kernels.grouped_linear import combine, grouped_gate_up_silu, grouped_linear
    from ..kernels.many_rows import MANY_ROWS, fits
    from ..kernels.sort_rows import sort_rows

    if not fits(pool.up_SND) or not fits(pool.down_SDI):
        return None
    swiglu = _plain_swiglu(pool, gate)

    def panels(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sort_rows(ids_TK, pool.num_slots)
        if swiglu:
            groups = (rows.starts, rows.experts_G)
            h_RI = grouped_gate_up_silu(x_TD, pool.up_SND, *groups, rows.token_R, way=MANY_ROWS)
            y_RD = grouped_linear(h_RI, pool.down_SDI, *groups, way=MANY_ROWS)
        else:
            y_RD = expert_loop(
                x_TD,
                rows.token_R,
                rows.counts_E,
                pool.up_SND,
                pool.down_SDI,
                gate,
                pool.up_bias_SN,
                pool.down_bias_SD,
                panels=True,
            )
        return combine(y_RD, rows.position_TK, weights_TK), rows.counts_E

    return panels


class MoEFunction:
    """The function registered with transformers: finds the layer of the module that calls."""

    def __init__(self) -> None:
        self._layers: dict[int, MoELayer] = {}
        self._numbers: dict[int, int] = {}
        self.recorder: RoutingRecorder | None = None
        """Is told what the router of each layer chose."""

    def add(self, module: nn.Module, layer: MoELayer) -> None:
        self._numbers[id(module)] = len(self._layers)
        self._layers[id(module)] = layer

    @property
    def layers(self) -> list[MoELayer]:
        return list(self._layers.values())

    def __call__(
        self, module: nn.Module, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        assert not kwargs, f"unknown arguments {list(kwargs)}"
        if self.recorder is not None:
            self.recorder(self._numbers[id(module)], ids_TK, weights_TK)
        return self._layers[id(module)](x_TD, ids_TK, weights_TK)
