"""What a checkpoint's files give when single experts are read from them."""

from __future__ import annotations

from ..engine.config import EngineConfig

CASE_S = 0.25
"""Of reading, for each number of reads in flight and each of some rounds."""


def disk_rate(config: EngineConfig, *, progress: bool = False) -> tuple[float, int]:
    """Bytes per second with the best number of reads in flight, past the page cache where that is possible, and an
    expert's bytes. Raises OSError for files that cannot be read, ValueError for a model without experts.
    """
    from ..engine.expert_files import ExpertFiles
    from ..engine.loader import draw
    from ..engine.measure_disk import measure_disk
    from ..engine.resolve import resolve_model

    path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
    blueprint = draw(config, path)
    if not blueprint.spec.experts:
        raise ValueError("model: it has no experts to read; give a Mixture-of-Experts model")
    files = ExpertFiles([blueprint.weights.reader(spec) for spec in blueprint.spec.experts])
    try:
        cost = measure_disk(files, case_s=CASE_S, progress=progress)
    finally:
        files.close()
    return cost.expert_bytes * 1e9 / cost.time_ns(1, cost.best), cost.expert_bytes
