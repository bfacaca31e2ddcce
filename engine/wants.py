"""What is worth reading ahead of the router's choice, on whose word, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .readers import Priority


@dataclass(frozen=True, kw_only=True)
class Want:
    """An expert that a layer to come will probably use: with what probability, and how urgent that is."""

    layer: int
    expert: int
    chance: float
    priority: Priority = Priority.NEXT_LAYER
    by: Any = None
    """Who says so, for `ExpertStore.heard`."""
    ahead: int = 1
    """How many layers before it that was said."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a read ahead, or a part of that, in bytes: `nbytes` were read, and used or not. Of those used,
    `hidden` had been read when the router asked; and a layer that needed others had to wait for `delay`.
    """

    nbytes: int = 0
    used: bool = False
    hidden: int = 0
    delay: int = 0
