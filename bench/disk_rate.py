"""What a checkpoint's files give when single experts are read from them."""

from __future__ import annotations

from contextlib import closing

from ..engine.config import EngineConfig
from ..scheduler.offload_cost import DiskCost


def disk_cost(config: EngineConfig, *, progress: bool = False, now: bool = False) -> DiskCost:
    """Of the model's experts, past the page cache where that is possible: what `moeyard profile` or a start measured,
    or measured now; `now`: one short round of that in any case, kept nowhere. Raises OSError for files that cannot be
    read, ValueError for a model without experts.
    """
    from ..engine.expert_files import ExpertFiles
    from ..engine.loader import draw
    from ..engine.measure_disk import CASE_S, disk_constants, measure_disk
    from ..engine.resolve import resolve_model

    path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
    blueprint = draw(config, path)
    if not blueprint.spec.experts:
        raise ValueError("model: it has no experts to read; give a Mixture-of-Experts model")
    with closing(ExpertFiles([blueprint.weights.reader(spec) for spec in blueprint.spec.experts])) as files:
        if now:
            return measure_disk(files, case_s=CASE_S, rounds=1)[0]
        return disk_constants(files, progress=progress).values
