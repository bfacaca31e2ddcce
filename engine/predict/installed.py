"""The predictors that were trained for a model: files beside the cache of measured constants, found at start by the
model's fingerprint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import constants
from ..next_use import NextUse
from .path_network import PathNetwork
from .stream_ridge import StreamRidge

log = logging.getLogger("moeyard.predict")

Trained = NextUse | PathNetwork | StreamRidge
KINDS: dict[str, type[NextUse] | type[PathNetwork] | type[StreamRidge]] = {
    "next_use": NextUse,
    "path": PathNetwork,
    "look_ahead": StreamRidge,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Installed:
    """What there is for a model."""

    next_use: NextUse | None = None
    path: PathNetwork | None = None
    look_ahead: StreamRidge | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in KINDS if getattr(self, name) is not None)


def directory() -> Path:
    return constants.directory().parent / "predictors"


def path_of(kind: str, digest: str, folder: Path | None = None) -> Path:
    """`digest` is `Checkpoint.fingerprint`."""
    assert kind in KINDS and digest, (kind, digest)
    return (folder or directory()) / f"{kind}-{digest}.npz"


def install(kind: str, predictor: Trained, folder: Path | None = None) -> Path:
    """Saves a predictor in the place of an older one; readers see the one or the other. Raises ValueError for a
    directory that cannot be written.
    """
    path = path_of(kind, predictor.digest, folder)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
        predictor.save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a directory that can be written with --out") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return path


def remove(kind: str, digest: str, folder: Path | None = None) -> bool:
    """Whether there was one."""
    try:
        path_of(kind, digest, folder).unlink()
    except FileNotFoundError:
        return False
    return True


def load(kind: str, path: Path, digest: str, layers: int, experts: int) -> Trained:
    """One predictor. Raises ValueError, with the remedy, for a file that is none of this kind, and for one that was
    made for another model or for other numbers of MoE layers or of experts.
    """
    found = KINDS[kind].load(str(path), digest)
    shape = found.shape if isinstance(found, PathNetwork) else found
    if (shape.layers, shape.experts) != (layers, experts):
        raise ValueError(
            f"{path}: for {shape.layers} layers of {shape.experts} experts, the model has {layers} of {experts};"
            " make one for it with moeyard train-predictor"
        )
    return found


def installed(digest: str, layers: int, experts: int, folder: Path | None = None) -> Installed:
    """What was installed for a model with this fingerprint. A file that does not count is left out, with a warning."""
    found: dict[str, Trained] = {}
    for kind in KINDS:
        path = path_of(kind, digest, folder)
        if not path.exists():
            continue
        try:
            found[kind] = load(kind, path, digest, layers, experts)
        except ValueError as error:
            log.warning("the predictor %s is left out: %s", kind, error)
    next_use, network, ridge = (found.get(kind) for kind in ("next_use", "path", "look_ahead"))
    assert next_use is None or isinstance(next_use, NextUse)
    assert network is None or isinstance(network, PathNetwork)
    assert ridge is None or isinstance(ridge, StreamRidge)
    return Installed(next_use=next_use, path=network, look_ahead=ridge)
