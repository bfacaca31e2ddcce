"""Experts computed by the CPU where they are, in host memory, while the device computes others.

Their rows go over once and come back once. On one thread, layer after layer: its kernels use all cores.

T: tokens, D: hidden size, R: rows (token and expert pairs) of these experts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .expert_rows import few_rows, many_rows
from .host_experts import HostPool
from .store import ExpertLate

if TYPE_CHECKING:
    from .moe import MoELayer

_POLL_S = 20e-6
"""Between two looks at whether rows have come from a GPU, whose own wait has no bound."""


class CpuExpertsFailed(RuntimeError):
    """Experts that the CPU was to compute raised an error."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the CPU computes with: tokens, the token of each row, where each expert's rows start, and the event after
    which that is there.
    """

    what: str
    x_TD: torch.Tensor
    token_R: torch.Tensor
    starts: Sequence[int]
    slots: Sequence[int]
    sent: torch.cuda.Event | None


class Job:
    """Rows [R, D] that a thread computes."""

    def __init__(self, what: str, result: Future[torch.Tensor]) -> None:
        self._what, self._result = what, result

    @property
    def done(self) -> bool:
        return self._result.done()

    def wait(self, timeout_s: float) -> torch.Tensor:
        """The rows, in host memory. Raises ExpertLate after `timeout_s`, CpuExpertsFailed for the thread's errors."""
        try:
            return self._result.result(timeout_s)
        except futures.TimeoutError as error:
            raise ExpertLate(f"{self._what} were not computed by the CPU within {timeout_s:g} s") from error
        except ExpertLate:
            raise
        except Exception as error:
            raise CpuExpertsFailed(f"{self._what} could not be computed by the CPU: {error}") from error


class HostCompute:
    """Computes experts of `pool`'s slots; `layers` are the MoE layers over that pool, for what they compute."""

    def __init__(self, layers: Sequence[MoELayer], pool: HostPool, few_rows: int) -> None:
        self.few_rows = few_rows
        """Mean rows per expert up to which the compiled kernels are the faster way."""
        self.timeout_s = 60.0
        """How long the rows may take to come from the device."""
        self._layers = layers
        self._device = pool.device
        self._weights = [pool.weights(slot) for slot in range(pool.num_slots)]
        self._thread = ThreadPoolExecutor(1, "moeyard-cpu-experts", initializer=self._use_device)
        self._last: Future[None] | None = None

    def start(
        self,
        number: int,
        experts: Sequence[int],
        slots: Sequence[int],
        starts: Sequence[int],
        x_TD: torch.Tensor,
        token_R: torch.Tensor,
        few: bool | None = None,
    ) -> Job:
        """Begins with experts of MoE layer `number` that are in these slots: expert i has the rows starts[i] to
        starts[i + 1], of the tokens `token_R`. `few` says by which kernels, as they differ in the last bits; None: by
        the faster ones.
        """
        if few is None:
            few = starts[-1] <= self.few_rows * len(slots)
        few = few and self._layers[number].compiled
        what = f"experts {', '.join(map(str, sorted(experts)))} of MoE layer {number}"
        x_TD, token_R, sent = self._send(x_TD, token_R, starts[-1])
        rows = Rows(what=what, x_TD=x_TD, token_R=token_R, starts=starts, slots=slots, sent=sent)
        return Job(what, self._thread.submit(self._compute, self._layers[number], rows, few))

    def same_kernels(self, number: int, layer: MoELayer) -> None:
        """Takes for many rows of MoE layer `number` what `layer`, which runs on this CPU too, takes."""
        self._layers[number].panel_rows = layer.panel_rows

    def close(self, timeout_s: float) -> bool:
        """Ends the thread. False if what it computes did not end in time."""
        if self._last is None:
            self._last = self._thread.submit(lambda: None)
            self._thread.shutdown(wait=False)
        return bool(futures.wait([self._last], timeout_s).done)

    def _use_device(self) -> None:
        """A thread's own device is the first one, of which this rank may have no use."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _send(
        self, x_TD: torch.Tensor, token_R: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]:
        """The tokens' vectors on their way to host memory: all of them, or one for each row if that is less."""
        if x_TD.device.type == "cpu":
            return x_TD, token_R, None
        if x_TD.shape[0] > rows:
            x_TD, token_R = x_TD.index_select(0, token_R), torch.arange(rows, dtype=torch.int32)
        x_TD, token_R = _to_host(x_TD), _to_host(token_R.to(torch.int32))
        sent = torch.cuda.Event()
        sent.record()
        return x_TD, token_R, sent

    @torch.inference_mode()
    def _compute(self, layer: MoELayer, rows: Rows, few: bool) -> torch.Tensor:
        begun = time.monotonic()
        while rows.sent is not None and not rows.sent.query():
            if time.monotonic() - begun > self.timeout_s:
                raise ExpertLate(f"{rows.what}: their rows did not come from the device within {self.timeout_s:g} s")
            time.sleep(_POLL_S)
        compute = few_rows if few else many_rows
        shape, sent = (rows.starts[-1], rows.x_TD.shape[1]), rows.sent is not None
        y_RD = torch.empty(shape, dtype=rows.x_TD.dtype, pin_memory=sent)
        compute(layer, rows.x_TD, rows.token_R, rows.starts, [self._weights[slot] for slot in rows.slots], y_RD)
        return y_RD


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy under way in pinned memory, which PyTorch gives to nobody else before the copy is over."""
    if tensor.device.type == "cpu":
        return tensor
    room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return room.copy_(tensor, non_blocking=True)
