"""The published planners by name, to compare with and to choose from.

All are pure, in integers and with explicit ties: the same plan on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from . import eplb, llep, metro, moonep, priced, resplit, tempo, ultraep
from .plan import Plan, native
from .problem import Problem

Planner = Callable[[Problem], Plan]

BASELINES: Mapping[str, Planner] = MappingProxyType(
    {
        "native": native,
        "eplb": eplb.plan,
        "resplit": resplit.plan,
        "llep": llep.plan,
        "moonep": moonep.plan,
        "ultraep": ultraep.plan,
        "metro": metro.plan,
        "tempo": tempo.plan,
    }
)

STAYING = ("native", "eplb", "resplit", "metro", "tempo")
"""Those that move no weights: all they do is to split rows over ranks that hold the expert."""

UNCAPPED = ("llep", "moonep")
"""Those that, as published, do not look at the room for guests."""

PLANNERS: Mapping[str, Planner] = MappingProxyType({"priced": priced.plan, **BASELINES})
"""What a layer can be balanced by: ours, and those to compare it with."""
