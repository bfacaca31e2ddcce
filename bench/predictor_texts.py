"""Recorded texts for predictors of routing, split by document: what is scored was never trained on.

T: tokens, S: sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from .token_trace import TokenTrace

Array = npt.NDArray[Any]
HELD_OUT = 0.2
LEAST = 4
"""Documents: two to learn from and two held out, for how documents differ is a part of the verdict."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Texts:
    """What was recorded: `token_T` is None without ids, `document_S` the number of each sequence's document."""

    trace: TokenTrace
    token_T: Array | None
    vocab: int
    document_S: Array
    names: tuple[str, ...]
    """Of the documents."""

    def of(self, documents: Array) -> Texts:
        """Only the sequences of these documents."""
        chosen_S = np.isin(self.document_S, documents)
        trace = self.trace
        lengths_S = trace.end_S - trace.start_S
        rows_T = np.repeat(chosen_S, lengths_S)
        kept = TokenTrace(
            trace.topk_TLK[rows_T],
            np.cumsum(lengths_S[chosen_S]) - lengths_S[chosen_S],
            trace.domain_S[chosen_S],
            trace.domains,
            trace.digest,
            trace.model,
        )
        token_T = None if self.token_T is None else self.token_T[rows_T]
        return Texts(
            trace=kept, token_T=token_T, vocab=self.vocab, document_S=self.document_S[chosen_S], names=self.names
        )


def split(texts: Texts, held_out: str | None, seed: int = 0) -> tuple[Texts, Texts]:
    """Documents to learn from, and those held out: a share of the tokens, in whole documents, or those of some names.

    Raises ValueError when one of them has fewer than two documents.
    """
    documents = np.unique(texts.document_S)
    if len(documents) < LEAST:
        raise ValueError(too_few(len(documents), "documents"))
    try:
        share = HELD_OUT if held_out is None else float(held_out)
    except ValueError:
        share = None
    if share is None:
        chosen = _named(held_out or "", texts, documents)
    elif not 0 < share < 1:
        raise ValueError(f"--held-out is {held_out}; it must be a share above 0 and below 1, or names of documents")
    else:
        chosen = _drawn(texts, documents, share, seed)
    kept = np.setdiff1d(documents, chosen)
    if min(len(chosen), len(kept)) < 2:
        raise ValueError(
            f"--held-out leaves {len(kept)} documents to learn from and {len(chosen)} held out; both need at least 2"
        )
    return texts.of(kept), texts.of(chosen)


def _drawn(texts: Texts, documents: Array, share: float, seed: int) -> Array:
    """Documents in an order that the seed gives, as long as they fit into the share; at least two, and all but two at
    the most.
    """
    lengths_S = texts.trace.end_S - texts.trace.start_S
    sizes = {d: int(lengths_S[texts.document_S == d].sum()) for d in documents.tolist()}
    room = share * sum(sizes.values())
    chosen: list[int] = []
    for d in np.random.default_rng(seed).permutation(documents).tolist():
        if sum(sizes[c] for c in chosen) + sizes[d] <= room and len(chosen) < len(sizes) - 2:
            chosen.append(d)
    rest = sorted(sizes.keys() - set(chosen), key=lambda d: (sizes[d], d))
    return np.array(sorted(chosen + rest[: max(0, 2 - len(chosen))]))


def _named(text: str, texts: Texts, documents: Array) -> Array:
    found: set[int] = set()
    for pattern in text.split(","):
        matches = {d for d in documents.tolist() if fnmatchcase(texts.names[d], pattern.strip())}
        if not matches:
            raise ValueError(
                f"--held-out: no document is named {pattern.strip()!r}; documents are the files or domains"
            )
        found |= matches
    return np.array(sorted(found))


def too_few(count: int, what: str) -> str:
    return f"{what}: {count} documents are too few; give at least {LEAST}, for whole documents are held out"
