"""A predictor of next use for a bench, fitted on recorded routing that does not run in it."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from ..engine.checkpoint import Checkpoint
from ..engine.next_use import NextUse
from .token_trace import TokenTrace


def save_predictor(trace: TokenTrace, model: str, experts: int, path: str) -> None:
    """Fits it, with the next token's chances, for the checkpoint in the folder `model`; about a minute."""
    with tqdm(total=2 * len(trace.topk_TLK), desc="fit", unit="token", disable=None, delay=2, leave=False) as bar:
        digest = Checkpoint(Path(model)).fingerprint
        fitted = NextUse.fit(trace.topk_TLK, trace.start_S, experts, digest=digest, progress=bar.update)
    fitted.with_next_token(trace.topk_TLK, trace.start_S).save(path)
