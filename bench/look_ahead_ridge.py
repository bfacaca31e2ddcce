"""Look-ahead's ridge: fitted on recorded streams, and compared with the mean of what layers add on documents held out.

S: documents held out, T: tokens of them whose streams were kept, D: hidden size, K: experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ..engine.predict.stream_fit import fit as fit_ridge
from ..engine.predict.stream_ridge import DEPTH, StreamRidge
from ..engine.predict.streams import Streams, rights
from .predictor_scores import SURE
from .predictor_texts import Texts
from .report import table

Array = npt.NDArray[Any]
LEAST_ROWS = 64
"""Of the texts to learn from, and of those held out: with fewer, nothing is fitted."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Ahead:
    """One layer from one depth: the recalls at K and 2 K [S, 2] of each document."""

    mean_S2: Array
    ridge_S2: Array

    @property
    def better(self) -> bool:
        """The ridge, in recall at K, beyond what differs between documents by chance."""
        gain_S = (self.ridge_S2 - self.mean_S2)[:, 0]
        if len(gain_S) < 2:
            return False
        return float(gain_S.mean()) > SURE * float(gain_S.std(ddof=1)) / math.sqrt(len(gain_S))


Standings = dict[tuple[int, int], Ahead]
"""By the layer that is asked and how many layers before."""


def fitted(
    streams: Streams | None, texts: Texts, fit: Texts, held: Texts, progress: bool
) -> tuple[StreamRidge | None, Standings, str]:
    """The ridge, of the layers and depths where it beats the mean, None if there are none; how each of them stands; and
    the verdict.
    """
    if streams is None:
        return None, {}, "Look-ahead's ridge is not fitted: this model's routers cannot be asked."
    trace = texts.trace
    token_T = np.arange(streams.rows) * streams.every
    document_T = np.repeat(texts.document_S, trace.end_S - trace.start_S)[token_T]
    topk_TLK = trace.topk_TLK[token_T]
    fit_T, held_T = (np.flatnonzero(np.isin(document_T, of.document_S)) for of in (fit, held))
    if min(len(fit_T), len(held_T)) < LEAST_ROWS or len(np.unique(document_T[fit_T])) < 2:
        return None, {}, f"Look-ahead's ridge is not fitted: at least {LEAST_ROWS} tokens must be held out; give more."
    with tqdm(
        total=2 * trace.layers, desc="look-ahead", unit="layer", disable=None if progress else True, leave=False
    ) as bar:
        ridge, rank = fit_ridge(
            streams, fit_T, document_T[fit_T], topk_TLK[fit_T], digest=trace.digest, progress=bar.update
        )
    found = compare(streams, ridge, streams.mean_LD(fit_T), held_T, document_T[held_T], topk_TLK[held_T])
    better = {at for at, ahead in found.items() if ahead.better}
    if not better:
        why = "it does not beat the mean on the documents held out"
        return None, found, f"Look-ahead's ridge is not installed: {why}."
    of = f"for {len(better)} of {len(found)} pairs of layers"
    return ridge.of(better), found, f"Look-ahead's ridge, of rank {rank}, beats the mean {of}, and is used there."


@torch.inference_mode()
def compare(
    streams: Streams,
    ridge: StreamRidge,
    mean_LD: dict[int, torch.Tensor],
    rows_T: Array,
    document_T: Array,
    topk_TLK: Array,
) -> Standings:
    """All that the ridge has, on these rows of the streams, with the documents that they are of and the experts that
    they used.
    """
    found = {}
    documents_S = np.unique(document_T)
    for layer, ahead in sorted(ridge.cells):
        stream_TD = streams.stream(layer - ahead, rows_T)
        by_ridge_TD = ridge.normed(layer, ahead, stream_TD)
        assert by_ridge_TD is not None
        by_mean_TP = streams.ask(layer, stream_TD + mean_LD[layer] - mean_LD[layer - ahead])
        by_ridge_TP = streams.choose(layer, by_ridge_TD)
        mean_S2, ridge_S2 = (
            rights(ids_TP, topk_TLK[:, layer], document_T, documents_S) for ids_TP in (by_mean_TP, by_ridge_TP)
        )
        found[layer, ahead] = Ahead(mean_S2=mean_S2, ridge_S2=ridge_S2)
    return found


def by_depth(found: Standings) -> dict[int, dict[str, Array]]:
    """By layers ahead the recalls at K and 2 K [2] with the `mean`, with the `ridge`, and with the `better` of them, as
    it will be used.
    """
    depths = {}
    for depth in range(1, DEPTH + 1):
        of = [ahead for (_, d), ahead in found.items() if d == depth]
        if of:
            parts = {
                "mean": [one.mean_S2 for one in of],
                "ridge": [one.ridge_S2 for one in of],
                "better": [one.ridge_S2 if one.better else one.mean_S2 for one in of],
            }
            depths[depth] = {name: np.array(part).mean((0, 1)) for name, part in parts.items()}
    return depths


def ahead_table(found: Standings, top_k: int) -> str:
    depths = by_depth(found)
    header = [f"look-ahead, recall@{top_k}, @{2 * top_k}", *(f"{depth} ahead" for depth in depths)]
    rows = [
        [f"with the {name}", *(f"{of[name][0]:.3f}, {of[name][1]:.3f}" for of in depths.values())]
        for name in ("mean", "ridge", "better")
    ]
    return table(header, rows)


def ahead_figures(found: Standings) -> dict[str, float]:
    figures: dict[str, float] = {}
    for depth, of in by_depth(found).items():
        for name, (at_k, at_2k) in of.items():
            figures |= {f"ahead_{depth}_recall_{name}": float(at_k), f"ahead_{depth}_recall_2k_{name}": float(at_2k)}
    return figures
