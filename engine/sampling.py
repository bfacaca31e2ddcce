"""From logits to tokens: one call per step for the whole batch, one `SequenceSampler` per running sequence.

Shapes: B rows of logits, R rows that are drawn at random, G rows with a grammar, V tokens of the vocabulary.

A row's token depends on its own logits, options and (seed, position in the output) alone: the uniform number
comes from a counter, and probabilities are integers, whose sum does not depend on the order of adding.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .params import SamplingParams

if TYPE_CHECKING:
    from .grammar import Grammar

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
# A token's integer weight relative to the best one's; V weights add up within 63 bits while V < 2**20.
_ONE = 2**43
# top_p looks at this many best tokens (or top_k) and sorts the whole row only when they do not reach top_p.
_NUCLEUS = 1024
# Logits taken at a time. On a GPU it bounds the temporaries, some of eight bytes each, to about 150 MB; on a CPU
# they should stay in the cache (half the time of larger ones, measured at vocabularies of 32,000 and 200,000).
_CHUNK = 2**22
_CPU_CHUNK = 2**18


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One row's token. `error` says why there is none (`token_id` is then -1).

    `logprob` (of the token) and `top` (alternatives as (token, logprob), best first, lower id first among equals)
    are of the model's raw logits, before any option; None unless `SamplingParams.logprobs` asks.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    error: str = ""


class SequenceSampler:
    """Options and output so far of one sequence.

    Args:
        seed: with the position in the output, decides every random choice.
        grammar: restricts the tokens; when it is complete the sequence ends, `ignore_eos` or not.
        max_new_tokens: a limit beside `params.max_tokens`, such as the room left in the model's length.

    Raises ValueError when an option names a token outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        eos_ids: frozenset[int],
        seed: int,
        grammar: Grammar | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} names token {token}; it must be between 0 and {vocab_size - 1}")
        self.params = params
        self.vocab_size = vocab_size
        self.grammar = grammar
        self.output_ids: list[int] = []
        self.finish_reason = ""
        self.stop_token: int | None = None
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self._end_ids = frozenset() if params.ignore_eos else eos_ids
        self._limit = min((n for n in (params.max_tokens, max_new_tokens) if n is not None), default=None)
        self._key = _mix(seed & _MASK64)
        self.seen: _SeenTokens | None = None
        if params.repetition_penalty != 1:
            self.seen = _SeenTokens(t for t in prompt_ids if t < vocab_size)
        elif params.presence_penalty or params.frequency_penalty:
            self.seen = _SeenTokens()
        self._changes_logits = bool(grammar or params.logit_bias or self.seen is not None)

    def advance(self, token_id: int) -> None:
        """Add a token to the output; the last one sets `finish_reason` ("stop", "length") and `stop_token`."""
        assert not self.finish_reason, "a token after the last one"
        self.output_ids.append(token_id)
        if self.seen is not None:
            self.seen.count(token_id)
        if self.grammar is not None:
            self.grammar.advance(token_id)
        if token_id in self.stop_ids:
            self.finish_reason = "stop"
            self.stop_token = None if token_id in self._end_ids else token_id
        elif self.grammar is not None and self.grammar.finished:
            self.finish_reason = "stop"
        elif self._limit is not None and len(self.output_ids) >= self._limit:
            self.finish_reason = "length"

    def uniform(self) -> float:
        """The next token's random number in [0, 1): splitmix64 with the position as its counter."""
        return (_mix(self._key + (len(self.output_ids) + 1) * _GOLDEN & _MASK64) >> 11) * 2.0**-53

    def banned_ids(self) -> list[int]:
        """Tokens that min_tokens forbids at this position."""
        if len(self.output_ids) >= self.params.min_tokens:
            return []
        return [t for t in self.stop_ids if t < self.vocab_size]

    def changes_logits(self) -> bool:
        """Whether an option changes the logits at this position, before temperature."""
        return self._changes_logits or len(self.output_ids) < self.params.min_tokens

    def plain_greedy(self) -> bool:
        """Whether the best logit's token is all that is asked at this position."""
        return self.params.temperature == 0 and self.params.logprobs is None and not self.changes_logits()


class _SeenTokens:
    """Distinct tokens of a sequence and how often each is in the output (0: in the prompt alone)."""

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self.ids = array("q", dict.fromkeys(prompt_ids))
        self.counts = array("q", bytes(8 * len(self.ids)))
        self._places = {token: place for place, token in enumerate(self.ids)}

    def count(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0)
        self.counts[place] += 1


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): 64 bits to 64 well-mixed bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def sample(logits_BV: torch.Tensor, sequences: Sequence[SequenceSampler]) -> list[Sampled]:
    """The next token of each sequence; does not advance them.

    The order: grammar, logit_bias, min_tokens, penalties (repetition over prompt and output, presence and
    frequency over the output), temperature, top_k, top_p, min_p, as in vLLM but for min_p, which is last. Tokens
    that tie with the last one kept by top_k or top_p are kept too. Temperature 0 takes the best token, the lowest
    id among equals.

    Args:
        logits_BV: any float type and device, left unchanged; columns from `vocab_size` on are padding.
        sequences: one per row.
    """
    assert logits_BV.dim() == 2 and len(logits_BV) == len(sequences)
    if not sequences:
        return []
    vocab_size = sequences[0].vocab_size
    assert vocab_size <= logits_BV.shape[1] and vocab_size < 2**20
    assert all(s.vocab_size == vocab_size for s in sequences)
    logits_BV = logits_BV[:, :vocab_size]
    if all(s.plain_greedy() for s in sequences):
        best_B, ids_B = logits_BV.max(dim=-1)
        best, ids = torch.stack((best_B.double(), ids_B.double())).tolist()
        return [_result(s, int(i), b, b) for s, i, b in zip(sequences, ids, best, strict=True)]
    rows = max(1, (_CPU_CHUNK if logits_BV.device.type == "cpu" else _CHUNK) // vocab_size)
    return [
        sampled
        for start in range(0, len(sequences), rows)
        for sampled in _sample_chunk(logits_BV[start : start + rows], sequences[start : start + rows])
    ]


def _sample_chunk(logits_BV: torch.Tensor, sequences: Sequence[SequenceSampler]) -> list[Sampled]:
    raw_BV = logits_BV.float()
    x_BV = raw_BV
    if any(s.changes_logits() for s in sequences):
        x_BV = raw_BV.clone()
        _apply_grammars(x_BV, sequences)
        _apply_biases(x_BV, sequences)
        _apply_penalties(x_BV, sequences)
    best_B, ids_B = x_BV.max(dim=-1)
    random = [row for row, s in enumerate(sequences) if s.params.temperature > 0]
    if random:
        ids_B[random] = _draw(_take(x_BV, random), _take(best_B, random), [sequences[row] for row in random])
    logged = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
    width = min(max((sequences[row].params.logprobs or 0 for row in logged), default=0), raw_BV.shape[1])
    parts = [ids_B, raw_BV.amax(dim=-1), best_B]
    if logged:
        parts += _logprobs(_take(raw_BV, logged), _take(ids_B, logged), width)
    # All that the host needs in one copy; float64 holds token ids exactly.
    flat = torch.cat([part.reshape(-1).double() for part in parts]).cpu().numpy()
    ids, raw, best, *of_logged = np.split(flat, np.cumsum([part.numel() for part in parts])[:-1])
    out = [_result(*row) for row in zip(sequences, ids.astype(int).tolist(), raw, best, strict=True)]
    if logged:
        chosen, top_ids, top = of_logged[0], of_logged[1].reshape(-1, width), of_logged[2].reshape(-1, width)
        for place, row in enumerate(logged):
            if not out[row].error:
                count = sequences[row].params.logprobs
                pairs = zip(top_ids[place, :count].astype(int).tolist(), top[place, :count].tolist(), strict=True)
                out[row] = replace(out[row], logprob=float(chosen[place]), top=list(pairs))
    return out


def _result(sequence: SequenceSampler, token_id: int, raw: float, best: float) -> Sampled:
    """The row's answer; `raw` is its highest logit as the model gave it, `best` that after the options."""
    error = ""
    if not math.isfinite(raw):
        error = f"the model's logits are not finite (their maximum is {raw})"
    elif sequence.grammar is not None and sequence.grammar.error:
        error = f"json_schema: {sequence.grammar.error}"
    elif best == -math.inf:
        names = ["json_schema"] if sequence.grammar is not None else []
        names += ["min_tokens"] if sequence.banned_ids() else []
        error = f"no token is left to sample after {' and '.join(names or ['the penalties'])}"
    elif not math.isfinite(best):
        error = "the penalties made the logits not finite; use milder ones"
    return Sampled(token_id=-1, error=error) if error else Sampled(token_id=token_id)


def _take(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if len(rows) == len(x) else x[rows]


def _apply_grammars(x_BV: torch.Tensor, sequences: Sequence[SequenceSampler]) -> None:
    grammars = [(row, s.grammar) for row, s in enumerate(sequences) if s.grammar is not None]
    if not grammars:
        return
    rows = [row for row, _ in grammars]
    bytes_GW = torch.from_numpy(np.stack([grammar.mask() for _, grammar in grammars])).to(x_BV.device)
    bits_8 = torch.arange(8, dtype=torch.uint8, device=x_BV.device)
    allowed_GV = ((bytes_GW[:, :, None] >> bits_8) & 1).bool().flatten(1)[:, : x_BV.shape[1]]
    x_BV[rows] = x_BV[rows].masked_fill(~allowed_GV, -torch.inf)


def _apply_biases(x_BV: torch.Tensor, sequences: Sequence[SequenceSampler]) -> None:
    """Add logit_bias, then forbid stop tokens where min_tokens is not reached."""
    biases = [(row, *entry) for row, s in enumerate(sequences) for entry in s.params.logit_bias.items()]
    banned = [(row, token, -math.inf) for row, s in enumerate(sequences) for token in s.banned_ids()]
    for entries in (biases, banned):  # a token can be in both, but only once in each
        if entries:
            table = torch.tensor(entries, dtype=torch.float64, device=x_BV.device)
            rows, ids = table[:, 0].long(), table[:, 1].long()
            x_BV[rows, ids] += table[:, 2].float()


def _apply_penalties(x_BV: torch.Tensor, sequences: Sequence[SequenceSampler]) -> None:
    seen = [(row, s.params, s.seen) for row, s in enumerate(sequences) if s.seen is not None and s.seen.ids]
    if not seen:
        return
    per_row = [(row, p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for row, p, _ in seen]
    table = np.repeat(np.array(per_row, dtype=np.float64), [len(tokens.ids) for _, _, tokens in seen], axis=0)
    ids = np.concatenate([np.array(tokens.ids) for _, _, tokens in seen])
    counts = np.concatenate([np.array(tokens.counts) for _, _, tokens in seen])
    table_N6 = torch.from_numpy(np.column_stack((table, ids, counts))).to(x_BV.device)
    rows_N, repetition_N, presence_N, frequency_N, ids_N, counts_N = table_N6.unbind(1)
    rows_N, ids_N = rows_N.long(), ids_N.long()
    x_N = x_BV[rows_N, ids_N].double()
    x_N = torch.where(x_N > 0, x_N / repetition_N, x_N * repetition_N)
    x_N -= frequency_N * counts_N + presence_N * (counts_N > 0)
    x_BV[rows_N, ids_N] = x_N.float()


def _draw(x_RV: torch.Tensor, best_R: torch.Tensor, sequences: Sequence[SequenceSampler]) -> torch.Tensor:
    """Token ids [R]: the distribution, cumulated in order of token id, inverted at the uniform numbers."""
    vocab_size = x_RV.shape[1]
    params = [s.params for s in sequences]
    options = [(p.temperature, p.top_p, p.min_p, s.uniform()) for p, s in zip(params, sequences, strict=True)]
    options_R4 = torch.tensor(options, dtype=torch.float64, device=x_RV.device)
    temperature_R1, top_p_R1, min_p_R1, uniform_R1 = options_R4.split(1, dim=1)
    x_RV = x_RV.double().sub_(best_R[:, None]).div_(temperature_R1)
    weights_RV = x_RV.exp_().mul_(_ONE).round_().long()
    rows = [row for row, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if rows:
        floor_R1 = _top_k_floor(_take(weights_RV, rows), [params[row].top_k for row in rows])
        _keep_from(floor_R1, weights_RV, rows)
    rows = [row for row, p in enumerate(params) if p.top_p < 1]
    if rows:
        look = min(_NUCLEUS, vocab_size, max(params[row].top_k if params[row].top_k > 0 else _NUCLEUS for row in rows))
        floor_R1 = _top_p_floor(_take(weights_RV, rows), _take(top_p_R1, rows), look)
        _keep_from(floor_R1, weights_RV, rows)
    if any(p.min_p > 0 for p in params):
        _keep_from((min_p_R1 * _ONE).ceil().long(), weights_RV, list(range(len(params))))
    cumulated_RV = weights_RV.cumsum(dim=-1)
    total_R1 = cumulated_RV[:, -1:]
    goal_R1 = torch.minimum((uniform_R1 * total_R1).long(), total_R1 - 1)
    # In rows that are not finite, which `_result` refuses, the index is arbitrary, but it must be one.
    return torch.searchsorted(cumulated_RV, goal_R1, right=True)[:, 0].clamp(0, vocab_size - 1)


def _keep_from(floor_R1: torch.Tensor, weights_RV: torch.Tensor, rows: list[int]) -> None:
    """Set the weights below the floor to 0 in these rows."""
    if len(rows) == len(weights_RV):
        weights_RV *= weights_RV >= floor_R1
    else:
        kept_RV = weights_RV[rows]
        weights_RV[rows] = kept_RV * (kept_RV >= floor_R1)


def _top_k_floor(weights_RV: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    """The weight [R, 1] of each row's top_k-th best token."""
    best_first = weights_RV.topk(max(top_k)).values
    return best_first.gather(1, torch.tensor(top_k, device=weights_RV.device)[:, None] - 1)


def _top_p_floor(weights_RV: torch.Tensor, top_p_R1: torch.Tensor, look: int) -> torch.Tensor:
    """The weight [R, 1] of the token with which the best ones reach the share `top_p` of the row's total.

    Looks at the `look` best tokens, then sorts the rows where they do not reach it.
    """
    total_R1 = weights_RV.sum(dim=-1, keepdim=True)
    goal_R1 = torch.minimum((top_p_R1 * total_R1).ceil().long(), total_R1)
    floor_R1, reached_R = _floor_at(weights_RV.topk(look).values, goal_R1)
    rest = (~reached_R).nonzero()[:, 0]
    if len(rest):
        floor_R1[rest] = _floor_at(weights_RV[rest].sort(dim=-1, descending=True).values, goal_R1[rest])[0]
    return floor_R1


def _floor_at(best_first_RK: torch.Tensor, goal_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the sum of weights reaches the goal: the weight there [R, 1], and whether it does [R]."""
    place_R1 = torch.searchsorted(best_first_RK.cumsum(dim=-1), goal_R1)
    last = best_first_RK.shape[1] - 1
    return best_first_RK.gather(1, place_R1.clamp(max=last)), place_R1[:, 0] <= last


def _logprobs(raw_RV: torch.Tensor, ids_R: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """Log-probability of the chosen token [R, 1]; the `width` best tokens [R, width], best first, and theirs."""
    logprobs_RV = raw_RV.log_softmax(dim=-1)
    # topk leaves the order of equal values open, so take it over distinct keys: the float's bits as an integer
    # of the same order (adding 0.0 makes -0.0 equal to 0.0), then the token id, low first.
    bits_RV = (raw_RV + 0.0).view(torch.int32).long()
    order_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV)
    keys_RV = order_RV * 2**32 - torch.arange(raw_RV.shape[1], device=raw_RV.device)
    top_ids = keys_RV.topk(width).indices
    return logprobs_RV.gather(1, ids_R[:, None]), top_ids, logprobs_RV.gather(1, top_ids)
