"""How often a model's experts were used while it served before: counts beside the cache of measured constants, by
fingerprint.

L: MoE layers, E: experts of a layer (the most of any).
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import constants

Integers = npt.NDArray[np.int64]

MOST_USES = 1 << 20
"""Of a layer: counts are halved when they are of more, so that what was served of late counts more."""

log = logging.getLogger("moeyard.usage")


def path_of(digest: str) -> Path:
    """`digest` is `Checkpoint.fingerprint`."""
    return constants.directory().parent / "usage" / f"{digest}.npz"


def load(digest: str, layers: int, experts: int) -> Integers | None:
    """[L, E] tokens that used each expert; None for a model that has not been served, or a file that does not count."""
    path = path_of(digest)
    try:
        with np.load(path, allow_pickle=False) as file:
            counts_LE: Integers = file["counts_LE"].astype(np.int64)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s: %s; it is made anew", path, " ".join(str(error).split()))
        return None
    return counts_LE if counts_LE.shape == (layers, experts) and counts_LE.min() >= 0 else None


def add(digest: str, counts_LE: Integers) -> None:
    """Adds what was used. A directory that cannot be written is not worth an error: the next start is slower."""
    if not counts_LE.any():
        return
    before_LE = load(digest, *counts_LE.shape)
    total_LE = counts_LE if before_LE is None else counts_LE + before_LE
    if total_LE.sum(1).max() > MOST_USES:
        total_LE = total_LE // 2
    path, temporary = path_of(digest), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, counts_LE=total_LE)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("%s: %s; which experts were used is not kept for the next start", path, error.strerror)
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
