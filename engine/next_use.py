"""Predicted next use: from how a sequence was routed so far, how soon and how often it will need each expert.

A ridge regression for each layer, fitted in closed form. Its target is an expert's discounted future use: the sum over
the next tokens of 2 ** (-(distance - 1) / half-life) where the expert is used. It sees the experts of the last two
tokens in all layers, those of the last one with their place in the router's order, and in its own layer at what rates
each expert was used of late. Such a regression is one of the forecasters in the study moe-speed-of-light
(github.com/harshithkantamneni/moe-speed-of-light). Rates of other layers are left out on purpose: on recorded routing
they made it worse on text that it was not fitted on, because they tell the domain.

Predictions only order copies and evictions. What is executed is the router's choice.

T: tokens, L: layers, E: experts of a layer, K: experts per token, S: sequences, H: half-lives, F: features per expert.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .next_token import POINTS, NextToken
from .routing_history import FEATURES, History, features, rank_weights, rows

Array = npt.NDArray[Any]

HALF_LIFE = 3.0
"""Of the target, in tokens: about how long an expert stays where a quarter has a slot."""
CROSS_RIDGE, OWN_RIDGE = 5000.0, 1000.0
"""Penalties on the weights of standardised features of all layers, and of a layer's own. Ten times less or more
changes little.
"""
VERSION = 1


class Predictor(Protocol):
    """What orders copies and evictions. Never what is executed."""

    def predict(self, histories: Sequence[History]) -> Array:
        """[L, E] discounted future use of each expert, summed over the sequences that run."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class NextUse:
    """A fitted predictor. Rows of `now`, `rank` and `before` are experts of all layers, columns what they say of all.

    Args:
        now_NN, rank_NN, before_NN: [L * E, L * E] weights of the last token's experts, of their place in the order of
            the router's weights (times 1 for the first to -1 for the last), and of the experts of the token before.
        own_LFE: [L, F * E, E] weights of a layer's own rates.
        bias_LE: what is predicted without any of them.
        even: mean uses of an expert per token, K / E.
        digest: of the model that it was made for, "" for one without.
        next_token: how probable the next token's experts are; None where it was not fitted (`with_next_token`).
    """

    now_NN: Array
    rank_NN: Array
    before_NN: Array
    own_LFE: Array
    bias_LE: Array
    even: float
    half_life: float
    digest: str = ""
    next_token: NextToken | None = None

    @property
    def layers(self) -> int:
        return self.bias_LE.shape[0]

    @property
    def experts(self) -> int:
        return self.bias_LE.shape[1]

    def history(self) -> History:
        """Of a sequence without tokens."""
        return History(self.layers, self.experts)

    def predict(self, histories: Sequence[History]) -> Array:
        """[L, E] discounted future use of each expert, summed over the sequences that have tokens."""
        total_LE = np.zeros((self.layers, self.experts), dtype=np.float32)
        for history in histories:
            if history.last_LK is None:
                continue
            row_N, place_N = rows(history.last_LK, self.experts)
            weight_N = rank_weights(history.last_LK.shape[1])[place_N]
            cross = self.now_NN[row_N].sum(0) + weight_N @ self.rank_NN[row_N]
            if history.previous_LK is not None:
                cross += self.before_NN[rows(history.previous_LK, self.experts)[0]].sum(0)
            own_LE = np.matmul(history.features(self.even)[:, None], self.own_LFE)[:, 0]
            total_LE += cross.reshape(total_LE.shape) + own_LE + self.bias_LE
        return total_LE

    def scores(self, topk_TLK: Array, start_S: Array) -> Array:
        """[T, L, E] the prediction after each token of a recording; sequence s is rows `start_S[s]` to the next."""
        _check_trace(topk_TLK, self.layers, self.experts)
        cross_CN = torch.from_numpy(np.concatenate([self.now_NN, self.rank_NN, self.before_NN]))
        own_LFE, bias_LE = torch.from_numpy(self.own_LFE), torch.from_numpy(self.bias_LE)
        parts = []
        for cross_TC, own_TLF in features(topk_TLK, start_S, self.experts, self.even):
            scores_TLE = (cross_TC @ cross_CN).view(-1, self.layers, self.experts)
            scores_TLE += torch.einsum("tlf,lfe->tle", own_TLF, own_LFE) + bias_LE
            parts.append(scores_TLE.numpy())
        return np.concatenate(parts)

    @classmethod
    def fit(
        cls,
        topk_TLK: Array,
        start_S: Array,
        experts: int,
        *,
        half_life: float = HALF_LIFE,
        digest: str = "",
        progress: Callable[[int], object] = lambda tokens: None,
    ) -> NextUse:
        """From a recording, in closed form: ids in the order of the router's weights, -1 for none.

        Two passes over the tokens, then an equation for each layer, of which all share the part of all layers. Memory
        is for some matrices of (3 * L * E) ** 2. `progress` is told numbers of tokens, in all twice the recording's.

        Raises ValueError for ids that are not experts, or a half-life that is not above 0.
        """
        layers = topk_TLK.shape[1]
        _check_trace(topk_TLK, layers, experts)
        if not half_life > 0:
            raise ValueError(f"half_life is {half_life}; it must be above 0 tokens")
        even = float((topk_TLK >= 0).sum() / (topk_TLK.shape[0] * layers * experts))
        target_TLE = torch.from_numpy(future_use(topk_TLK, start_S, experts, half_life))
        tokens, size = len(topk_TLK), layers * experts
        total_C, square_C = torch.zeros(3 * size), torch.zeros(3 * size)
        total_LF, square_LF = (torch.zeros(layers, FEATURES * experts) for _ in range(2))
        for cross_TC, own_TLF in features(topk_TLK, start_S, experts, even):
            total_C += cross_TC.sum(0)
            square_C += cross_TC.square().sum(0)
            total_LF += own_TLF.sum(0)
            square_LF += own_TLF.square().sum(0)
            progress(len(cross_TC))
        mean_C, scale_C = _standard(total_C, square_C, tokens)
        mean_LF, scale_LF = _standard(total_LF, square_LF, tokens)
        mean_LE = target_TLE.mean(0)

        gram_CC, gram_LCF = torch.zeros(3 * size, 3 * size), torch.zeros(layers, 3 * size, total_LF.shape[1])
        gram_LFF = torch.zeros(layers, total_LF.shape[1], total_LF.shape[1])
        with_CN, with_LFE = torch.zeros(3 * size, size), torch.zeros(layers, total_LF.shape[1], experts)
        done = 0
        for cross_TC, own_TLF in features(topk_TLK, start_S, experts, even):
            x_TC = (cross_TC - mean_C) / scale_C
            x_LTF = ((own_TLF - mean_LF) / scale_LF).transpose(0, 1).contiguous()
            y_TLE = target_TLE[done : done + len(x_TC)] - mean_LE
            done += len(x_TC)
            gram_CC.addmm_(x_TC.T, x_TC)
            with_CN.addmm_(x_TC.T, y_TLE.flatten(1))
            for layer, x_TF in enumerate(x_LTF):
                gram_LCF[layer].addmm_(x_TC.T, x_TF)
                gram_LFF[layer].addmm_(x_TF.T, x_TF)
                with_LFE[layer].addmm_(x_TF.T, y_TLE[:, layer])
            progress(len(x_TC))

        gram_CC.diagonal().add_(CROSS_RIDGE)
        gram_LFF.diagonal(dim1=1, dim2=2).add_(OWN_RIDGE)
        root_CC = torch.linalg.cholesky(gram_CC)
        cross_CN, own_LFE = torch.empty_like(with_CN), torch.empty_like(with_LFE)
        for layer in range(layers):
            columns = slice(layer * experts, (layer + 1) * experts)
            # What is left of the layer's own features and of its targets when the others' part is taken out
            rest_CF = torch.cholesky_solve(gram_LCF[layer], root_CC)
            rest_CE = torch.cholesky_solve(with_CN[:, columns], root_CC)
            left_FF = gram_LFF[layer] - gram_LCF[layer].T @ rest_CF
            left_FE = with_LFE[layer] - gram_LCF[layer].T @ rest_CE
            own_LFE[layer] = torch.linalg.solve(left_FF, left_FE)
            cross_CN[:, columns] = rest_CE - rest_CF @ own_LFE[layer]
        cross_CN /= scale_C[:, None]
        own_LFE /= scale_LF[:, :, None]
        bias_LE = mean_LE - (mean_C @ cross_CN).view(layers, experts) - torch.einsum("lf,lfe->le", mean_LF, own_LFE)
        now_NN, rank_NN, before_NN = (part.contiguous().numpy() for part in cross_CN.view(3, size, size))
        return cls(
            now_NN=now_NN,
            rank_NN=rank_NN,
            before_NN=before_NN,
            own_LFE=own_LFE.numpy(),
            bias_LE=bias_LE.numpy(),
            even=even,
            half_life=half_life,
            digest=digest,
        )

    def with_next_token(
        self, topk_TLK: Array, start_S: Array, *, progress: Callable[[int], object] = lambda layers: None
    ) -> NextUse:
        """With probabilities of the next token's experts, fitted on a recording; see `NextToken.fit`."""
        scores_TLE = self.scores(topk_TLK, start_S)
        return dataclasses.replace(self, next_token=NextToken.fit(topk_TLK, start_S, scores_TLE, progress=progress))

    def save(self, path: str) -> None:
        """As .npz. Raises ValueError for a path that cannot be written."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {"version": VERSION, "even": self.even, "half_life": self.half_life, "digest": self.digest}
        if self.next_token is not None:
            arrays |= {name: getattr(self.next_token, name) for name in _NEXT_TOKEN}
        try:
            with open(path, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; give a file that can be written") from error

    @classmethod
    def load(cls, path: str, digest: str | None = None) -> NextUse:
        """Raises ValueError for a file that is not one, or was made for a model with another `digest`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["version"]) != VERSION:
                    raise ValueError(f"version {file['version']}, not {VERSION}")
                found = cls(
                    even=float(file["even"]),
                    half_life=float(file["half_life"]),
                    digest=str(file["digest"]),
                    next_token=NextToken(**{name: file[name] for name in _NEXT_TOKEN})
                    if _NEXT_TOKEN[0] in file
                    else None,
                    **{name: file[name] for name in _ARRAYS},
                )
            layers, experts = found.bias_LE.shape
            size, features = layers * experts, FEATURES * experts
            shapes = [(size, size)] * 3 + [(layers, features, experts), (layers, experts)]
            if [getattr(found, name).shape for name in _ARRAYS] != shapes:
                raise ValueError("arrays whose shapes do not agree")
            if found.next_token is not None:
                depths = len(found.next_token.bias_DLE)
                shapes = [(depths, layers, 5 * experts, experts), (depths, layers, experts)]
                shapes += [(layers, experts), (depths, len(POINTS))]
                if [getattr(found.next_token, name).shape for name in _NEXT_TOKEN] != shapes:
                    raise ValueError("arrays of the next token whose shapes do not agree")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}; this is no predictor of next use") from error
        if digest is not None and digest != found.digest:
            raise ValueError(f"{path}: made for the model {found.digest or '(none)'}, not {digest}; fit one for it")
        return found


_ARRAYS = ("now_NN", "rank_NN", "before_NN", "own_LFE", "bias_LE")
_NEXT_TOKEN = ("weight_DLFE", "bias_DLE", "mean_LE", "chance_DB")
"""Not in every file."""


def future_use(topk_TLK: Array, start_S: Array, experts: int, half_life: float) -> Array:
    """[T, L, E] discounted use after each token, up to the end of its sequence.

    >>> future_use(np.array([[[0]], [[1]], [[1]]]), np.array([0]), 2, half_life=1.0)[:, 0].tolist()
    [[0.0, 1.5], [0.0, 1.0], [0.0, 0.0]]
    """
    tokens, layers, _ = topk_TLK.shape
    use_TLE = np.zeros((tokens, layers, experts), dtype=np.float32)
    now_LE = np.zeros((layers, experts), dtype=np.float32)
    decay = np.float32(2.0 ** (-1.0 / half_life))
    last = {int(start) - 1 for start in start_S}
    for t in range(tokens - 1, -1, -1):
        if t in last:
            now_LE[:] = 0
        use_TLE[t] = now_LE
        now_LE *= decay
        layer_N, place_N = np.nonzero(topk_TLK[t] >= 0)
        now_LE[layer_N, topk_TLK[t][layer_N, place_N]] += 1
    return use_TLE


def _standard(total: torch.Tensor, square: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread; what hardly changes is not blown up."""
    mean = total / tokens
    return mean, (square / tokens - mean.square()).clamp(min=0).sqrt() + 1e-3


def _check_trace(topk_TLK: Array, layers: int, experts: int) -> None:
    if topk_TLK.ndim != 3 or topk_TLK.shape[1] != layers or not len(topk_TLK):
        raise ValueError(f"topk has shape {topk_TLK.shape}; it must be tokens of {layers} layers")
    if topk_TLK.max() >= experts or topk_TLK.min() < -1:
        raise ValueError(
            f"topk has ids from {topk_TLK.min()} to {topk_TLK.max()}; there are {experts} experts, -1 is none"
        )
