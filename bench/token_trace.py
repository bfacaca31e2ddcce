"""Recorded routing token by token, with the sequences and the domains that the tokens are of."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """`topk_TLK` expert ids in the order of the router's weights, -1 for none; sequence s is rows `start_S[s]` to the
    next. `domain_S` are indices into `domains`; a trace without domains has one without a name.
    """

    topk_TLK: npt.NDArray[Any]
    start_S: Integers
    domain_S: Integers
    domains: tuple[str, ...]
    digest: str = ""
    """Of the model that was recorded, "" where the file does not say."""

    @property
    def layers(self) -> int:
        return self.topk_TLK.shape[1]

    @property
    def experts(self) -> int:
        """Of a layer; at least, if the last ones were never chosen."""
        return int(self.topk_TLK.max()) + 1

    @property
    def end_S(self) -> Integers:
        return np.append(self.start_S[1:], len(self.topk_TLK))

    def of(self, domains: Collection[str]) -> TokenTrace:
        """Only the sequences of these domains. Raises ValueError when there is none."""
        chosen_S = [s for s, domain in enumerate(self.domain_S) if self.domains[domain] in domains]
        if not chosen_S:
            raise ValueError(f"the trace has no sequence of {', '.join(sorted(domains))}")
        lengths_S = (self.end_S - self.start_S)[chosen_S]
        rows = np.concatenate([np.arange(self.start_S[s], self.end_S[s]) for s in chosen_S])
        return TokenTrace(
            self.topk_TLK[rows], np.cumsum(lengths_S) - lengths_S, self.domain_S[chosen_S], self.domains, self.digest
        )

    def first(self, tokens: int) -> TokenTrace:
        """Only so many tokens from the beginning."""
        kept_S = self.start_S < tokens
        return TokenTrace(
            self.topk_TLK[:tokens], self.start_S[kept_S], self.domain_S[kept_S], self.domains, self.digest
        )


def read_token_trace(path: str) -> TokenTrace:
    """From an .npz file with `topk` [T, L, K], `seq_start` [S] and, if there are any, `seq_domain` [S] and `domains`,
    and the model's `digest`.

    Raises ValueError for a file that is not one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in ("topk", "seq_start"):
                if name not in file.files:
                    raise ValueError(f"no array {name}")
            topk_TLK, start_S = file["topk"], file["seq_start"].astype(np.int64)
            domain_S, domains = np.zeros(len(start_S), dtype=np.int64), np.array([""])
            if "domains" in file.files and "seq_domain" in file.files:
                domain_S, domains = file["seq_domain"].astype(np.int64), file["domains"]
            digest = str(file["digest"]) if "digest" in file.files else ""
        if topk_TLK.ndim != 3 or not topk_TLK.size or topk_TLK.dtype.kind not in "iu" or topk_TLK.max() < 0:
            raise ValueError(f"topk has shape {topk_TLK.shape} of {topk_TLK.dtype}; it must be expert ids [T, L, K]")
        if not len(start_S) or start_S[0] != 0 or (np.diff(start_S) <= 0).any() or start_S[-1] >= len(topk_TLK):
            raise ValueError("seq_start must begin with 0 and grow up to the last token")
        if len(domain_S) != len(start_S) or domain_S.min() < 0 or domain_S.max() >= len(domains):
            raise ValueError("seq_domain must have an index into domains for each sequence")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--trace {path}: {' '.join(str(error).split())}; give an .npz file of routing, token by token"
        ) from error
    return TokenTrace(topk_TLK, start_S, domain_S, tuple(str(name) for name in domains), digest)


def split_domains(trace: TokenTrace, fit: str | None, score: str | None) -> tuple[set[str], set[str]]:
    """The domains to fit on and those to score on, from names and shell patterns with commas between.

    What is not given is what the other one leaves; without both, nothing is fitted and all is scored. Raises
    ValueError for a name that is not there and for a domain in both: no policy is scored on text that it was fitted on.
    """
    present = {trace.domains[domain] for domain in trace.domain_S}
    fitted = _named("--fit", fit, present) if fit is not None else set()
    scored = _named("--score", score, present) if score is not None else present - fitted
    if both := fitted & scored:
        raise ValueError(f"--fit and --score both have {', '.join(sorted(both))}; score on other text than is fitted")
    if not scored:
        raise ValueError("--fit has all domains of the trace; leave one for --score")
    return fitted, scored


def _named(option: str, text: str, present: set[str]) -> set[str]:
    found: set[str] = set()
    for pattern in text.split(","):
        matches = {name for name in present if fnmatchcase(name, pattern.strip())}
        if not matches:
            known = ", ".join(sorted(present - {""})) or "none"
            raise ValueError(f"{option}: the trace has no domain {pattern.strip()!r}; those it has: {known}")
        found |= matches
    return found
