"""Recorded routing token by token, with the sequences and the domains that the tokens are of."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
NUMBERS = ("experts", "expert_bytes", "dense_bytes")
"""Of `ModelFacts`, as the file has them."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a file says about the model that was recorded; 0 and "" for what it does not say."""

    name: str = ""
    experts: int = 0
    """Of a layer."""
    expert_bytes: int = 0
    dense_bytes: int = 0
    """All weights but the experts'."""


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
    model: ModelFacts = ModelFacts()

    @property
    def layers(self) -> int:
        return self.topk_TLK.shape[1]

    @property
    def experts(self) -> int:
        """Of a layer. At least: a file may not say it, and the last ones may never have been chosen."""
        return max(self.model.experts, int(self.topk_TLK.max()) + 1)

    @property
    def counts_LE(self) -> Integers:
        """[L, E] tokens that used each expert."""
        found = [np.bincount(ids_TK[ids_TK >= 0], minlength=self.experts) for ids_TK in self.topk_TLK.swapaxes(0, 1)]
        return np.array(found, dtype=np.int64)

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
        return dataclasses.replace(
            self,
            topk_TLK=self.topk_TLK[rows],
            start_S=np.cumsum(lengths_S) - lengths_S,
            domain_S=self.domain_S[chosen_S],
        )

    def first(self, tokens: int) -> TokenTrace:
        """Only so many tokens from the beginning."""
        kept_S = self.start_S < tokens
        return dataclasses.replace(
            self, topk_TLK=self.topk_TLK[:tokens], start_S=self.start_S[kept_S], domain_S=self.domain_S[kept_S]
        )


def read_token_trace(path: str) -> TokenTrace:
    """From an .npz file with `topk` [T, L, K], `seq_start` [S] and, if there are any, `seq_domain` [S] and `domains`,
    and of the model `digest`, `model` (its name), `experts`, `expert_bytes` and `dense_bytes`.

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
            numbers = {name: int(file[name]) for name in NUMBERS if name in file.files}
            model = ModelFacts(name=str(file["model"]) if "model" in file.files else "", **numbers)
        if topk_TLK.ndim != 3 or not topk_TLK.size or topk_TLK.dtype.kind not in "iu" or topk_TLK.max() < 0:
            raise ValueError(f"topk has shape {topk_TLK.shape} of {topk_TLK.dtype}; it must be expert ids [T, L, K]")
        if not len(start_S) or start_S[0] != 0 or (np.diff(start_S) <= 0).any() or start_S[-1] >= len(topk_TLK):
            raise ValueError("seq_start must begin with 0 and grow up to the last token")
        if len(domain_S) != len(start_S) or domain_S.min() < 0 or domain_S.max() >= len(domains):
            raise ValueError("seq_domain must have an index into domains for each sequence")
        if min(numbers.values(), default=0) < 0:
            raise ValueError(f"{', '.join(NUMBERS)} must not be negative")
    except (OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--trace {path}: {' '.join(str(error).split())}; give an .npz file of routing, token by token"
        ) from error
    return TokenTrace(topk_TLK, start_S, domain_S, tuple(str(name) for name in domains), digest, model)


def write_token_trace(path: str, trace: TokenTrace, **more_T: npt.NDArray[Any]) -> None:
    """The file that `read_token_trace` reads, compressed, with `more_T` arrays beside. Raises ValueError when it
    cannot be written.
    """
    arrays: dict[str, Any] = {
        "topk": trace.topk_TLK,
        "seq_start": trace.start_S,
        "seq_domain": trace.domain_S,
        "domains": np.array(trace.domains),
        "digest": np.array(trace.digest),
        "model": np.array(trace.model.name),
        **{name: np.array(getattr(trace.model, name)) for name in NUMBERS},
    }
    try:
        with open(path, "wb") as file:  # a file, for numpy adds a suffix to a name
            np.savez_compressed(file, **arrays | more_T)
    except OSError as error:
        raise ValueError(f"--trace {path}: {error.strerror}; give a file that can be written") from error


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
