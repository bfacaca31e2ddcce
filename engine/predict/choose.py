"""Which predictors an engine uses: what its options name, what was trained for its model, what needs no training."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from .base import Predictor
from .history import Coactivation, DecayedCounts
from .installed import KINDS, Trained, installed, load
from .next_use import LiveNextUse
from .path import PathPredictor
from .path_network import PathNetwork
from .stream_ridge import StreamRidge

log = logging.getLogger("moeyard.predict")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """`trained` ones know the model's routing, and say which experts are worth a slot; `others` only what is next.
    `look_ahead`: and the model's own routers are asked, about what `ridge` says where there is one.
    """

    trained: list[Predictor] = field(default_factory=list)
    others: list[Predictor] = field(default_factory=list)
    look_ahead: bool = False
    ridge: StreamRidge | None = None
    exact: bool = False
    """And what routers choose by token ids alone is known."""


def predictors_for(option: str, fingerprint: str, layers: int, experts: int) -> Chosen:
    """For `--predictor`. Raises ValueError for a file that is no predictor of this model."""
    if option == "none":
        return Chosen()
    found: list[Trained] = []
    ridge = None
    if option == "auto":
        there = installed(fingerprint, layers, experts)
        found = [made for made in (there.path, there.next_use) if made is not None]
        ridge = there.look_ahead
        names = ", ".join(there.names) or "none (moeyard train-predictor)"
        log.info("predictors trained for this model: %s", names)
    else:
        one = _named(option, fingerprint, layers, experts)
        if isinstance(one, StreamRidge):
            return Chosen(look_ahead=True, ridge=one)
        found = [one]
    trained: list[Predictor] = []
    for made in found:
        assert not isinstance(made, StreamRidge)
        trained.append(PathPredictor(made) if isinstance(made, PathNetwork) else LiveNextUse(made))
    # Where something was trained, what needs no training is only in the way: it is less often right.
    others: list[Predictor] = [] if trained else [Coactivation(layers, experts), DecayedCounts(layers, experts)]
    return Chosen(trained=trained, others=others, look_ahead=option == "auto", ridge=ridge, exact=option == "auto")


def _named(option: str, fingerprint: str, layers: int, experts: int) -> Trained:
    """A file of any kind."""
    errors = []
    for kind in KINDS:
        try:
            return load(kind, Path(option), fingerprint, layers, experts)
        except ValueError as error:
            errors.append(error)
    # The kinds have names of their own: of a file that is none of them, either error says so.
    raise ValueError(f"predictor: {max(errors, key=lambda e: 'made for' in str(e))}")
