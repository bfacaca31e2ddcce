"""The messages by which a plan's weights travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .plan import Transfer


@dataclass(frozen=True)
class Message:
    """Bytes `start` to `stop` of a plan's transfer number `transfer`, on one hop of their way."""

    transfer: int
    start: int
    stop: int
    sender: int
    receiver: int


def messages(transfers: Sequence[Transfer], bytes_N: Sequence[int]) -> list[Message]:
    """All messages of a plan: between two ranks they are sent in this order."""
    return [
        Message(index, 0, nbytes, t.source, t.destination)
        for index, (t, nbytes) in enumerate(zip(transfers, bytes_N, strict=True))
    ]
