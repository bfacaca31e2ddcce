"""What a model's experts lose when they are kept quantised: errors of weights and outputs, on some of its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .report import table

if TYPE_CHECKING:
    from ..engine.config import EngineConfig

LAYERS, EXPERTS = 4, 2
"""How many are tried at most: layers at equal distances, and of each its first and last expert."""
VECTORS = 64
"""Random ones of unit variance that each expert is given."""


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """Of one format: the bytes of an expert, and root mean squares of differences as shares of what they differ from:
    the weights as stored, and what an expert gives for random vectors.
    """

    name: str
    nbytes: int
    weights: float
    outputs: float


def format_errors(config: EngineConfig) -> list[FormatError]:
    """Of each format that `--expert-dtype` can make of this model's experts, with the bytes of plain ones first. Empty
    for a model without experts, and for one whose experts are quantised already: what they were is not known.
    """
    import torch

    from ..engine.loader import draw
    from ..engine.quantised_reader import reader_for
    from ..engine.resolve import resolve_model
    from ..kernels.quantised import FORMATS

    path = resolve_model(config.model, config.revision, remote_code=config.trust_remote_code)
    blueprint = draw(dataclasses.replace(config, expert_dtype="auto", device="cpu"), path)
    specs = blueprint.spec.experts
    if not specs or blueprint.weights.layout is not None:
        return []
    step = max(1, len(specs) // LAYERS)
    readers = [blueprint.weights.reader(spec) for spec in specs[::step][:LAYERS]]
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in FORMATS}
    generator = torch.Generator().manual_seed(0)
    for reader in readers:
        module: Any = blueprint.model.get_submodule(reader.spec.module)
        gate = module._apply_gate if reader.spec.has_gate else module.act_fn
        for expert in sorted({0, reader.spec.num_experts - 1}):
            plain = {n: t.t() if reader.transposed and t.dim() == 2 else t for n, t in reader.read(expert).items()}
            plain = {name: tensor.float() for name, tensor in plain.items()}
            up = next(name for name in plain if name in ("gate_up_proj", "up_proj"))
            x = torch.randn(VECTORS, plain["down_proj"].shape[0], generator=generator)
            wanted = _output(plain, up, gate, x)
            for name, form in FORMATS.items():
                if any(t.shape[-1] % form.per_byte for t in plain.values() if t.dim() == 2):
                    sums.pop(name, None)  # a size that the format does not have
                    continue
                kept = {n: form.quantise(t).dequantise(t.dtype) if t.dim() == 2 else t for n, t in plain.items()}
                squares = (
                    sum(_square(kept[n] - t) for n, t in plain.items()),
                    sum(_square(t) for t in plain.values() if t.dim() == 2),
                    _square(_output(kept, up, gate, x) - wanted),
                    _square(wanted),
                )
                sums[name] += torch.tensor(squares, dtype=torch.float64)
    found = [FormatError(name=readers[0].kept_as, nbytes=readers[0].nbytes, weights=0.0, outputs=0.0)]
    for name, (off, all_, out_off, out) in ((name, values.tolist()) for name, values in sums.items()):
        small = reader_for(name, None)(blueprint.weights, specs[0])
        errors = {"weights": (off / all_) ** 0.5, "outputs": (out_off / out) ** 0.5}
        found.append(FormatError(name=name, nbytes=small.nbytes, **errors))
    blueprint.weights.checkpoint.close()
    return found


def error_table(found: Sequence[FormatError]) -> str:
    """By format: the bytes of an expert and its errors."""
    plain = found[0].nbytes
    rows = [[e.name, f"{e.nbytes / plain:.3f}", f"{e.weights:.2%}", f"{e.outputs:.2%}"] for e in found]
    title = (
        "Experts kept quantised (--expert-dtype), against the checkpoint's own weights, on up to"
        f" {LAYERS * EXPERTS} experts:"
    )
    return f"{title}\n{table(['kept as', 'bytes', 'error of weights', 'error of outputs'], rows)}"


def _output(weights: dict[str, Any], up: str, gate: Any, x: Any) -> Any:
    from torch.nn import functional as F

    h = gate(F.linear(x, weights[up], weights.get(f"{up}_bias")))
    return F.linear(h, weights["down_proj"], weights.get("down_proj_bias"))


def _square(tensor: Any) -> float:
    return float(tensor.double().square().sum())
