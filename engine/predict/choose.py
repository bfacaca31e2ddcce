"""Which predictors an engine uses: what its options name, and what was made for its model."""

from __future__ import annotations

from ..next_use import NextUse
from .base import Predictor
from .next_use import LiveNextUse


def predictors_for(option: str, fingerprint: str, layers: int, experts: int) -> list[Predictor]:
    """For `--predictor`. Raises ValueError for a file that is no predictor of this model."""
    if option in ("none", "auto"):
        return []
    model = NextUse.load(option, fingerprint)
    if (model.layers, model.experts) != (layers, experts):
        raise ValueError(
            f"predictor: {option} is for {model.layers} layers of {model.experts} experts, and this model has {layers}"
            f" of {experts}; fit one for it"
        )
    return [LiveNextUse(model)]
