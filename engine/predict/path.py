"""The routing-path predictor: runs the path network before each step on the step's tokens, and once after it.

Before the step it says which experts each of the step's tokens will use in all layers, from the tokens' ids and from
the routing up to the step. For several tokens of a sequence (a prompt, draft tokens) that routing is the same old one:
nobody knows yet how the first of them is routed. After the step, when its routing is known, it says what comes next.

B: tokens of a step, L: layers, E: experts of a layer, K: experts per token, W: tokens that are looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from ..next_use import NextUse
from ..routing_history import History
from .base import Array, Floats, Predictor, Rows
from .path_network import KEPT, MOST_USES, WINDOW, PathNetwork, PathShape

CHUNK = 256
"""Rows of one evaluation."""


class PathState:
    """What is known of a sequence: its routing so far, and the last ids. `tokens` of it have run.

    `known` is what the network says to the routing, None until it is asked, and `next_LE` what it says of the next
    token without its id.
    """

    def __init__(self, shape: PathShape) -> None:
        self.history = History(shape.layers, shape.experts)
        self.ids: deque[int] = deque(maxlen=WINDOW - 1)
        self.tokens = 0
        self.known: tuple[torch.Tensor, torch.Tensor] | None = None
        self.next_LE: Floats | None = None


class PathPredictor(Predictor):
    """A network's word on the sequences that run; `network` may be one that does not look at tokens.

    With `next_use` the uses after a step are the mean of both predictions: they err differently, and the mean is better
    than each.
    """

    name = "path"
    ordered = True

    def __init__(self, network: PathNetwork, next_use: NextUse | None = None) -> None:
        self._network = network.eval()
        self._next_use = next_use
        self._shape = network.shape
        self._even = network.shape.top_k / network.shape.experts
        self._states: dict[str, PathState] = {}
        self._rows: list[Rows] = []
        self._routed: list[Array] = []
        self._upcoming_LE: Floats | None = None
        self._future_LE: Floats | None = None
        """Of a layer that is still to come in this step its uses by the step too."""
        self._rest_LE: Floats | None = None
        self._ended = False
        """The step's routing is known and `_future_LE` does not have it yet."""

    def begin_step(self, rows: Sequence[Rows]) -> None:
        self._rows = [row for row in rows if len(row.token_ids)]
        self._routed = []
        self._ended = False
        self._upcoming_LE = self._future_LE = self._rest_LE = None
        if not self._rows:
            return
        for row in self._rows:
            state = self._states.get(row.request_id)
            if state is None or state.tokens != row.start:  # new, preempted, or its last tokens were taken back
                if state is None or row.start == 0:
                    state = self._states[row.request_id] = PathState(self._shape)
                state.tokens = row.start
        inputs = [(self._states[row.request_id], row.token_ids) for row in self._rows]
        next_BLE, rest_BLE = self._evaluate(inputs)
        self._upcoming_LE = 1 - np.prod(1 - next_BLE, axis=0)
        last_S = np.cumsum([len(row.token_ids) for row in self._rows]) - 1
        self._rest_LE = rest_BLE[last_S].sum(0)
        self._future_LE = next_BLE[last_S].sum(0) + np.float32(KEPT) * self._rest_LE

    def routed(self, layer: int, ids_TK: Array) -> None:
        self._routed.append(ids_TK)
        if self._future_LE is not None and self._rest_LE is not None and not self._ended:
            self._future_LE[layer] = self._rest_LE[layer]

    def end_step(self) -> None:
        rows = self._rows
        if not rows:
            return
        self._ended = True
        whole = len(self._routed) == self._shape.layers
        if whole:
            most = max(row.first + len(row.token_ids) for row in rows)
            ids_TLK = np.full((most, self._shape.layers, self._shape.top_k), -1, dtype=np.int64)
            for layer, ids_TK in enumerate(self._routed):
                ids_TLK[:, layer, : ids_TK.shape[1]] = ids_TK[:most]
        for row in rows:
            state = self._states.get(row.request_id)
            if state is None:  # it ended within the step
                continue
            state.ids.extend(row.token_ids[-(WINDOW - 1) :])
            state.tokens += len(row.token_ids)
            state.known = state.next_LE = None
            for ids_LK in ids_TLK[row.first : row.first + len(row.token_ids)] if whole else ():
                state.history.observe(ids_LK)

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def upcoming(self, layer: int) -> Floats | None:
        return None if self._upcoming_LE is None else self._upcoming_LE[layer]

    def future(self) -> Floats | None:
        if self._ended:
            self._ended = False
            running = {row.request_id for row in self._rows} & self._states.keys()
            self._upcoming_LE = self._future_LE = None
            if running:
                states = [self._states[name] for name in sorted(running)]
                next_BLE, rest_BLE = self._evaluate([(state, (-1,)) for state in states])
                for state, next_LE in zip(states, next_BLE, strict=True):
                    state.next_LE = next_LE
                self._future_LE = (next_BLE + np.float32(KEPT) * rest_BLE).sum(0)
                if self._next_use is not None:
                    histories = [state.history for state in states]
                    self._future_LE = ((self._future_LE + self._next_use.predict(histories)) / 2).astype(np.float32)
        return self._future_LE

    def next_of(self, request_id: str) -> Floats | None:
        """Without the token's id, which is known first when its step begins. None for a sequence without tokens."""
        state = self._states.get(request_id)
        if state is None or not state.tokens:
            return None
        if state.next_LE is None:
            next_BLE, _ = self._evaluate([(state, (-1,))])
            state.next_LE = next_BLE[0]
        return state.next_LE

    def _evaluate(self, inputs: Sequence[tuple[PathState, Sequence[int]]]) -> tuple[Floats, Floats]:
        """[B, L, E] that each of the tokens uses an expert, and the discounted uses after it; -1 for an unknown id."""
        with torch.inference_mode():
            known = [state.known or self._known(state) for state, _ in inputs]
            x_SH, out_S2LE = (torch.cat(parts) for parts in zip(*known, strict=True))
            windows = []
            for state, ids in inputs:
                around = np.array([*[-1] * (WINDOW - 1 - len(state.ids)), *state.ids, *ids])
                windows.append(np.lib.stride_tricks.sliding_window_view(around, WINDOW)[:, ::-1])
            tokens_BW = torch.from_numpy(np.concatenate(windows))
            state_B = torch.from_numpy(np.repeat(np.arange(len(inputs)), [len(ids) for _, ids in inputs]))
            outs = []
            for first in range(0, len(state_B), CHUNK):
                of_B = state_B[first : first + CHUNK]
                outs.append(self._network.ahead(x_SH[of_B], out_S2LE[of_B], tokens_BW[first : first + CHUNK]).sigmoid())
            out_B2LE = torch.cat(outs).numpy()
        return out_B2LE[:, 0], out_B2LE[:, 1] * np.float32(MOST_USES)

    def _known(self, state: PathState) -> tuple[torch.Tensor, torch.Tensor]:
        none_LK = np.full((self._shape.layers, self._shape.top_k), -1)
        history = state.history
        last, previous = (none_LK if ids is None else ids for ids in (history.last_LK, history.previous_LK))
        parts = (last[None], previous[None], history.rate_roots(self._even)[None])
        last_1LK, previous_1LK, roots_1FLE = (torch.from_numpy(part) for part in parts)
        state.known = self._network.known(last_1LK, previous_1LK, roots_1FLE)
        return state.known
