"""The routing-path network: from a sequence's token ids and routing so far to the experts of the next tokens, all
layers.

After ExpertFlow's routing-path predictor (arXiv 2410.17954), which reads the tokens of a sequence with a small
transformer and has a head for each layer. This one is made to be run for every token: it has no attention, and what it
knows of the past is the last four tokens, the experts of the last two, and rates of use with four half-lives. One
evaluation says what the next token uses, its id known or not, and what the tokens after it do.

B: rows, L: layers, E: experts of a layer, N: all experts, K: experts per token, F: features per expert, H: hidden size,
W: tokens that are looked at.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from ..next_use import HALF_LIFE
from ..routing_history import RATE_HALF_LIVES

Array = npt.NDArray[Any]

WINDOW = 4
"""Tokens whose ids count: the next one, and those before it."""
BUCKETS = 16384
"""Rows of the table of tokens. A larger vocabulary shares them, each token two."""
TOKEN_SIZE = 64
HIDDEN = 256
KEPT = 2.0 ** (-1 / HALF_LIFE)
"""What a use counts one token later, as in `NextUse`."""
MOST_USES = 1 / (1 - KEPT)
"""Discounted uses of an expert that every token uses."""
FEATURES = len(RATE_HALF_LIVES)
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PathShape:
    """Of a model: K for the layer with the most; `vocab` is 0 for a network that does not look at tokens."""

    layers: int
    experts: int
    top_k: int
    vocab: int = 0

    @property
    def all(self) -> int:
        return self.layers * self.experts

    @property
    def buckets(self) -> int:
        return min(self.vocab, BUCKETS)


class PathNetwork(nn.Module):
    """Says of the token after a state, for each expert, how probable its use is, and its discounted uses after that.

    Inputs of `forward`, for B rows:

        last_BLK, previous_BLK: experts of the last token and of the one before it, in the router's order; -1 for none.
        roots_BFLE: of the rates of use, `routing_history.rate_roots`.
        tokens_BW: the next token's id and those before it, the latest first; -1 where unknown or before the first.

    It returns logits [B, 2, L, E]: that the next token uses an expert, and the share of all possible discounted uses
    that the tokens after it make of it.
    """

    def __init__(self, shape: PathShape, *, hidden: int = HIDDEN, digest: str = "") -> None:
        super().__init__()
        self.shape, self.digest, self.hidden = shape, digest, hidden
        experts = shape.all
        self.last = nn.Parameter(torch.randn(experts + 1, hidden) * 0.05)
        self.rank = nn.Parameter(torch.randn(experts + 1, hidden) * 0.05)
        self.previous = nn.Parameter(torch.randn(experts + 1, hidden) * 0.05)
        """One row more, which stands for no expert."""
        if shape.vocab:
            self.token = nn.Parameter(torch.randn(shape.buckets + 1, TOKEN_SIZE))
            self.mix = nn.Linear(WINDOW * TOKEN_SIZE, hidden, bias=False)
        self.first_norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(2 * hidden, hidden)
        self.last_norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 2 * experts)
        self.own = nn.Parameter(torch.zeros(2, FEATURES + 2, shape.layers, shape.experts))
        """Of an expert's own rates, and of its being one of the last two tokens'."""
        self.register_buffer("rank_K", torch.linspace(1, -1, shape.top_k) if shape.top_k > 1 else torch.zeros(1))
        self.register_buffer("layer_L1", torch.arange(shape.layers)[:, None] * shape.experts)

    rank_K: torch.Tensor
    layer_L1: torch.Tensor

    def forward(
        self,
        last_BLK: torch.Tensor,
        previous_BLK: torch.Tensor,
        roots_BFLE: torch.Tensor,
        tokens_BW: torch.Tensor,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        return self.ahead(*self.known(last_BLK, previous_BLK, roots_BFLE, dropout), tokens_BW, dropout)

    def known(
        self, last_BLK: torch.Tensor, previous_BLK: torch.Tensor, roots_BFLE: torch.Tensor, dropout: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the routing so far says: [B, H], and a part of the logits."""
        shape = self.shape
        rows = len(last_BLK)
        last_BN, previous_BN = self._rows(last_BLK), self._rows(previous_BLK)
        order_BN = self.rank_K.repeat(shape.layers).expand(rows, -1)
        x_BH = self._sum(last_BN, self.last, dropout) + self._sum(previous_BN, self.previous, dropout)
        x_BH = x_BH + self._sum(last_BN, self.rank, dropout, order_BN)
        out_B2LE = torch.einsum("bfle,ofle->bole", roots_BFLE, self.own[:, :FEATURES])
        for place, used_BN in enumerate((last_BN, previous_BN)):
            used_BLE = torch.zeros(rows, shape.all + 1).scatter_(1, used_BN, 1.0)[:, :-1].view(rows, shape.layers, -1)
            out_B2LE = out_B2LE + used_BLE[:, None] * self.own[:, FEATURES + place]
        return x_BH, out_B2LE

    def ahead(
        self, x_BH: torch.Tensor, out_B2LE: torch.Tensor, tokens_BW: torch.Tensor, dropout: float = 0.0
    ) -> torch.Tensor:
        """The logits, from what is known and from the tokens."""
        if self.shape.vocab:
            x_BH = x_BH + self.mix(_drop(self._tokens(tokens_BW).flatten(1), dropout))
        x_BH = functional.gelu(self.first_norm(x_BH))
        x_BH = x_BH + self.down(_drop(functional.gelu(self.up(x_BH)), dropout))
        return out_B2LE + self.head(_drop(self.last_norm(x_BH), dropout)).view(out_B2LE.shape)

    def _rows(self, ids_BLK: torch.Tensor) -> torch.Tensor:
        """[B, L * K] rows of the tables; the last row for none."""
        return torch.where(ids_BLK < 0, self.shape.all, ids_BLK + self.layer_L1).flatten(1)

    def _sum(
        self, rows_BN: torch.Tensor, table: torch.Tensor, dropout: float, weights_BN: torch.Tensor | None = None
    ) -> torch.Tensor:
        if dropout:
            kept_BN = functional.dropout(torch.ones(rows_BN.shape), dropout)
            weights_BN = kept_BN if weights_BN is None else weights_BN * kept_BN
        return functional.embedding_bag(
            rows_BN, table, mode="sum", per_sample_weights=weights_BN, padding_idx=self.shape.all
        )

    def _tokens(self, tokens_BW: torch.Tensor) -> torch.Tensor:
        """[B, W, size]. In a table with fewer rows than tokens each has two, so that few share both."""
        buckets = self.shape.buckets
        none_BW = (tokens_BW < 0) | (tokens_BW >= self.shape.vocab)
        found = functional.embedding(torch.where(none_BW, buckets, tokens_BW % buckets), self.token)
        if self.shape.vocab > buckets:
            other_BW = (tokens_BW * 2654435761 >> 15) % buckets  # Knuth's multiplicative hash
            found = (found + functional.embedding(torch.where(none_BW, buckets, other_BW), self.token)) / 2
        return found

    # Files

    def save(self, path: str) -> None:
        """As .npz, in half precision. Raises ValueError for a path that cannot be written."""
        arrays: dict[str, Any] = {f"w.{k}": v.detach().half().numpy() for k, v in self.named_parameters()}
        shape = self.shape
        arrays |= {"version": VERSION, "digest": self.digest, "hidden": self.hidden}
        arrays["shape"] = np.array([shape.layers, shape.experts, shape.top_k, shape.vocab])
        try:
            with open(path, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; give a file that can be written") from error

    @classmethod
    def load(cls, path: str, digest: str | None = None) -> PathNetwork:
        """Raises ValueError for a file that is not one, or was made for a model with another `digest`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["version"]) != VERSION:
                    raise ValueError(f"version {file['version']}, not {VERSION}")
                layers, experts, top_k, vocab = (int(n) for n in file["shape"])
                shape = PathShape(layers=layers, experts=experts, top_k=top_k, vocab=vocab)
                found = cls(shape, hidden=int(file["hidden"]), digest=str(file["digest"]))
                for name, weight in found.named_parameters():
                    stored = torch.from_numpy(file[f"w.{name}"]).float()
                    if stored.shape != weight.shape or not stored.isfinite().all():
                        raise ValueError(f"{name} has shape {tuple(stored.shape)}, or is not finite")
                    weight.data.copy_(stored)
        except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
            text = " ".join(str(error).split())
            raise ValueError(
                f"{path}: {text}; this is no routing-path network; make one with moeyard train-predictor"
            ) from error
        if digest is not None and digest != found.digest:
            raise ValueError(
                f"{path}: made for the model {found.digest or '(none)'}, not {digest}; make one for it with moeyard"
                " train-predictor"
            )
        return found.eval()


def _drop(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Without a call where there is none: it would cost as much as the layers."""
    return functional.dropout(x, dropout) if dropout else x
