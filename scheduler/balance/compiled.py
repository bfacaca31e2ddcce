"""How the planner's functions are compiled: by numba, once for each state of this folder's source.

numba's cache on disk looks at the file of the function it keeps, not at the files of those that it calls. So the
machine code lies in a directory named by a digest of all of them: after any change all of it is compiled again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config

log = logging.getLogger(__name__)


def digest(folder: Path) -> str:
    """Of the source of all modules in a folder."""
    found = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _cache_directory() -> str | None:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = os.path.join(config.CACHE_DIR or os.path.join(home, "moeyard", "numba"), digest(Path(__file__).parent))
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        log.warning("the planner is compiled anew by each process (set NUMBA_CACHE_DIR to avoid it): %s", error)
        return None
    return path


_DIRECTORY = _cache_directory()


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled when it is first called; its machine code is kept where a directory can be written."""
    if _DIRECTORY is None:
        return njit(function)
    before, config.CACHE_DIR = config.CACHE_DIR, _DIRECTORY
    try:
        return njit(function, cache=True)
    finally:
        config.CACHE_DIR = before
