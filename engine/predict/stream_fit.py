"""Fits look-ahead's ridge on recorded streams: for each layer and depth in closed form, then truncated.

Of the texts to learn from some are kept back to choose the penalties and the rank; with these it is fitted on all. A
truncation keeps what the predicted scores vary most in (reduced-rank regression), so that with as many dimensions as
there are experts nothing is lost.

T: tokens, D: hidden size, E: experts of a layer, R: rank, S: texts, K: experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .base import Array
from .stream_ridge import DEPTH, Cell, StreamRidge
from .streams import Streams, rights

PENALTIES = (0.003, 0.03, 0.3, 3.0)
"""Of the mean square of a direction of the stream."""
RANKS = (4, 8, 16, 32, 64, 128)
KEPT_BACK = 5
"""One text of so many is kept back to choose."""
CHOOSING_ROWS = 4096
"""Of these at most."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Full:
    """One layer and depth, not truncated: `logit_DE` gives scores, of which directions `order_EE` matter most."""

    logit_DE: torch.Tensor
    order_EE: torch.Tensor
    back_ED: torch.Tensor
    x_D: torch.Tensor
    normed_D: torch.Tensor

    def cut(self, rank: int) -> Cell:
        down_DR = self.logit_DE @ self.order_EE[:, :rank]
        up_RD = self.order_EE[:, :rank].T @ self.back_ED
        bias_D = self.normed_D - self.x_D @ down_DR @ up_RD
        return Cell(down_DR=down_DR.contiguous(), up_RD=up_RD.contiguous(), bias_D=bias_D)


@torch.inference_mode()
def fit(
    streams: Streams,
    rows_T: Array,
    text_T: Array,
    topk_TLK: Array,
    *,
    digest: str = "",
    progress: Callable[[int], object] = lambda layers: None,
) -> tuple[StreamRidge, int]:
    """The ridge for all layers and depths, and its rank.

    Args:
        rows_T: of the streams to learn from; their texts `text_T`, at least two, and the experts that they used.
        progress: is told numbers of layers, in all twice the model's.
    """
    texts_S = np.unique(text_T)
    assert len(texts_S) >= 2, "some are kept back to choose"
    back_T = np.isin(text_T, texts_S[::KEPT_BACK])
    chosen = np.flatnonzero(back_T)
    chosen = chosen[:: -(-len(chosen) // CHOOSING_ROWS)]
    ranks = [rank for rank in RANKS if rank < 2 * max(streams.experts_L)]
    # [R, S], summed over layers and depths
    right_RS = np.zeros((len(ranks), len(np.unique(text_T[chosen]))))
    penalty: dict[tuple[int, int], float] = {}
    for layer, ahead, solved in _solve(streams, rows_T[~back_T], progress):
        x_TD = streams.unit_TD[layer - ahead][torch.from_numpy(rows_T[chosen])].float()
        normed_TD = streams.normed(layer, streams.stream(layer, rows_T[chosen]))
        weight_ED = streams.weight_ED(layer)
        assert weight_ED is not None
        errors = []
        for full in solved:
            off_TE = (x_TD - full.x_D) @ full.logit_DE - (normed_TD - full.normed_D) @ weight_ED.T
            errors.append(float(off_TE.square().mean()))
        best = int(np.argmin(errors))
        penalty[layer, ahead] = PENALTIES[best]
        used_TK, text_C = topk_TLK[chosen, layer], text_T[chosen]
        for place, rank in enumerate(ranks):
            cell = solved[best].cut(rank)
            ids_TP = streams.choose(layer, x_TD @ cell.down_DR @ cell.up_RD + cell.bias_D)
            right_RS[place] += rights(ids_TP, used_TK, text_C, np.unique(text_C))[:, 0]
    rank = _least_rank(ranks, right_RS)
    cells = {
        (layer, ahead): solved[PENALTIES.index(penalty[layer, ahead])].cut(rank)
        for layer, ahead, solved in _solve(streams, rows_T, progress)
    }
    experts_L = streams.experts_L
    return StreamRidge(layers=len(experts_L), experts=max(experts_L), digest=digest, cells=cells), rank


def _least_rank(ranks: Sequence[int], right_RS: Array) -> int:
    """The smallest one that is not worse than the best by more than the standard error of what lies between them."""
    best = right_RS[int(right_RS.mean(1).argmax())]
    for rank, right_S in zip(ranks, right_RS, strict=True):
        lost_S = best - right_S
        error = float(lost_S.std(ddof=1)) / len(lost_S) ** 0.5 if len(lost_S) > 1 else 0.0
        if lost_S.mean() <= error:
            return rank
    raise AssertionError("the best is not worse than itself")


def _solve(
    streams: Streams, rows_T: Array, progress: Callable[[int], object]
) -> Iterator[tuple[int, int, list[_Full]]]:
    """Each layer that can be asked, from each depth, with all penalties."""
    here = sorted(streams.unit_TD)
    for layer in here:
        asked = [at for at in here if 1 <= at - layer <= DEPTH and streams.weight_ED(at) is not None]
        if not asked:
            progress(1)
            continue
        x_TD = streams.unit_TD[layer][torch.from_numpy(rows_T)].float()
        x_D = x_TD.mean(0)
        x_TD -= x_D
        values_D, vectors_DD = torch.linalg.eigh(x_TD.T @ x_TD)
        values_D = values_D.clamp_min(0)
        for at in asked:
            weight_ED = streams.weight_ED(at)
            assert weight_ED is not None
            normed_TD = streams.normed(at, streams.stream(at, rows_T))
            normed_D = normed_TD.mean(0)
            with_DE = vectors_DD.T @ (x_TD.T @ ((normed_TD - normed_D) @ weight_ED.T))
            back_ED = torch.linalg.pinv(weight_ED).T
            solved = []
            for penalty in PENALTIES:
                scale_D = 1 / (values_D + penalty * values_D.mean().clamp_min(1e-12))
                turned_DE = scale_D[:, None] * with_DE
                logit_DE = vectors_DD @ turned_DE
                # The square of what it says of all rows
                order_EE = torch.linalg.eigh(turned_DE.T @ (values_D[:, None] * turned_DE)).eigenvectors.flip(1)
                solved.append(_Full(logit_DE=logit_DE, order_EE=order_EE, back_ED=back_ED, x_D=x_D, normed_D=normed_D))
            yield at, at - layer, solved
        progress(1)
