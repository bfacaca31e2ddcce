"""Which requests decode in a step, where `--max-decode-seqs` lets fewer decode than run: in order, or those together
that will probably need the same missing experts (`scheduler/affinity/`).

L: MoE layers, E: experts of a layer, X: of all layers.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from ..scheduler.affinity.picker import AffinityPicker, InOrder
from ..scheduler.affinity.ready import FS_PER_NS, Bools, Integers
from ..scheduler.requests import Request
from .config import EngineConfig
from .offload import Offload
from .predict.history import SEQUENCES, DecayedCounts

MEASURED_STEPS = 64
"""The last ones, which say what a step takes."""


def picker_for(config: EngineConfig, offload: Offload | None, top_k: int, ranks: int) -> InOrder | ExpertAware | None:
    """What `--batching` and `--max-decode-seqs` ask for; None where all that run decode. Raises ValueError where
    `affinity` cannot act.
    """
    if config.batching == "affinity" and (offload is None or ranks > 1):
        why = (
            "all experts are in memory, none is missing"
            if offload is None
            else "what is missing on other ranks is not known"
        )
        remedy = "set --expert-memory to less than all of them" if offload is None else "use --ep 1"
        raise ValueError(f"batching is affinity, and {why}; leave it out, or {remedy}")
    most = config.max_decode_seqs
    if most is None:
        return None
    if config.batching == "order" or offload is None or ranks > 1 or config.predictor == "none":
        return InOrder(most=most)
    return ExpertAware(offload, top_k=top_k, most=most, sequences=config.max_num_seqs)


def decode_figures(picker: InOrder) -> dict[str, int]:
    """The fields of `Stats` about it."""
    found = {"decode_chosen": picker.chosen, "decode_passed_over": picker.passed_over}
    if isinstance(picker, AffinityPicker):
        found |= {"decode_regrouped": picker.changed, "decode_saved_ns": picker.saved_ns}
    return found


class ExpertAware(AffinityPicker):
    """Knows from the forecast and the store which experts each request will probably read, the K most probable of each
    layer, and measures what that takes: a step without waiting for experts, and the waiting by bytes read.

    Nothing is known of that before the first step has ended: until then it is in order.

    Args:
        top_k: experts of a token in a layer.
        most: requests that decode in a step.
        sequences: requests that run at the same time.
    """

    def __init__(self, offload: Offload, *, top_k: int, most: int, sequences: int) -> None:
        super().__init__(
            most=most,
            predict=self._needs,
            missing_bytes=self._missing,
            read_fs_per_byte=0,
        )
        self._offload = offload
        self._top_k = top_k
        self._steps: deque[tuple[int, int, int]] = deque(maxlen=MEASURED_STEPS)
        self._seen = self._counts()
        layers, experts = offload.plan.budget.layers, offload.plan.budget.experts
        self._nbytes_LE = np.zeros((layers, experts), dtype=np.int64)
        for layer, row in enumerate(offload.source.nbytes_LE):
            self._nbytes_LE[layer, : len(row)] = row
        # For all that run, whatever the other predictors know.
        offload.forecast.beside.append(DecayedCounts(layers, experts, max(SEQUENCES, sequences)))

    def end_step(self, ns: int) -> None:
        """A step has taken so long."""
        waited, read = self._counts()
        self._steps.append((ns, waited - self._seen[0], read - self._seen[1]))
        self._seen = waited, read
        all_ns, waited, read = (sum(part) for part in zip(*self._steps, strict=True))
        self.step_ns = max(all_ns - waited, 0) // len(self._steps)
        self.read_fs_per_byte = waited * FS_PER_NS // max(read, 1)

    def _counts(self) -> tuple[int, int]:
        figures = self._offload.store.figures
        return figures.waited_ns, figures.read_bytes

    def _needs(self, request: Request) -> Bools:
        needs_LE = np.zeros(self._nbytes_LE.shape, dtype=bool)
        chance_LE = self._offload.forecast.next_of(request.id)
        if chance_LE is not None:
            likely_LK = np.argsort(-chance_LE, axis=1, kind="stable")[:, : self._top_k]
            np.put_along_axis(needs_LE, likely_LK, True, axis=1)
        return needs_LE.reshape(-1)

    def _missing(self) -> Integers:
        missing_LE = self._nbytes_LE.copy()
        if resident := self._offload.store.resident:
            missing_LE[tuple(np.array(list(resident)).T)] = 0
        return missing_LE.reshape(-1)
